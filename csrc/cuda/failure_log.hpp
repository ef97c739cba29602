// What has gone wrong on a fabric of GPUs: told by kernels and hosts, read by hosts.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <mutex>
#include <string>
#include <vector>

#include "asyncdiff/channel_device.hpp"
#include "asyncdiff/memory.hpp"

namespace asyncdiff {

// An abort by the host, for all processes to read. All zero bits: there was none.
struct AbortNote {
  enum State : std::uint32_t { kNone = 0, kBeingWritten = 1, kThere = 2 };

  std::atomic<std::uint32_t> state;
  std::int32_t rank;
  char reason[504];
};

// Lies in lines of host memory that all processes and devices see: the abort word, the abort note,
// and a record for each end of a channel. Clearing them forgets all failures. Its lock is held for
// moments only, so that abort() ends waits whatever else is under way.
class FailureLog {
 public:
  // The abort word and the note lie at these offsets of zeroed memory.
  FailureLog(Buffer host, std::size_t word, std::size_t note, double deadline_seconds);

  bool failed() const;
  // Ends all waits. Nothing after close().
  void abort(int rank, const std::string& reason);
  // Throws the first failure, if there was one.
  void check() const;
  // What bounds the waits of an end of a channel. Its record lies at this offset; `claimed` is a
  // word of the end's own device, or null where this process does not run it.
  WaitContext add_end(int rank, const std::string& channel, std::size_t record, unsigned* claimed);
  // Forgets the ends whose records lie where gone(offset) says so.
  void forget(const std::function<bool(std::size_t)>& gone);
  // Lets go of the memory.
  void close();

 private:
  // What a record belongs to.
  struct End {
    FailureRecord* record;
    std::size_t offset;
    int rank;
    std::string channel;
  };

  double deadline_;
  mutable std::mutex mutex_;  // guards all below
  Buffer host_;
  std::uint64_t* word_;
  AbortNote* note_;
  std::vector<End> ends_;
};

}  // namespace asyncdiff
