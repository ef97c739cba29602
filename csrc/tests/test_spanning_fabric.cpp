// What a fabric that spans hosts makes of failures, here or on its network.
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>

#include "../src/spanning_fabric.hpp"
#include "asyncdiff/errors.hpp"
#include "asyncdiff/host_fabric.hpp"
#include "check.hpp"

using namespace asyncdiff;

namespace {

// Carries nothing, and fails when it is told to.
class TestNetwork final : public Network {
 public:
  std::string name() const override { return "test"; }
  std::shared_ptr<Channel> channel(int, int, const Layout&, int, const std::string&,
                                   const Party&) override {
    return nullptr;
  }
  void on_failure(std::function<void(int, const std::string&)> tell) override {
    tell_ = std::move(tell);
  }
  void abort(int rank, const std::string& reason) override {
    if (!failure) failure = [rank, reason] { throw Aborted(rank, reason); };
  }
  void check() override {
    if (failure) failure();
  }
  bool recovers() const override { return false; }
  void reset(std::uint64_t) override {}
  void close() override {}

  void fail(const std::function<void()>& how) {
    failure = how;
    tell_(0, "the network has failed");
  }

  std::function<void()> failure;

 private:
  std::function<void(int, const std::string&)> tell_;
};

struct Spanning {
  std::shared_ptr<HostFabric> here = std::make_shared<HostFabric>(2, 0.05);
  std::shared_ptr<TestNetwork> network = std::make_shared<TestNetwork>();
  SpanningFabric fabric{here, network, Processes(2)};
};

void what_fails_on_the_network_is_thrown_and_not_that_it_ended_the_rest() {
  Spanning one;
  one.fabric.check();
  one.network->fail([] { throw NcclError("the cable is out"); });
  CHECK_THROWS(one.here->check(), Aborted);
  CHECK_THROWS(one.fabric.check(), NcclError);
  CHECK_THROWS(one.fabric.reset(0), NcclError);
}

void what_fails_here_is_thrown_though_the_network_was_aborted() {
  Spanning one;
  const auto channel = one.fabric.channel(0, {1}, Layout({TensorSpec("int8", {4})}), 1, "");
  CHECK_THROWS(channel->get(1, 0, 0), ExchangeTimeout);
  one.network->abort(1, "the fabric of a host has failed");
  CHECK_THROWS(one.fabric.check(), ExchangeTimeout);
}

void an_abort_is_one() {
  Spanning one;
  one.fabric.abort(1, "enough");
  CHECK_THROWS(one.fabric.check(), Aborted);
}

}  // namespace

int main() {
  what_fails_on_the_network_is_thrown_and_not_that_it_ended_the_rest();
  what_fails_here_is_thrown_though_the_network_was_aborted();
  an_abort_is_one();
}
