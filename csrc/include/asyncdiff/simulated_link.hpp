// A link between ranks as slow as one says, whatever there is: for tests and benchmarks.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>

#include "asyncdiff/export.hpp"

namespace asyncdiff {

// A piece of a bundle leaves when the link is free, takes its bytes over the bandwidth, and arrives
// one latency later; a bundle is there when its last piece has arrived. Each ordered pair of ranks
// has a link of its own, unless both directions of a pair, or all pairs, share one.
struct SimulatedLink {
  enum class Sharing : int { kNone = 0, kBoth = 1, kAll = 2 };

  double gb_per_s;    // 10^9 bytes a second
  double latency_us;  // microseconds
  Sharing sharing = Sharing::kNone;

  // Nanoseconds.
  std::uint64_t latency() const { return static_cast<std::uint64_t>(latency_us * 1e3); }
  std::uint64_t time_of(std::size_t nbytes) const {
    return static_cast<std::uint64_t>(static_cast<double>(nbytes) / gb_per_s);
  }
  // As simulated_link_from() takes it: "25GB/s,10us", "6GB/s,10us,all".
  ASYNCDIFF_EXPORT std::string describe() const;
};

// BANDWIDTH,LATENCY or BANDWIDTH,LATENCY,both or BANDWIDTH,LATENCY,all: bandwidths in GB/s, MB/s,
// kB/s, Gb/s or Mb/s, latencies in ns, us (or µs) or ms. None: "" and "off", in any case and with
// blanks around it. Throws InvalidArgument for anything else, saying what there is.
ASYNCDIFF_EXPORT std::optional<SimulatedLink> simulated_link_from(const std::string& text);

// Throws InvalidArgument where nothing that is sent would arrive before a wait for it ends.
ASYNCDIFF_EXPORT void check_latency(const std::optional<SimulatedLink>& link,
                                    double deadline_seconds);

}  // namespace asyncdiff
