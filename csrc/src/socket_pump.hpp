// What moves bundles between hosts over TCP, and says that their slots are free again.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>
#include <utility>
#include <vector>

#include "asyncdiff/memory.hpp"
#include "frames.hpp"
#include "host_shared.hpp"

namespace asyncdiff {

// One end of a channel to another host.
struct SocketEnd {
  int peer;  // the other end's process
  bool sends;
  Buffer memory;  // keeps what the rest points into
  std::byte* slots;
  std::size_t slot_nbytes;
  std::uint64_t ring;  // how many slots
  HostSenderCounts* sent;
  HostReceiverCounts* received;
  std::uint32_t theirs = 0;  // the number of the other end, there
};

// A thread with a connection to each process of other hosts.
class SocketPump {
 public:
  SocketPump(std::shared_ptr<HostFabric::Shared> shared, std::map<int, Wire> connections);
  // As close().
  ~SocketPump();
  SocketPump(const SocketPump&) = delete;
  SocketPump& operator=(const SocketPump&) = delete;

  // Returns the end's number, for the other end's `theirs`.
  std::uint32_t add(std::shared_ptr<SocketEnd> end);
  void remove(std::uint32_t number);
  // A bundle was committed as the count-th, or released.
  void committed(const std::shared_ptr<SocketEnd>& end, std::uint64_t count);
  void released(const std::shared_ptr<SocketEnd>& end, std::uint64_t count);

  // Whether nothing more comes from that process: who closes its fabric ends this first.
  bool ended(int process) const { return !peers_.at(process).open; }

  // Forgets what is under way. The caller sees to it that no process sends before all have done it.
  void reset();
  // Ends, once what was sent has arrived; that takes a deadline at most.
  void close();

 private:
  enum Kind : std::uint32_t { kBundle = 1, kRelease = 2 };
  // Plain memory: it is sent to other processes.
  struct Head {
    std::uint32_t kind;
    std::uint32_t end;  // of the receiver of this
    std::uint64_t generation;
    std::uint64_t count;
    std::uint64_t nbytes;  // of the bundle, which follows
  };
  struct Message {
    Head head;
    std::shared_ptr<SocketEnd> end;
    const std::byte* data;
    std::size_t done = 0;
  };
  struct Peer {
    explicit Peer(Wire connection) : wire(std::move(connection)) {}
    Wire wire;  // for its socket
    std::atomic<bool> open{true};
    std::optional<Clock::time_point> ended;
    std::deque<Message> out;  // under mutex_; the first one belongs to the thread while `sending`
    bool sending = false;
    // What comes in.
    Head head{};
    std::size_t head_done = 0;
    std::shared_ptr<SocketEnd> end;  // null: nobody wants it
    std::byte* data = nullptr;
    std::size_t data_done = 0;
  };

  void run();
  void put(const std::shared_ptr<SocketEnd>& end, Kind kind, std::uint64_t count);
  void send(Peer& peer);
  void receive(int process, Peer& peer);
  // Whose the head is, and where its bundle goes. Throws Error for one that cannot be meant.
  void take_head(int process, Peer& peer);
  void arrived(Peer& peer);
  void stop(Peer& peer);
  void look_for_lost();
  bool wants_to_send(Peer& peer);
  // Whether all that was sent has arrived.
  bool flushed();

  std::shared_ptr<HostFabric::Shared> shared_;
  std::map<int, Peer> peers_;
  std::mutex mutex_;  // guards all below, and queues
  std::map<std::uint32_t, std::shared_ptr<SocketEnd>> ends_;
  std::uint32_t next_end_ = 1;
  std::uint64_t generation_ = 0;
  int wake_;  // an event descriptor
  std::atomic<bool> stop_{false};
  std::thread* thread_ = nullptr;
};

}  // namespace asyncdiff
