// Runs device code on the CPU: the threads of a block are fibers that take turns, block after
// block.
//
// Include it before the device code, with this folder first on the include path: asyncdiff/ptx.hpp
// is then the one beside it. Fibers change where one waits for others and where one looks at memory
// that others write, in an order drawn from a seed. The clock moves by a tenth of a
// millisecond with each round of all threads.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#include "../check.hpp"

#define __device__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __shared__ static
#define __launch_bounds__(...)

struct alignas(16) uint4 {
  std::uint32_t x, y, z, w;
};

namespace on_cpu {

struct Index {
  unsigned x = 0;
};

// Threads that wait for each other: a warp, or a block.
class Group {
 public:
  struct Votes {
    bool all = true;
    unsigned ballot = 0;
  };

  explicit Group(unsigned threads) : size_(threads) {}
  Votes vote(unsigned lane, bool mine);

 private:
  unsigned size_;
  unsigned arrived_ = 0;
  unsigned rounds_ = 0;
  Votes current_;
  Votes last_;
};

class Machine {
 public:
  // A launch of so many blocks of so many threads, to its end.
  void run(unsigned blocks, unsigned threads, const std::function<void()>& kernel);
  void yield();
  Group& block() { return *block_; }
  Group& warp() { return warps_[running_ / 32]; }
  std::uint64_t now() const { return clock_; }
  // Counts what is stored to this word with release.
  void watch(const std::uint64_t* word) {
    watched_ = word;
    stores_ = 0;
  }
  void stored(const std::uint64_t* word) { stores_ += word == watched_ ? 1 : 0; }
  int stores() const { return stores_; }

 private:
  static constexpr std::size_t kStack = 128 << 10;
  struct Fiber {
    ucontext_t context;
    std::vector<std::byte> stack;
  };

  static void enter();

  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<unsigned> alive_;
  std::unique_ptr<Group> block_;
  std::vector<Group> warps_;
  ucontext_t scheduler_{};
  const std::function<void()>* kernel_ = nullptr;
  unsigned running_ = 0;
  bool ended_ = false;
  std::uint64_t clock_ = 0;
  const std::uint64_t* watched_ = nullptr;
  int stores_ = 0;
  std::mt19937 random_{1};
};

inline Machine machine;

}  // namespace on_cpu

inline on_cpu::Index threadIdx, blockIdx, gridDim;
constexpr unsigned warpSize = 32;

namespace on_cpu {

inline Group::Votes Group::vote(unsigned lane, bool mine) {
  current_.all = current_.all && mine;
  if (lane < 32 && mine) current_.ballot |= 1u << lane;
  const unsigned round = rounds_;
  if (++arrived_ == size_) {
    last_ = current_;
    current_ = {};
    arrived_ = 0;
    ++rounds_;
  }
  while (rounds_ == round) machine.yield();
  return last_;  // of this round: the next one ends only when this thread has come to it
}

inline void Machine::enter() {
  (*machine.kernel_)();
  machine.ended_ = true;
  while (true) machine.yield();
}

inline void Machine::yield() { swapcontext(&fibers_[running_]->context, &scheduler_); }

inline void Machine::run(unsigned blocks, unsigned threads, const std::function<void()>& kernel) {
  kernel_ = &kernel;
  gridDim.x = blocks;
  while (fibers_.size() < threads) {
    fibers_.push_back(std::make_unique<Fiber>());
    fibers_.back()->stack.resize(kStack);
  }
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
    block_ = std::make_unique<Group>(threads);
    warps_.assign((threads + 31) / 32, Group(32));
    alive_.clear();
    for (unsigned i = 0; i < threads; ++i) {
      Fiber& fiber = *fibers_[i];
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.data();
      fiber.context.uc_stack.ss_size = fiber.stack.size();
      fiber.context.uc_link = nullptr;
      makecontext(&fiber.context, &Machine::enter, 0);
      alive_.push_back(i);
    }
    while (!alive_.empty()) {
      std::shuffle(alive_.begin(), alive_.end(), random_);
      clock_ += 100'000;
      std::vector<unsigned> left;
      for (const unsigned i : alive_) {
        running_ = threadIdx.x = i;
        ended_ = false;
        swapcontext(&scheduler_, &fibers_[i]->context);
        if (!ended_) left.push_back(i);
      }
      alive_ = left;
    }
  }
}

}  // namespace on_cpu

inline void __syncthreads() { on_cpu::machine.block().vote(32, true); }
inline int __syncthreads_and(bool mine) { return on_cpu::machine.block().vote(32, mine).all; }
inline int __all_sync(unsigned, bool mine) {
  return on_cpu::machine.warp().vote(threadIdx.x % 32, mine).all;
}
inline unsigned __ballot_sync(unsigned, bool mine) {
  return on_cpu::machine.warp().vote(threadIdx.x % 32, mine).ballot;
}
inline int __any_sync(unsigned mask, bool mine) { return __ballot_sync(mask, mine) != 0; }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
