#include "blocks.hpp"
#include "kernels.hpp"
#include "launch.hpp"
#include "put.cuh"

namespace asyncdiff {

namespace {

template <class P>
void launch_any(const P& puts, Launch how, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(puts.first_block[puts.count]);
  launch<put_kernel<P>>(how, {blocks, kThreads}, stream, "launching put", puts);
}

}  // namespace

void launch_put(const SmallPut& put, Launch how, cudaStream_t stream) {
  launch_any(put, how, stream);
}
void launch_put(const OnePut& put, Launch how, cudaStream_t stream) {
  launch_any(put, how, stream);
}
void launch_put(const ManyPuts& puts, Launch how, cudaStream_t stream) {
  launch_any(puts, how, stream);
}

void launch_push(const SenderDevice& sender, const Piece& piece, int slot, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(flags_for(piece.nbytes, sender.flags));
  launch<push_kernel>(Launch::kOrdinary, {blocks, kThreads}, stream, "launching push", sender,
                      piece, slot);
}

void preload_put() {
  preload<put_kernel<SmallPut>>();
  preload<put_kernel<OnePut>>();
  preload<put_kernel<ManyPuts>>();
  preload<push_kernel>();
}

}  // namespace asyncdiff
