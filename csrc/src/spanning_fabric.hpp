// The fabric of ranks on several hosts: those of one host exchange as on a fabric of its own, the
// others over a network.
#pragma once

#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "asyncdiff/fabric.hpp"
#include "network.hpp"
#include "spanning_channel.hpp"

namespace asyncdiff {

class ASYNCDIFF_EXPORT SpanningFabric final : public Fabric {
 public:
  // `here` is the fabric of this host, made with the same processes: ranks have the same numbers in
  // both. Where it does not tell other hosts by itself of what fails in it, because devices do not,
  // it is looked at (`watched`) fifty times a second.
  SpanningFabric(std::shared_ptr<Fabric> here, std::shared_ptr<Network> network,
                 Processes processes, bool watched = false);
  ~SpanningFabric() override;

  std::string kind() const override { return here_->kind(); }
  std::map<std::pair<int, int>, std::string> links() const override;
  std::map<std::pair<int, int>, std::string> link_reasons() const override;
  std::shared_ptr<Channel> channel(int sender, const std::vector<int>& receivers,
                                   const Layout& layout, int slots, const std::string& name,
                                   Mode mode = Mode::kAuto) override;
  // What stays on this host as its fabric does it, the rest after it.
  void put_batch(const std::vector<Put>& puts, Stream stream) override;
  void abort(int rank, const std::string& reason) override;
  void check() override;
  void reset(std::uint64_t first_bundle = 0) override;
  bool recovers() const override { return network_->recovers(); }
  void close() override;

 private:
  bool made(const Channel& channel) const override;
  const Processes& processes() const override { return processes_; }
  void watch();
  void end_watch();

  std::shared_ptr<Fabric> here_;
  std::shared_ptr<Network> network_;
  Processes processes_;
  std::shared_ptr<ResetCount> resets_;  // by which channels know their fabric, too
  std::atomic<bool> closed_{false};
  std::atomic<bool> failed_{false};  // since the last reset, as far as watch() has seen
  std::atomic<bool> stop_{false};
  std::thread* watch_ = nullptr;
};

}  // namespace asyncdiff
