#include "topology.hpp"

#include <cstddef>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "asyncdiff/errors.hpp"
#include "asyncdiff/put_costs.hpp"
#include "ipc.hpp"
#include "puts.hpp"

namespace asyncdiff {

Topology::Topology(Processes all, std::vector<int> devices)
    : processes_(std::move(all)), devices_(std::move(devices)) {
  processes_.everybody().together("find its devices", [&] {
    const int count = cuda_device_count();
    for (int rank = 0; rank < ranks(); ++rank) {
      if (!mine(rank) || (device(rank) >= 0 && device(rank) < count)) continue;
      throw DeviceError("CUDA device " + std::to_string(device(rank)) + " does not exist: there " +
                        (count == 0   ? "is none (no GPU, or no driver)"
                         : count == 1 ? "is one, device 0"
                                      : "are " + std::to_string(count) + ", from 0"));
    }
  });
}

std::set<int> Topology::own_devices() const {
  std::set<int> out;
  for (int rank = 0; rank < ranks(); ++rank) {
    if (mine(rank)) out.insert(device(rank));
  }
  return out;
}

int Topology::home() const {
  const std::set<int> all = own_devices();
  if (!all.empty()) return *all.begin();
  int device = 0;
  cudaGetDevice(&device);
  cudaGetLastError();  // who uses the device will see
  return device;
}

Mode Topology::fastest(const Party& ends, int sender, const std::vector<int>& receivers,
                       const Layout& layout) const {
  char chosen = 0;
  ends.together("measure puts", [&] {
    if (!mine(sender)) return;
    const int from = device(sender);
    const int first = receivers.front();
    bool staged = false;
    for (int rank : receivers) staged = staged || !link(sender, rank).direct;
    // A staged receiver's device need not even be visible here; any way through host memory will
    // do.
    const int to = staged ? from : device_of(uuids_[static_cast<std::size_t>(first)]);
    const PutCosts costs = put_costs(from, to, staged ? Transport::kStaged : Transport::kPeer);
    Mode best = costs.fastest(layout.nbytes, layout.specs.size(), receivers.size());
    if (layout.specs.size() > static_cast<std::size_t>(ManyPuts::kMaxPieces)) best = Mode::kCopy;
    chosen = static_cast<char>(best);
  });
  if (!processes_.several()) return static_cast<Mode>(chosen);
  const auto owner = static_cast<std::size_t>(processes_.owner(sender));
  return static_cast<Mode>(ends.all_gather(std::string(1, chosen)).at(owner).at(0));
}

}  // namespace asyncdiff
