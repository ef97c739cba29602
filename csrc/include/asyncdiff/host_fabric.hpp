// The fabric of the threads of one process: mailboxes are host memory, waits are condition
// variables.
#pragma once

#include <condition_variable>
#include <memory>
#include <mutex>
#include <optional>

#include "asyncdiff/errors.hpp"
#include "asyncdiff/fabric.hpp"

namespace asyncdiff {

class HostFabric final : public Fabric {
 public:
  HostFabric(int ranks, double deadline_seconds);

  std::string kind() const override { return "host"; }
  std::map<std::pair<int, int>, std::string> links() const override;
  std::shared_ptr<Channel> channel(int sender, const std::vector<int>& receivers,
                                   const Layout& layout, int slots,
                                   const std::string& name) override;
  void abort(int rank, const std::string& reason) override;
  void check() override;
  void reset() override;
  void close() override;

  // What channels share with their fabric and outlive it with.
  struct Shared;

 private:
  std::shared_ptr<Shared> shared_;
};

}  // namespace asyncdiff
