// Calls of NCCL that may wait: for other work of the device, or, where a peer is gone, for nobody
// knows what. Each runs in a thread of its own, which nobody has to wait for.
#pragma once

#include <chrono>
#include <functional>
#include <string>

namespace asyncdiff {

struct NcclLimits {
  double seconds;
  std::function<void()> check;  // throws where waiting is of no use any more
};

// Begins a call. If there can be no thread, it is not made: the process is about to end anyway.
void start_nccl_call(std::function<void()> call) noexcept;

// Makes a call, and returns its result. Throws NcclError, saying `what` was done, where it is not
// done after the limit, and what limits.check() throws; `late` is then called, in the call's
// thread, once it has returned.
int nccl_call(const std::string& what, const NcclLimits& limits, std::function<int()> call,
              std::function<void()> late);

// Waits until all calls of this process have returned; false where that takes longer.
bool wait_for_nccl_calls(std::chrono::steady_clock::time_point limit);

// What is said of a call that took longer than so many seconds.
std::string nccl_is_late(const std::string& what, double seconds);

}  // namespace asyncdiff
