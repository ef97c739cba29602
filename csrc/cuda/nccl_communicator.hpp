// A communicator of two ranks, of which one sends and the other receives.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

#include "nccl_calls.hpp"
#include "nccl_library.hpp"

namespace asyncdiff {

// NCCL's calls wait for the other side, some of them without end: making one, the first message,
// giving it up. These run in threads of their own, and whoever waits for those has a limit, and can
// be called off. The others return in microseconds; one that does not is aborted by a guard.
// (Communicators that never wait begin a thread for each message, which takes three times as long.)
// Messages, check() and close() are for one thread at a time; abort() is for any.
class NcclCommunicator {
 public:
  static constexpr int kSender = 0, kReceiver = 1;

  // `enter` is called first in each thread that calls NCCL for it: it makes the device current.
  // Both sides make it at the same time. Throws NcclError, also where that takes longer than the
  // limit, and what check() throws.
  NcclCommunicator(const NcclLibrary& library, const NcclUniqueId& id, int place,
                   std::function<void()> enter, const NcclLimits& making);
  // Aborts it.
  ~NcclCommunicator();
  NcclCommunicator(const NcclCommunicator&) = delete;
  NcclCommunicator& operator=(const NcclCommunicator&) = delete;

  // Of every call after the making.
  void set_limits(const NcclLimits& limits) { limits_ = limits; }

  // Enqueue one message; the other side does its part with as many bytes. What is enqueued to the
  // stream afterwards comes after it. With the first one NCCL connects, which takes a second.
  void send(const void* data, std::size_t nbytes, void* stream);
  void receive(void* data, std::size_t nbytes, void* stream);
  // Throws NcclError where the connection has failed.
  void check() const;

  // Nothing may be in flight on either side. Returns once NCCL has given all back, or at the limit.
  void close();
  // Ends what is in flight. Waits for nothing: NCCL gives back what it has in its own time.
  void abort() noexcept;

  // Aborts it if a call has taken longer than its limit, or is of no use any more. By the guard.
  void look_after() noexcept;

 private:
  template <class Call>
  void carry(const char* what, Call call);

  const NcclLibrary& library_;
  std::atomic<NcclHandle*> handle_{nullptr};  // null: there is none any more
  int other_;
  std::function<void()> enter_;
  NcclLimits limits_;
  bool connected_ = false;
  std::atomic<std::int64_t> since_{0};  // when the call that is under way began; 0: there is none
};

}  // namespace asyncdiff
