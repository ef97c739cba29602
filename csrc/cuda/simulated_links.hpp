// The simulated links of a fabric of GPUs, if it has any: their states, in lines of control memory.
#pragma once

#include <cstddef>
#include <map>
#include <optional>

#include "asyncdiff/simulated_link.hpp"
#include "control_memory.hpp"
#include "simulated_link.hpp"
#include "topology.hpp"

namespace asyncdiff {

class SimulatedLinks {
 public:
  // Takes lines, before anybody else takes one in host memory. Throws InvalidArgument where
  // processes are on several hosts.
  SimulatedLinks(const std::optional<SimulatedLink>& link, ControlMemory& control,
                 const Topology& topology);

  const std::optional<SimulatedLink>& link() const { return link_; }
  explicit operator bool() const { return link_.has_value(); }
  // Those of a rank of this process.
  LinkDevice of(int sender) const;

 private:
  std::optional<SimulatedLink> link_;
  const ControlMemory& control_;
  int ranks_;
  std::map<int, std::size_t> states_;  // offsets of lines, by rank
};

}  // namespace asyncdiff
