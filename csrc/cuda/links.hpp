// How ranks reach each other's device memory, found by trying.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "asyncdiff/processes.hpp"

namespace asyncdiff {

struct Link {
  bool direct = false;  // else staged
  bool same = false;    // the same device
  std::string reason;   // why not better
};

// The links between devices of this process, by ordered pair. Peer access is enabled and believed
// only after a write and a read-back, by a kernel and by a copy engine, in each direction; a pair
// of which one direction fails is staged both ways.
std::map<std::pair<int, int>, Link> find_links(const std::vector<int>& devices);

// One direction: a kernel and a copy engine write `kProbeBytes` from device `from` to memory that
// it sees at `target`, for another device (or process) to check. Empty, or what went wrong.
constexpr std::size_t kProbeBytes = 256;
std::string write_probe(int from, std::byte* target, std::uint32_t seed);
// Whether the probe has arrived.
bool read_probe(int device, const std::byte* memory, std::uint32_t seed);

}  // namespace asyncdiff
