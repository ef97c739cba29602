// A communicator of two ranks, of which one sends and the other receives.
#pragma once

#include <chrono>
#include <cstddef>
#include <functional>
#include <string>

#include "nccl_library.hpp"

namespace asyncdiff {

// Never waits for the other side without end: NCCL does its work in threads of its own, and whoever
// waits for those has a limit, and can be called off. For one thread at a time.
class NcclCommunicator {
 public:
  static constexpr int kSender = 0, kReceiver = 1;

  struct Limits {
    double seconds;               // for the making, and for each call afterwards
    std::function<void()> check;  // throws where waiting is of no use any more
  };

  // On the current device. Both sides make it at the same time. Throws NcclError, also where that
  // takes longer than the limit, and what check() throws.
  NcclCommunicator(const NcclLibrary& library, const NcclUniqueId& id, int place,
                   const Limits& making);
  // Aborts it.
  ~NcclCommunicator();
  NcclCommunicator(const NcclCommunicator&) = delete;
  NcclCommunicator& operator=(const NcclCommunicator&) = delete;

  // Of every call after the making.
  void set_limits(const Limits& limits) { limits_ = limits; }

  // Enqueue one message; the other side does its part with as many bytes. When they return, what
  // is enqueued to the stream afterwards comes after it.
  void send(const void* data, std::size_t nbytes, void* stream);
  void receive(void* data, std::size_t nbytes, void* stream);
  // Throws NcclError where the connection has failed.
  void check() const;

  // Nothing may be in flight on either side. Returns once NCCL has given all back, or at the limit.
  void close();
  // Ends what is in flight. Waits for nothing: NCCL gives back what it has in its own time.
  void abort() noexcept;

  // Waits until what was closed or aborted in this process has been given back; false where that
  // takes longer.
  static bool wait_for_all(std::chrono::steady_clock::time_point limit);

 private:
  void settle(int result, const std::string& what);

  const NcclLibrary& library_;
  NcclHandle* handle_ = nullptr;  // null: there is none any more
  int other_;
  Limits limits_;
};

}  // namespace asyncdiff
