// How devices reach each other, found by trying.
#pragma once

#include <map>
#include <string>
#include <utility>
#include <vector>

namespace asyncdiff {

struct Link {
  bool direct = false;  // else staged
  std::string reason;   // why not better
};

// The link of every ordered pair of different devices. Peer access is enabled and believed only
// after a write and a read-back, by a kernel and by a copy engine, in each direction; a pair of
// which one direction fails is staged both ways.
// Throws DeviceError if that happens although peer access is demanded.
std::map<std::pair<int, int>, Link> find_links(const std::vector<int>& devices, bool demanded);

}  // namespace asyncdiff
