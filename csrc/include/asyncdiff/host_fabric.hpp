// The fabric of threads of one process, or of processes of one host: mailboxes are host memory.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "asyncdiff/export.hpp"
#include "asyncdiff/fabric.hpp"
#include "asyncdiff/rendezvous.hpp"
#include "asyncdiff/simulated_link.hpp"

namespace asyncdiff {

class ASYNCDIFF_EXPORT HostFabric final : public Fabric {
 public:
  // All ranks are threads of this process. With a link, gets end when a bundle would have arrived
  // by it; who sends waits for nothing.
  HostFabric(int ranks, double deadline_seconds, std::optional<SimulatedLink> link = {});

  // Rank r runs in process owners[r]. Making the fabric, reset() and all_gather() are then
  // collective among all processes, making and closing a channel among those that run its ends: all
  // of them do it, with the same arguments (else InvalidArgument in all of them), and any two
  // processes do in the same order what both have to do. The rendezvous is used while the fabric is
  // made. Mailboxes are POSIX shared memory. Throws InvalidArgument where processes are on several
  // hosts: make_host_fabric() makes what spans them.
  HostFabric(std::vector<int> owners, double deadline_seconds,
             std::shared_ptr<Rendezvous> rendezvous, std::optional<SimulatedLink> link = {});

  // The same for processes that have met, of which those on other hosts have no part in it: their
  // ranks are ends of no channel.
  HostFabric(Processes processes, double deadline_seconds, std::optional<SimulatedLink> link = {});

  std::string kind() const override { return "host"; }
  std::map<std::pair<int, int>, std::string> links() const override;
  std::map<std::pair<int, int>, std::string> link_reasons() const override;
  std::string simulated_link() const override;
  std::shared_ptr<Channel> channel(int sender, const std::vector<int>& receivers,
                                   const Layout& layout, int slots, const std::string& name,
                                   Mode mode = Mode::kAuto) override;
  void abort(int rank, const std::string& reason) override;
  void check() override;
  void reset(std::uint64_t first_bundle = 0) override;
  void close() override;

  // What channels share with their fabric and outlive it with.
  struct Shared;
  const std::shared_ptr<Shared>& shared() const { return shared_; }

 private:
  bool made(const Channel& channel) const override;
  const Processes& processes() const override;

  std::shared_ptr<Shared> shared_;
};

// The same, whatever hosts the processes are on: a HostFabric where it is one; else a fabric of
// which ranks of one host exchange as those of a HostFabric, and the others over sockets. Throws
// InvalidArgument where a link is to be simulated between hosts.
ASYNCDIFF_EXPORT std::shared_ptr<Fabric> make_host_fabric(std::vector<int> owners,
                                                          double deadline_seconds,
                                                          std::shared_ptr<Rendezvous> rendezvous,
                                                          std::optional<SimulatedLink> link = {});

}  // namespace asyncdiff
