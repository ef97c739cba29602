// A communicator of two ranks, of which one sends and the other receives.
#pragma once

#include <chrono>
#include <cstddef>
#include <functional>
#include <memory>
#include <string>

#include "nccl_library.hpp"

namespace asyncdiff {

// What waits for the other side (making it, the first message, giving it up) has a limit, and can
// be called off. Messages afterwards are enqueued by the thread that calls, which takes ten
// microseconds, and may wait for the other side only where it sends from new memory or receives to
// it: whoever calls is to be watched, and abort() ends it.
class NcclCommunicator {
 public:
  static constexpr int kSender = 0, kReceiver = 1;

  struct Limits {
    double seconds;               // for the making, and for each wait afterwards
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

  // Of every wait after the making.
  void set_limits(const Limits& limits) { limits_ = limits; }

  // The first message: both sides connect while they enqueue it. In a thread of its own, which
  // calls `starting` first. Aborted where it throws.
  void exchange_first(void* data, std::size_t nbytes, void* stream,
                      const std::function<void()>& starting);

  // Enqueue one message; the other side does its part with as many bytes. When they return, what
  // is enqueued to the stream afterwards comes after it.
  void send(const void* data, std::size_t nbytes, void* stream);
  void receive(void* data, std::size_t nbytes, void* stream);
  // Throws NcclError where the connection has failed.
  void check() const;

  // Makes memory of NcclLibrary::allocate() known: messages then leave from it and arrive in it
  // without being copied on their way, if both ends are so and the connection can. Null where NCCL
  // does not take it.
  void* enroll(void* data, std::size_t nbytes);
  // Nothing from or to it may be in flight. Waits for nothing: calls `then` afterwards.
  void withdraw(void* enrolled, std::function<void()> then) noexcept;

  // Nothing may be in flight on either side. Returns once NCCL has given all back, or at the limit.
  void close();
  // Ends what is in flight. Waits for nothing: NCCL gives back what it has in its own time.
  void abort() noexcept;

  // Waits until what was closed, aborted or withdrawn in this process has been given back; false
  // where that takes longer.
  static bool wait_for_all(std::chrono::steady_clock::time_point limit);

 private:
  struct State;

  void settle(NcclHandle* handle, int result, const std::string& what);
  void wait_until(const std::function<bool()>& done, const std::string& what);

  const NcclLibrary& library_;
  std::shared_ptr<State> state_;  // calls that are under way have it, too
  int other_;
  Limits limits_;
};

}  // namespace asyncdiff
