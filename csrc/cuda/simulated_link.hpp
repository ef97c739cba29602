// A simulated link as kernels see it. Also compiled for the CPU, by a test.
#pragma once

#include <cstdint>

#include "asyncdiff/simulated_link.hpp"

namespace asyncdiff {

// What is under way from one rank to another, by the clock of the sender's device, in whose memory
// it lies. Nanoseconds.
struct alignas(128) LinkState {
  std::uint64_t free;    // when the last piece has left
  std::uint64_t looked;  // until when those were counted that share the link
};

// The links of one sender.
struct LinkDevice {
  LinkState* states;  // by receiving rank
  // Whether something is under way, by (sending, receiving) rank; in host memory, for all to see.
  // Clocks of devices differ, so that only this is compared. Null where nothing is shared.
  std::uint64_t* busy;
  int rank;
  int ranks;
  SimulatedLink::Sharing sharing;
  std::uint64_t latency_ns;
};

}  // namespace asyncdiff
