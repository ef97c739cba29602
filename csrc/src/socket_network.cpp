#include "socket_network.hpp"

#include <cstdint>
#include <memory>
#include <string>
#include <utility>

#include "crossing.hpp"
#include "host_channel.hpp"
#include "socket_pump.hpp"

namespace asyncdiff {

namespace {

class SocketChannel final : public HostChannel {
 public:
  SocketChannel(std::shared_ptr<HostFabric::Shared> shared, std::shared_ptr<SocketPump> pump,
                const Party& ends, const std::string& label, int from, int to, const Layout& bundle,
                int ring)
      : HostChannel(shared, ends, label, from, {to}, bundle, ring, Mode::kAuto, Memory::kOwn),
        shared_(std::move(shared)),
        pump_(std::move(pump)) {
    const Processes& processes = shared_->processes;
    const bool sends = processes.mine(from);
    end_ = std::make_shared<SocketEnd>(
        SocketEnd{processes.owner(sends ? to : from), sends, memory(), start_of(0, 0),
                  layout().nbytes, static_cast<std::uint64_t>(slots()), &sent(), &received(0)});
    number_ = pump_->add(end_);
    const auto numbers = ends.all_gather(std::to_string(number_));
    end_->theirs =
        static_cast<std::uint32_t>(std::stoul(numbers.at(static_cast<std::size_t>(end_->peer))));
  }

  ~SocketChannel() override { pump_->remove(number_); }

  void commit(int slot, Stream stream) override {
    HostChannel::commit(slot, stream);
    pump_->committed(end_, end_->sent->committed.load());
  }

  void release(int receiver, int slot, Stream stream) override {
    HostChannel::release(receiver, slot, stream);
    pump_->released(end_, end_->received->released.load());
  }

  void close() override {
    HostChannel::close();
    pump_->remove(number_);
  }

 protected:
  bool gone(int rank) const override {
    return HostChannel::gone(rank) && pump_->ended(shared_->processes.owner(rank));
  }

 private:
  std::shared_ptr<HostFabric::Shared> shared_;
  std::shared_ptr<SocketPump> pump_;
  std::shared_ptr<SocketEnd> end_;
  std::uint32_t number_;
};

}  // namespace

SocketNetwork::SocketNetwork(std::shared_ptr<HostFabric::Shared> shared)
    : shared_(std::move(shared)),
      pump_(std::make_shared<SocketPump>(shared_,
                                         connect_hosts(shared_->processes, shared_->deadline))) {}

std::shared_ptr<Channel> SocketNetwork::channel(int sender, int receiver, const Layout& layout,
                                                int slots, const std::string& name,
                                                const Party& ends) {
  return std::make_shared<SocketChannel>(shared_, pump_, ends, name, sender, receiver, layout,
                                         slots);
}

void SocketNetwork::reset(std::uint64_t) { pump_->reset(); }

void SocketNetwork::close() { pump_->close(); }

}  // namespace asyncdiff
