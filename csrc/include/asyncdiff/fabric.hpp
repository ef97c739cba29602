// Ranks, how they reach each other's memory, and how a failure of one stops the others.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "asyncdiff/channel.hpp"
#include "asyncdiff/export.hpp"
#include "asyncdiff/processes.hpp"

namespace asyncdiff {

// Throws InvalidArgument for numbers of ranks or seconds that no fabric has.
ASYNCDIFF_EXPORT void check_fabric(int ranks, double deadline_seconds);

class ASYNCDIFF_EXPORT Fabric {
 public:
  Fabric(int ranks, double deadline_seconds);
  virtual ~Fabric() = default;
  Fabric(const Fabric&) = delete;
  Fabric& operator=(const Fabric&) = delete;

  int ranks() const { return ranks_; }
  // No wait lasts longer, in seconds.
  double deadline() const { return deadline_; }
  virtual std::string kind() const = 0;
  // The number of each rank's host, from 0.
  std::vector<int> hosts() const;

  // How memory of the second rank is written by the first, for every pair: "memory" (the same),
  // "peer" (device to device), "staged" (through pinned host memory), or what connects two hosts,
  // "sockets" or "nccl"; "simulated" where it is made to look like another link.
  virtual std::map<std::pair<int, int>, std::string> links() const = 0;
  // Why a link is not better than it is, where there is a reason.
  virtual std::map<std::pair<int, int>, std::string> link_reasons() const { return {}; }

  // The link that all pairs of ranks are made to have, as simulated_link_from() takes it; empty
  // where links are as they are.
  virtual std::string simulated_link() const { return {}; }

  // With several processes it is collective among those that run the ends: any two processes make
  // the calls that they share in the same order. In others it returns at once, a channel that has
  // no end there.
  virtual std::shared_ptr<Channel> channel(int sender, const std::vector<int>& receivers,
                                           const Layout& layout, int slots, const std::string& name,
                                           Mode mode = Mode::kAuto) = 0;

  // Puts of channels of one sender, each channel once: on CUDA in one launch (of up to
  // 8 channels and 320 tensors), whatever the channels' modes. An interrupt (interrupt.hpp) may
  // leave some of them done: only reset() helps then.
  virtual void put_batch(const std::vector<Put>& puts, Stream stream);

  // Ends all waits, now and later, until reset(). Waits for nothing, whatever other threads do.
  virtual void abort(int rank, const std::string& reason) = 0;
  // Throws the first failure since the last reset(), if there was one. Does not synchronize. What
  // was read from slots by work that is done is whole, where nothing is thrown.
  virtual void check() = 0;
  // Empties all channels and forgets failures. Nothing may be in flight. The next bundle of every
  // channel counts as the first_bundle-th, so it uses slot first_bundle % slots. Throws the failure
  // where it helps nothing after one (recovers()).
  virtual void reset(std::uint64_t first_bundle = 0) = 0;
  // Whether reset() helps after a failure or an abort; else close the fabric and make another one.
  virtual bool recovers() const { return true; }
  // Everybody's bytes, by process; collective among all processes. Waits at most so many seconds
  // for a process that lives, which begin anew with each of its heartbeats. Throws ProcessLost and
  // CollectiveTimeout; then the fabric is over in all processes: close it and make another one.
  std::vector<std::string> all_gather(const std::string& mine, double seconds) const;
  // Tells those that wait for this process in a call that they make together that it goes on, and
  // with what (96 bytes are kept, for their message). Not collective.
  void heartbeat(const std::string& doing) const;

  // Ends the fabric: nothing can be exchanged any more. Nothing may be in flight. Mailbox memory
  // lives on while somebody holds it.
  virtual void close() = 0;

 protected:
  void check_endpoints(int sender, const std::vector<int>& receivers, int slots) const;
  // The processes that make this channel together.
  Party ends_of(int sender, const std::vector<int>& receivers) const;
  void check_batch(const std::vector<Put>& puts) const;
  // Throws InvalidArgument unless channel() of this very fabric made it.
  void check_own(const Channel& channel) const;

 private:
  friend class SpanningFabric;  // asks the fabric of its host

  virtual bool made(const Channel& channel) const = 0;
  virtual const Processes& processes() const = 0;

  int ranks_;
  double deadline_;
};

}  // namespace asyncdiff
