// The ranks of a fabric of GPUs: whose they are, on which devices, and how they reach each other.
#pragma once

#include <cstddef>
#include <map>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "asyncdiff/cuda_fabric.hpp"
#include "asyncdiff/processes.hpp"
#include "launch.hpp"
#include "links.hpp"

namespace asyncdiff {

class ControlMemory;

class Topology {
 public:
  // devices[r] is the device of rank r in its own process. Collective; throws DeviceError for a
  // device that does not exist.
  Topology(Processes all, std::vector<int> devices);

  const Processes& processes() const { return processes_; }
  bool mine(int rank) const { return processes_.mine(rank); }
  int ranks() const { return static_cast<int>(devices_.size()); }
  const std::vector<int>& devices() const { return devices_; }
  int device(int rank) const { return devices_[static_cast<std::size_t>(rank)]; }
  // Those of this process's ranks.
  std::set<int> own_devices() const;
  // The device for what belongs to no rank: of a rank of this process, or the current one where it
  // has no rank.
  int home() const;

  // Tries how ranks reach each other, in lines of `control`. Collective; throws DeviceError where
  // peer access is demanded and does not work.
  void find_links(ControlMemory& control, Transport how);

  // The rest is known once the links are found.

  const std::map<std::pair<int, int>, Link>& links() const { return links_; }
  const Link& link(int from, int to) const { return links_.at({from, to}); }
  // Whether no other rank has the device of this one.
  bool alone(int rank) const { return alone_[static_cast<std::size_t>(rank)]; }
  // How this rank's kernels are launched.
  Launch launch_of(int rank) const { return alone(rank) ? Launch::kEarly : Launch::kOrdinary; }
  // The fastest mode for a bundle, as the sender's process finds it. Collective among the ends.
  Mode fastest(const Party& ends, int sender, const std::vector<int>& receivers,
               const Layout& layout) const;

 private:
  Processes processes_;
  std::vector<int> devices_;
  std::vector<std::string> uuids_;  // of devices, by rank
  std::map<std::pair<int, int>, Link> links_;
  std::vector<bool> alone_;
};

}  // namespace asyncdiff
