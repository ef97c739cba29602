#include "nccl_network.hpp"

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "nccl_channel.hpp"
#include "nccl_shared.hpp"

namespace asyncdiff {

namespace {

class NcclNetwork final : public Network {
 public:
  explicit NcclNetwork(std::shared_ptr<NcclShared> shared) : shared_(std::move(shared)) {}
  ~NcclNetwork() override { on_failure({}); }

  std::string name() const override { return "nccl"; }

  std::shared_ptr<Channel> channel(int sender, int receiver, const Layout& layout, int slots,
                                   const std::string& name, const Party& ends) override {
    shared_->check_open();
    const std::lock_guard lock(shared_->calls());
    return std::make_shared<NcclChannel>(shared_, ends, name, sender, receiver, layout, slots);
  }

  void on_failure(std::function<void(int, const std::string&)> tell) override {
    shared_->on_failure(std::move(tell));
  }
  void abort(int rank, const std::string& reason) override { shared_->abort(rank, reason); }
  void check() override {
    shared_->check_open();
    shared_->check();
  }
  // Communicators that were aborted are gone.
  bool recovers() const override { return false; }

  void reset(std::uint64_t first_bundle) override {
    const std::lock_guard lock(shared_->calls());
    shared_->check_open();
    shared_->reset(first_bundle);
  }
  void close() override {
    const std::lock_guard lock(shared_->calls());
    shared_->close();
  }

 private:
  std::shared_ptr<NcclShared> shared_;
};

}  // namespace

std::shared_ptr<Network> make_nccl_network(const Processes& processes, std::vector<int> devices,
                                           double deadline_seconds,
                                           std::map<int, Wire> connections) {
  return std::make_shared<NcclNetwork>(std::make_shared<NcclShared>(
      processes, std::move(devices), deadline_seconds, std::move(connections)));
}

}  // namespace asyncdiff
