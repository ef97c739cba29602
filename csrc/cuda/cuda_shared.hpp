// What the channels of a CudaFabric share with it, and outlive it with.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
#include <optional>
#include <vector>

#include "asyncdiff/cuda_fabric.hpp"
#include "asyncdiff/errors.hpp"
#include "control_memory.hpp"
#include "failure_log.hpp"
#include "reclaimer.hpp"
#include "simulated_links.hpp"
#include "topology.hpp"

namespace asyncdiff {

struct CudaFabric::Shared {
  // Collective.
  Shared(Processes all, std::vector<int> devices, double deadline_seconds, Transport how,
         const std::optional<SimulatedLink>& link);
  ~Shared();

  Topology topology;
  Reclaimer reclaimer;
  ControlMemory control;
  SimulatedLinks simulated;
  FailureLog failures;

  // Held while channels are made, and while the fabric is reset or closed: so for long, while this
  // process waits for others, and while Python runs.
  std::mutex mutex;
  std::atomic<bool> closed{false};

  void check_open() const {
    if (closed) throw Error("the fabric is closed");
  }
  // Lets others take what channels took that are gone. Under `mutex`.
  void deal_out_again(Reclaimer::Taken gone);
  // Throws the first failure, if there was one.
  void check() const;
  // Frees what the fabric has. Under `mutex`, after reclaimer.settle(). Collective.
  void close();
};

}  // namespace asyncdiff
