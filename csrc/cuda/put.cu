// The fused put: waits for credits, gathers the tensors of one or several bundles, stores each word
// to all receivers, and says so. Blocks do not wait for each other.
#include <cstddef>
#include <cstdint>

#include "asyncdiff/channel_kernel.hpp"
#include "check.hpp"
#include "copy.cuh"
#include "kernels.hpp"
#include "launch.hpp"

namespace asyncdiff {

namespace {

constexpr int kWarp = 32;

// Whether the block may store, found out when it first wants to: its first loads are then under way
// together with those of the counters and credits. All threads ask together.
class Start {
 public:
  __device__ Start(const SenderDevice& sender, int slot, Turn& turn)
      : sender_(sender), slot_(slot), turn_(turn) {}

  // False where it must not be: aborted, or the wrong slot.
  __device__ bool operator()() {
    if (!asked_) {
      asked_ = true;
      if (threadIdx.x < kWarp) ask();
      __syncthreads();
    }
    return turn_.go;
  }

 private:
  __device__ void ask() {
    const SenderCounters& counters = *sender_.counters;
    // All blocks read them before the last of them, which is the one that changes them, is done.
    const std::uint64_t begun = counters.begun;
    const std::uint64_t committed = counters.committed;
    const Credit credit(sender_);
    bool good = true;
    if (threadIdx.x == 0) {
      good = in_turn(sender_.guard, Operation::kBegin, slot_, begun, begun == committed,
                     sender_.slots);
    }
    good = __all_sync(~0u, good) != 0 && credit.wait(sender_, begun + 1, slot_);
    if (threadIdx.x == 0) turn_ = {begun + 1, good};
  }

  const SenderDevice& sender_;
  const int slot_;
  Turn& turn_;
  bool asked_ = false;
};

__device__ void put_part(const SenderDevice& sender, const Piece& piece, int slot, Start& start,
                         std::uint64_t from, std::uint64_t to) {
  const std::uint64_t at = sender.slot_nbytes * slot + piece.offset;
  const auto may_store = [&] { return start(); };
  copy_part(piece.memory, piece.memory, from, to, may_store, [&](std::uint64_t i, auto word) {
    for (int t = 0; t < sender.targets; ++t) {
      *reinterpret_cast<decltype(word)*>(sender.target[t] + at + i) = word;
    }
  });
}

// Up to 8 bytes; those from `nbytes` on are zero.
__device__ std::uint64_t load_padded(const std::byte* source, std::uint64_t at,
                                     std::uint64_t nbytes) {
  if (at + 8 <= nbytes && reinterpret_cast<std::uintptr_t>(source) % 8 == 0) {
    return *reinterpret_cast<const std::uint64_t*>(source + at);
  }
  std::uint64_t value = 0;
  for (int b = 0; b < 8 && at + b < nbytes; ++b) {
    value |= static_cast<std::uint64_t>(source[at + b]) << (8 * b);
  }
  return value;
}

// Stores up to the next multiple of kAlignment: the receiver looks at all words of the slot.
template <class Ask>
__device__ void put_part_inline(const SenderDevice& sender, const Piece& piece, int slot,
                                const std::uint64_t& epoch, Ask may_store, std::uint64_t from,
                                std::uint64_t to) {
  constexpr std::uint64_t kAlignment = 256;  // of Layout
  const std::uint64_t end = (to + kAlignment - 1) / kAlignment * kAlignment;
  for (std::uint64_t first = from; first < end; first += kThreads * 8) {
    const std::uint64_t i = first + threadIdx.x * 8;
    const std::uint64_t value = load_padded(piece.memory, i, piece.nbytes);
    if (!may_store()) return;
    if (i < end) write_inline(sender, slot, epoch, piece.offset + i, value);
  }
}

// Two blocks fit on a multiprocessor: one that lies in wait leaves half of its registers to others.
template <class P>
__global__ void __launch_bounds__(kThreads, 2) put_kernel(const __grid_constant__ P puts) {
  int c = 0;
  while (static_cast<int>(blockIdx.x) >= puts.first_block[c + 1]) ++c;
  const SenderDevice& sender = puts.sender[c];
  const int slot = puts.slot[c];
  const unsigned block = blockIdx.x - puts.first_block[c];
  const unsigned blocks = puts.first_block[c + 1] - puts.first_block[c];
  const bool inlined = sender.protocol == Protocol::kInline;
  __shared__ Turn turn;
  Start start(sender, slot, turn);
  ptx::wait_for_previous_kernel();
  ptx::let_next_kernel_launch();

  const int first = puts.first_piece[c];
  deal(puts.pieces + first, puts.first_piece[c + 1] - first,
       inlined ? kInlineTile : tile_of(sender.slot_nbytes), block, blocks,
       [&](const Piece& piece, std::uint64_t from, std::uint64_t to) {
         if (inlined) {
           put_part_inline(sender, piece, slot, turn.epoch, [&] { return start(); }, from, to);
         } else {
           put_part(sender, piece, slot, start, from, to);
         }
       });
  if (!start()) return;  // aborted: nothing counts until the next reset
  // Data before flag: the barrier orders the block's stores before what a thread releases.
  __syncthreads();
  if (!inlined && threadIdx.x < sender.receivers) {
    std::uint64_t* flags = sender.arrived[threadIdx.x];
    ptx::store_release_system(flags + block * kFlagStride, turn.epoch);
  }
  if (threadIdx.x != 0) return;
  SenderCounters& counters = *sender.counters;
  if (ptx::add_one_acquire_release_device(&counters.finished) + 1 == blocks) {
    counters.finished = 0;
    counters.begun = turn.epoch;
    counters.committed = turn.epoch;
  }
}

__global__ void __launch_bounds__(kThreads)
    push_inline_kernel(SenderDevice sender, Piece piece, int slot) {
  const std::uint64_t epoch = sender.counters->begun;
  deal(&piece, 1, kInlineTile, blockIdx.x, gridDim.x,
       [&](const Piece& p, std::uint64_t from, std::uint64_t to) {
         put_part_inline(sender, p, slot, epoch, [] { return true; }, from, to);
       });
}

template <class P>
void launch(const P& puts, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(puts.first_block[puts.count]);
  launch_early(put_kernel<P>, {blocks, kThreads}, stream, "launching put", puts);
}

}  // namespace

void launch_put(const SmallPut& put, cudaStream_t stream) { launch(put, stream); }
void launch_put(const OnePut& put, cudaStream_t stream) { launch(put, stream); }
void launch_put(const ManyPuts& puts, cudaStream_t stream) { launch(puts, stream); }

void launch_push_inline(const SenderDevice& sender, const Piece& piece, int slot,
                        cudaStream_t stream) {
  push_inline_kernel<<<static_cast<unsigned>(sender.flags), kThreads, 0, stream>>>(sender, piece,
                                                                                   slot);
  check_cuda(cudaGetLastError(), "launching push");
}

void preload_put() {
  preload(put_kernel<SmallPut>);
  preload(put_kernel<OnePut>);
  preload(put_kernel<ManyPuts>);
  preload(push_inline_kernel);
}

}  // namespace asyncdiff
