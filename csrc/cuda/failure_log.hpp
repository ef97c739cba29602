// What has gone wrong on a fabric of GPUs: told by kernels and hosts, read by hosts.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <mutex>
#include <string>

#include "asyncdiff/channel_device.hpp"
#include "asyncdiff/memory.hpp"
#include "flag_pool.hpp"

namespace asyncdiff {

// An abort by the host, for all processes to read. All zero bits: there was none.
struct AbortNote {
  enum State : std::uint32_t { kNone = 0, kBeingWritten = 1, kThere = 2 };

  std::atomic<std::uint32_t> state;
  std::int32_t rank;
  char reason[504];
};

// Lies in host memory that all processes of a host and its devices see: the abort word, the abort
// note, and for each end of a channel a line with its record and what it belongs to. A process has
// lines of its own for the ends that it runs, and reads those of all. The lock is held for moments
// only, so that abort() ends waits whatever else is under way.
class FailureLog {
 public:
  static constexpr std::size_t kMostEnds = 8192;  // of a process
  static std::size_t nbytes(int processes);

  // In zeroed memory, the same for all; `first` is the first of the processes that share it.
  FailureLog(Buffer memory, int process, int processes, double deadline_seconds, int first = 0);

  bool failed() const;
  // Ends all waits. Nothing after close().
  void abort(int rank, const std::string& reason);
  // The same, of a failure that is told elsewhere.
  void end_waits();
  // Throws the first failure, if there was one. Where it may be that a process has gone, the
  // consequence of it, first calls why(peer), the rank that was waited for, or -1.
  void check(const std::function<void(int)>& why) const;
  // Forgets what has failed: the abort, and what ends of this process told. Nothing may be in
  // flight.
  void reset();

  // What bounds the waits of an end of a channel that this process runs; `claimed` is a word of the
  // end's own device. Throws Error where there are too many.
  WaitContext add_end(int rank, const std::string& channel, unsigned* claimed);
  // Lets others take the line of such an end.
  void remove_end(const FailureRecord* record);
  // Lets go of the memory.
  void close();

 private:
  struct Line;
  struct Head;

  Line* lines_of(int process) const;
  Head& head() const;

  double deadline_;
  int process_;
  int processes_;
  int first_;
  mutable std::mutex mutex_;  // guards all below
  Buffer memory_;
  FlagPool own_lines_;
};

}  // namespace asyncdiff
