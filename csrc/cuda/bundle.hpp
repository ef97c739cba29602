// The tensors of a bundle as kernels take them.
#pragma once

#include <cstddef>
#include <vector>

#include "asyncdiff/layout.hpp"
#include "kernels.hpp"
#include "piece.hpp"
#include "puts.hpp"

namespace asyncdiff {

inline Piece piece_of(const Layout& layout, std::size_t index, const void* data) {
  return {static_cast<const std::byte*>(data), layout.offsets[index], layout.specs[index].nbytes};
}

// Adds a channel's next bundle, tensors[i] laid out like specs[i], to a fused put. False, and
// nothing added, without room.
template <class P>
bool add_bundle(P& puts, const SenderDevice& sender, const Layout& layout,
                const std::vector<const void*>& tensors, int slot) {
  const int c = puts.count;
  int last = puts.first_piece[c];
  if (c == P::kMaxChannels || static_cast<std::size_t>(last) + tensors.size() > P::kMaxPieces) {
    return false;
  }
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    if (layout.specs[i].nbytes > 0) puts.pieces[last++] = piece_of(layout, i, tensors[i]);
  }
  puts.sender[c] = sender;
  puts.slot[c] = slot;
  puts.first_piece[c + 1] = last;
  puts.first_block[c + 1] = puts.first_block[c] + sender.flags;
  puts.count = c + 1;
  return true;
}

// A put of one bundle. False, and nothing launched, where it has too many tensors.
inline bool launch_bundle(const SenderDevice& sender, const Layout& layout,
                          const std::vector<const void*>& tensors, int slot, Launch how,
                          cudaStream_t stream) {
  const auto launched = [&](auto puts) {
    if (!add_bundle(puts, sender, layout, tensors, slot)) return false;
    launch_put(puts, how, stream);
    return true;
  };
  return launched(SmallPut()) || launched(OnePut()) || launched(ManyPuts());
}

}  // namespace asyncdiff
