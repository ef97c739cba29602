// The network of GPUs: NCCL between ranks on different hosts, however it connects them.
#pragma once

#include <map>
#include <memory>
#include <vector>

#include "asyncdiff/processes.hpp"
#include "frames.hpp"
#include "network.hpp"

namespace asyncdiff {

// devices[r] is the device of rank r in its own process; connections[p] leads to process p, of
// another host, and is used for nothing else. Collective among all processes; throws NcclError in
// all where NCCL is missing in one, DeviceError for a device that does not exist.
std::shared_ptr<Network> make_nccl_network(const Processes& processes, std::vector<int> devices,
                                           double deadline_seconds,
                                           std::map<int, Wire> connections);

}  // namespace asyncdiff
