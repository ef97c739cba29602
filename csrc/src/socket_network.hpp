// Bundles between hosts in host memory, over TCP.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "host_shared.hpp"
#include "network.hpp"

namespace asyncdiff {

class SocketPump;

// A channel has a mailbox, and counts, at both of its ends. What is pushed goes to the sender's; a
// commit sends its slot, and a release the count of releases, to the other end. So senders wait for
// slots, and receivers for bundles, in their own memory, as they do on one host; and what travels
// never waits for anything but the network. Bundles are neither encrypted nor authenticated.
class SocketNetwork final : public Network {
 public:
  // Collective among all processes, which are on several hosts.
  explicit SocketNetwork(std::shared_ptr<HostFabric::Shared> shared);

  std::string name() const override { return "sockets"; }
  std::shared_ptr<Channel> channel(int sender, int receiver, const Layout& layout, int slots,
                                   const std::string& name, const Party& ends) override;
  // Waits are those of the hosts' fabrics, where all failures are.
  void on_failure(std::function<void(int rank, const std::string& reason)>) override {}
  void abort(int, const std::string&) override {}
  void check() override {}
  bool recovers() const override { return true; }
  void reset(std::uint64_t first_bundle) override;
  // Once what was sent has arrived, which takes a deadline at most.
  void close() override;

 private:
  std::shared_ptr<HostFabric::Shared> shared_;
  std::shared_ptr<SocketPump> pump_;
};

}  // namespace asyncdiff
