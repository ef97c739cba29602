#include "reclaimer.hpp"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstddef>
#include <mutex>
#include <set>
#include <utility>
#include <vector>

#include "device_guard.hpp"

namespace asyncdiff {

namespace {

// What fabrics left that were not closed, and the devices that may still be at work on it.
struct Left {
  std::set<int> devices;
  std::vector<Buffer> buffers;
};

std::mutex left_mutex;  // guards both

std::vector<Left>& left_behind() {
  static auto* all = new std::vector<Left>;
  return *all;
}

std::vector<Buffer>& abandoned() {
  static auto* buffers = new std::vector<Buffer>;
  return *buffers;
}

void move_to(std::vector<Buffer>& where, std::vector<Buffer>& from) {
  for (Buffer& buffer : from) where.push_back(std::move(buffer));
  from.clear();
}

// Freeing memory waits for all that its device was given to do. cudaDeviceSynchronize would, too,
// but break a capture that another thread has under way.
void wait_for(const std::set<int>& devices) noexcept {
  for (int device : devices) {
    quietly_on(device, [] {
      void* memory = nullptr;
      if (cudaMalloc(&memory, FlagPool::kBytes) == cudaSuccess) {
        cudaFree(memory);
      } else {
        cudaDeviceSynchronize();  // no memory left
      }
    });  // errors of kernels show again where somebody looks for them
  }
}

}  // namespace

Reclaimer::Reclaimer(const Topology& topology) : topology_(topology) {
  std::vector<Left> all;
  {
    const std::lock_guard lock(left_mutex);  // not while waiting: destructors take it
    all.swap(left_behind());
  }
  for (const Left& left : all) wait_for(left.devices);
}

void Reclaimer::settle() const noexcept {
  try {
    wait_for(topology_.own_devices());
  } catch (...) {
  }
}

void Reclaimer::retire(std::vector<Buffer> memory, Taken taken) {
  const std::lock_guard lock(mutex_);
  move_to(memory_, memory);
  taken_.lines.insert(taken_.lines.end(), taken.lines.begin(), taken.lines.end());
  taken_.records.insert(taken_.records.end(), taken.records.begin(), taken.records.end());
}

Reclaimer::Taken Reclaimer::free_retired() {
  std::vector<Buffer> memory;
  Taken taken;
  {
    const std::lock_guard lock(mutex_);
    memory.swap(memory_);
    std::swap(taken, taken_);
  }
  if (!memory.empty() || !taken.lines.empty()) settle();
  return taken;
}

void Reclaimer::let_go(const std::vector<std::byte*>& memory, Kept which) {
  std::vector<Buffer>& kept = which == Kept::kImported ? imported_ : exported_;
  const auto named = [&](const Buffer& buffer) {
    return std::find(memory.begin(), memory.end(), buffer.data) != memory.end();
  };
  kept.erase(std::remove_if(kept.begin(), kept.end(), named), kept.end());
}

void Reclaimer::release(std::vector<Buffer> exported, bool unmapped_everywhere) {
  move_to(exported, exported_);
  if (!unmapped_everywhere) abandon(std::move(exported));
  const std::lock_guard lock(mutex_);
  memory_.clear();
  taken_ = {};
}

void Reclaimer::leave(std::vector<Buffer> exported, std::vector<Buffer> local) noexcept {
  try {
    Left left{topology_.own_devices(), {}};
    move_to(exported, exported_);
    move_to(left.buffers, imported_);
    move_to(left.buffers, local);
    move_to(left.buffers, memory_);
    // What others have mapped is not to be freed before they unmap it, which nobody will tell.
    if (topology_.processes().several()) {
      abandon(std::move(exported));
    } else {
      move_to(left.buffers, exported);
    }
    const std::lock_guard lock(left_mutex);
    left_behind().push_back(std::move(left));
  } catch (...) {
  }
}

void Reclaimer::abandon(std::vector<Buffer> exported) {
  const std::lock_guard lock(left_mutex);
  move_to(abandoned(), exported);
}

}  // namespace asyncdiff
