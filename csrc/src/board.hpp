// The memory in which the processes of a fabric tell each other what is no data: calls that they
// make together, and who is gone.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>

#include "signal.hpp"

namespace asyncdiff {

// Why nothing goes on any more; the first reason stays. All zero bits: there is none.
struct BoardNote {
  enum Kind : std::uint32_t { kEnded = 1, kLeft = 2, kLate = 3, kDiffered = 4, kGaveUp = 5 };
  enum State : std::uint32_t { kNone = 0, kBeingWritten = 1, kThere = 2 };

  std::atomic<std::uint32_t> state;
  std::uint32_t kind;
  std::int32_t process;  // whom it is about
  char text[1000];
};

// What a process does now, for those that wait for it, and how often it has said so. One that reads
// while another text is written gets some of both.
struct BoardStep {
  static constexpr std::size_t kWords = 12;

  std::atomic<std::uint32_t> count;
  std::atomic<std::uint64_t> words[kWords];

  // What is longer is cut.
  void say(const std::string& text) {
    std::uint64_t whole[kWords] = {};
    std::memcpy(whole, text.data(), std::min(text.size(), sizeof whole));
    for (std::size_t i = 0; i < kWords; ++i) words[i].store(whole[i], std::memory_order_relaxed);
    count.fetch_add(1, std::memory_order_release);
  }
  std::string text() const {
    char whole[kWords * sizeof(std::uint64_t) + 1] = {};
    for (std::size_t i = 0; i < kWords; ++i) {
      const std::uint64_t word = words[i].load(std::memory_order_relaxed);
      std::memcpy(whole + i * sizeof word, &word, sizeof word);
    }
    return whole;
  }
};

// One for each process.
struct alignas(128) BoardMember {
  Signal changed;  // something for this process lies in a ring, has left one, or somebody is gone
  std::atomic<std::uint32_t> left;   // whether it has closed its fabric, or dropped it
  std::atomic<std::uint32_t> beats;  // grows while it lives, where somebody needs that
  BoardStep step;                    // of a process of this host
};

// Bytes from one process to another: a queue with one writer and one reader.
struct BoardRing {
  static constexpr std::size_t kBytes = 4096 - 2 * 128;

  alignas(128) std::atomic<std::uint64_t> written;
  alignas(128) std::atomic<std::uint64_t> read;
  alignas(128) std::byte data[kBytes];
};
static_assert(sizeof(BoardRing) == 4096);

// Where they lie in zeroed memory that all processes share.
class Board {
 public:
  static std::size_t nbytes(int processes) {
    const auto n = static_cast<std::size_t>(processes);
    return kHead + round_up(n * sizeof(BoardMember)) + n * n * sizeof(BoardRing);
  }

  Board() = default;
  Board(std::byte* memory, int processes) : memory_(memory), processes_(processes) {}

  BoardNote& note() const { return *reinterpret_cast<BoardNote*>(memory_); }
  // Whether some process cannot be watched but by its beats.
  std::atomic<std::uint32_t>& beats_wanted() const {
    return *reinterpret_cast<std::atomic<std::uint32_t>*>(memory_ + sizeof(BoardNote));
  }
  BoardMember& member(int process) const {
    return reinterpret_cast<BoardMember*>(memory_ + kHead)[process];
  }
  BoardRing& ring(int from, int to) const {
    const std::size_t members = static_cast<std::size_t>(processes_) * sizeof(BoardMember);
    return reinterpret_cast<BoardRing*>(memory_ + kHead +
                                        round_up(members))[from * processes_ + to];
  }

 private:
  static constexpr std::size_t kHead = 4096;
  static_assert(sizeof(BoardNote) + sizeof(std::uint32_t) <= kHead);
  static std::size_t round_up(std::size_t bytes) { return (bytes + 4095) / 4096 * 4096; }

  std::byte* memory_ = nullptr;
  int processes_ = 0;
};

}  // namespace asyncdiff
