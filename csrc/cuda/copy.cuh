// How a block copies a part of a tensor. Also compiled for the CPU, by a test.
#pragma once

#include <cstddef>
#include <cstdint>

#include "tile_scheduler.cuh"

namespace asyncdiff {

constexpr int kWordsAtOnce = 4;  // that a thread has under way

// Words of a tile that the threads of a block have loaded, and not stored yet.
template <class Word>
struct Loaded {
  static constexpr std::uint64_t kStep = kThreads * sizeof(Word);

  Word words[kWordsAtOnce];

  __device__ void load(const std::byte* source, std::uint64_t first, std::uint64_t to) {
#pragma unroll
    for (int n = 0; n < kWordsAtOnce; ++n) {
      if (first + n * kStep < to) {
        words[n] = *reinterpret_cast<const Word*>(source + first + n * kStep);
      }
    }
  }
  // store(offset, word)
  template <class Store>
  __device__ void store(std::uint64_t first, std::uint64_t to, Store store) const {
#pragma unroll
    for (int n = 0; n < kWordsAtOnce; ++n) {
      if (first + n * kStep < to) store(first + n * kStep, words[n]);
    }
  }
};

// Loads each word once and gives it to store(offset, word). Several loads are under way at a time:
// what waits for memory is what limits a few blocks.
template <class Word, class Store>
__device__ void copy_words(const std::byte* source, std::uint64_t from, std::uint64_t to,
                           Store store) {
  for (std::uint64_t i = from + threadIdx.x * sizeof(Word); i < to;
       i += kWordsAtOnce * Loaded<Word>::kStep) {
    Loaded<Word> loaded;
    loaded.load(source, i, to);
    loaded.store(i, to, store);
  }
}

// The bytes [from, to); `from` is a multiple of 16. `address` is the less aligned one of both
// ends; slots are always aligned.
template <class Store>
__device__ void copy_part(const std::byte* source, const std::byte* address, std::uint64_t from,
                          std::uint64_t to, Store store) {
  const auto alignment = reinterpret_cast<std::uintptr_t>(address);
  std::uint64_t middle = from;
  if (alignment % sizeof(uint4) == 0) {
    middle = to / sizeof(uint4) * sizeof(uint4);
    copy_words<uint4>(source, from, middle, store);
  } else if (alignment % sizeof(std::uint32_t) == 0) {
    middle = to / sizeof(std::uint32_t) * sizeof(std::uint32_t);
    copy_words<std::uint32_t>(source, from, middle, store);
  }
  copy_words<std::uint8_t>(source, middle, to, store);
}

}  // namespace asyncdiff
