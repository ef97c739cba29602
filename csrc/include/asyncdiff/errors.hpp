// Every error that the library throws. Bindings map each to one Python class of the same name.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "asyncdiff/export.hpp"

namespace asyncdiff {

class ASYNCDIFF_EXPORT Error : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

// An argument that cannot be meant: a shape, a rank, a slot outside its range.
class ASYNCDIFF_EXPORT InvalidArgument : public Error {
  using Error::Error;
};

// A device that does not exist or cannot do what is needed.
class ASYNCDIFF_EXPORT DeviceError : public Error {
  using Error::Error;
};

// A call of the CUDA runtime failed.
class ASYNCDIFF_EXPORT CudaError : public Error {
  using Error::Error;
};

// NCCL is missing or too old, or could not do what it was to do between hosts.
class ASYNCDIFF_EXPORT NcclError : public Error {
  using Error::Error;
};

// Somebody aborted the fabric; whoever waits on it gets this.
class ASYNCDIFF_EXPORT Aborted : public Error {
 public:
  Aborted(int rank, const std::string& reason);
  int rank;  // who aborted
};

// A process of the fabric has ended, or has closed the fabric, while others need it.
class ASYNCDIFF_EXPORT ProcessLost : public Error {
 public:
  ProcessLost(int process, std::vector<int> ranks, const std::string& message);
  int process;             // which; -1 unknown
  std::vector<int> ranks;  // that it ran
};

// A process that lives did not make a call that it has to make together with others.
class ASYNCDIFF_EXPORT CollectiveTimeout : public Error {
 public:
  CollectiveTimeout(int process, std::vector<int> ranks, const std::string& message);
  int process;             // that did not come; the first of them
  std::vector<int> ranks;  // that it runs
};

// Processes of a rendezvous do not know the same key.
class ASYNCDIFF_EXPORT AuthenticationError : public Error {
  using Error::Error;
};

// One operation on one endpoint of a channel: who, where, and what it counted.
struct Incident {
  int rank;             // whose operation it was
  int peer;             // whom it concerned; -1 where it concerned nobody else
  std::string channel;  // the channel's name
  int slot;             // the slot that the operation named
  // The epoch that was waited for (ExchangeTimeout), or the slot that is next (SlotOrderError).
  std::uint64_t expected;
  // The epoch that was there instead, or the number of bundles so far.
  std::uint64_t seen;
  std::string operation;  // begin, push, commit, get or release
  // The end of the chain of waits that goes on from the peer (ExchangeTimeout): the peer, where
  // that waits for nobody. -1: unknown.
  int straggler;
};

// A wait passed its deadline.
class ASYNCDIFF_EXPORT ExchangeTimeout : public Error {
 public:
  ExchangeTimeout(const Incident& incident, double deadline_seconds);
  Incident incident;
};

// What was out of turn: the slot, as the n-th bundle of a channel uses slot n % slots; or the call,
// as a commit without a begin, or a release without a get.
enum class OutOfTurn { kSlot, kCall };

class ASYNCDIFF_EXPORT SlotOrderError : public Error {
 public:
  SlotOrderError(const Incident& incident, OutOfTurn what);
  Incident incident;
};

}  // namespace asyncdiff
