// What a fused put is given: bundles of several channels of one sender.
#pragma once

#include "asyncdiff/channel_device.hpp"
#include "piece.hpp"

namespace asyncdiff {

// Kernel parameters, so both sizes are bounded.
template <int kChannels, int kPieces>
struct Puts {
  static constexpr int kMaxChannels = kChannels;
  static constexpr int kMaxPieces = kPieces;

  int count = 0;
  SenderDevice sender[kChannels];
  int slot[kChannels];
  int first_piece[kChannels + 1] = {};
  int first_block[kChannels + 1] = {};
  Piece pieces[kPieces];
};
using SmallPut = Puts<1, 8>;    // the fewer bytes, the faster the launch
using OnePut = Puts<1, 96>;     // up to 4 KiB
using ManyPuts = Puts<8, 320>;  // up to 32 KiB

}  // namespace asyncdiff
