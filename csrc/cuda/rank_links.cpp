// How ranks of a CudaFabric reach each other: what each process tries, and what all agree on.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "asyncdiff/errors.hpp"
#include "control_memory.hpp"
#include "ipc.hpp"
#include "links.hpp"
#include "topology.hpp"

namespace asyncdiff {

namespace {

using Pair = std::pair<int, int>;
using Reasons = std::map<Pair, std::string>;  // empty where a direction works

// "0 1 why not" lines, for a rendezvous.
std::string to_text(const Reasons& reasons) {
  std::string out;
  for (const auto& [pair, reason] : reasons) {
    out += std::to_string(pair.first) + " " + std::to_string(pair.second) + " " + reason + "\n";
  }
  return out;
}

void add_from_text(const std::string& text, Reasons& reasons) {
  std::size_t at = 0;
  while (at < text.size()) {
    const std::size_t end = text.find('\n', at);
    const char* line = text.c_str() + at;
    char* rest = nullptr;
    const int from = static_cast<int>(std::strtol(line, &rest, 10));
    const int to = static_cast<int>(std::strtol(rest, &rest, 10));
    const auto begin = static_cast<std::size_t>(rest - text.c_str()) + 1;
    std::string& reason = reasons[{from, to}];
    if (reason.empty()) reason = text.substr(begin, end - begin);
    at = end + 1;
  }
}

std::uint32_t seed_of(int from, int to) {
  return 1000u * static_cast<std::uint32_t>(from + 1) +
         100000u * static_cast<std::uint32_t>(to + 1);
}

}  // namespace

void Topology::find_links(ControlMemory& control, Transport how) {
  const Party& everybody = processes_.everybody();

  // Everybody's devices, and handles of their lines.
  uuids_.resize(devices_.size());
  std::vector<std::string> handle(devices_.size());
  std::string exported;
  const std::size_t handle_size = processes_.several() ? kDeviceHandleBytes : 0;
  everybody.together("export device memory", [&] {
    for (int rank = 0; rank < ranks(); ++rank) {
      if (!mine(rank)) continue;
      exported += uuid_of(device(rank));
      if (processes_.several()) exported += export_device(control.own(rank));
    }
  });
  const auto exports = everybody.all_gather(exported);
  std::vector<std::size_t> read(exports.size(), 0);
  for (int rank = 0; rank < ranks(); ++rank) {
    const auto owner = static_cast<std::size_t>(processes_.owner(rank));
    const auto r = static_cast<std::size_t>(rank);
    uuids_[r] = exports[owner].substr(read[owner], 16);
    handle[r] = exports[owner].substr(read[owner] + 16, handle_size);
    read[owner] += 16 + handle_size;
  }

  // What this process's ranks can write.
  Reasons tried;
  std::vector<int> local;
  for (int rank = 0; rank < ranks(); ++rank) {
    if (mine(rank)) local.push_back(device(rank));
  }
  everybody.together("try its links", [&] {
    if (how == Transport::kStaged) return;
    const auto between = asyncdiff::find_links(local);
    for (int a = 0; a < ranks(); ++a) {
      if (!mine(a)) continue;
      for (int b = 0; b < ranks(); ++b) {
        if (a == b || !processes_.here(b)) continue;
        std::string& reason = tried[{a, b}];
        const std::string& theirs = uuids_[static_cast<std::size_t>(b)];
        if (mine(b)) {
          if (device(a) != device(b)) reason = between.at({device(a), device(b)}).reason;
          continue;
        }
        if (device_of(theirs) < 0) {
          reason = "the device of rank " + std::to_string(b) + " is not visible to process " +
                   std::to_string(processes_.process()) + ": do not hide it (CUDA_VISIBLE_DEVICES)";
          continue;
        }
        try {
          Buffer& seen = control.imported(b, device(a));
          if (seen.data == nullptr) {
            seen = import_device(handle[static_cast<std::size_t>(b)], device(a), FlagPool::kBytes);
          }
          reason = write_probe(device(a), seen.data + control.probe(a), seed_of(a, b));
        } catch (const CudaError& error) {
          reason = error.what();
        }
      }
    }
  });
  Reasons all;
  for (const std::string& text : everybody.all_gather(to_text(tried))) add_from_text(text, all);

  // What has arrived here.
  Reasons lost;
  everybody.together("read its links back", [&] {
    for (const auto& [pair, reason] : all) {
      const auto& [a, b] = pair;
      if (!reason.empty() || mine(a) || !mine(b)) continue;
      const std::byte* memory = control.own(b).data + control.probe(a);
      if (!read_probe(device(b), memory, seed_of(a, b))) {
        lost[pair] = "a write from rank " + std::to_string(a) + " to rank " + std::to_string(b) +
                     " was lost";
      }
    }
  });
  for (const std::string& text : everybody.all_gather(to_text(lost))) add_from_text(text, all);

  for (int a = 0; a < ranks(); ++a) {
    for (int b = 0; b < ranks(); ++b) {
      if (a == b || processes_.host(a) != processes_.host(b)) continue;
      Link& link = links_[{a, b}];
      link.same = uuids_[static_cast<std::size_t>(a)] == uuids_[static_cast<std::size_t>(b)];
      if (how == Transport::kStaged) {
        link.reason = "staging was asked for";
        continue;
      }
      // Data goes one way and credits the other: both have to work.
      link.reason = all[{a, b}].empty() ? all[{b, a}] : all[{a, b}];
      link.direct = link.reason.empty();
      if (!link.direct && how == Transport::kPeer) {
        throw DeviceError("peer access was asked for, but " + link.reason +
                          "; transport 'auto' stages through host memory instead");
      }
    }
  }
  for (const std::string& uuid : uuids_) {
    alone_.push_back(std::count(uuids_.begin(), uuids_.end(), uuid) == 1);
  }
  control.reset(0);  // of probes
  everybody.barrier();
}

}  // namespace asyncdiff
