// What the channels of a CudaFabric share with it.
#pragma once

#include <cstdint>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "asyncdiff/channel_device.hpp"
#include "asyncdiff/cuda_fabric.hpp"
#include "asyncdiff/errors.hpp"
#include "cuda_memory.hpp"
#include "links.hpp"

namespace asyncdiff {

struct CudaFabric::Shared {
  std::vector<int> devices;  // by rank
  double deadline = 0;
  Transport transport = Transport::kAuto;
  std::map<std::pair<int, int>, Link> links;  // by device

  std::mutex mutex;  // guards all below
  bool closed = false;
  ControlLines lines;
  std::uint64_t* abort_word = nullptr;
  std::optional<Aborted> aborted;  // if the host did it

  // One end of a channel: what its failure record belongs to.
  struct End {
    FailureRecord* record;
    int rank;
    std::string channel;
  };
  std::vector<End> ends;

  // How rank a writes rank b's memory. Staging, where asked for, takes in ranks that share a
  // device, so that it can be tried on one.
  Link link(int a, int b) const {
    if (transport == Transport::kStaged) return {false, "staging was asked for"};
    const int from = devices[static_cast<std::size_t>(a)];
    const int to = devices[static_cast<std::size_t>(b)];
    return from == to ? Link{true, ""} : links.at({from, to});
  }
  // With the mutex held: a guard for one end.
  Guard new_end(int rank, const std::string& channel);
  void check_open() const {
    if (closed) throw Error("the fabric is closed");
  }
};

}  // namespace asyncdiff
