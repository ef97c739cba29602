// A million exchanges with random sizes and delays, every payload checked; and the same without
// waiting, to show that the check would notice.
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "asyncdiff/host_fabric.hpp"
#include "check.hpp"

using namespace asyncdiff;

namespace {

constexpr int kChannels = 8;
constexpr int kSlots = 3;
constexpr std::size_t kLargest = 4096;  // words

// What bundle n of a channel holds at word i.
std::uint64_t word_of(int channel, std::uint64_t n, std::size_t i) {
  std::uint64_t x = n * 0x9e3779b97f4a7c15u + static_cast<std::uint64_t>(channel) * 1000003u + i;
  x ^= x >> 29;
  return x * 0xbf58476d1ce4e5b9u;
}

// Both ends draw the same channels in the same order from the same seed.
class Sequence {
 public:
  explicit Sequence(unsigned seed) : random_(seed) {}
  int next() { return static_cast<int>(random_() % kChannels); }

 private:
  std::mt19937 random_;
};

void pause(std::mt19937& random) {
  if (random() % 20000 == 0) std::this_thread::sleep_for(std::chrono::microseconds(random() % 200));
}

// Returns how many bundles were not what they should be.
int exchange(std::uint64_t bundles, bool wait) {
  HostFabric fabric(2, 30.0);
  std::mt19937 sizes(7);
  std::vector<std::size_t> words;
  std::vector<std::shared_ptr<Channel>> channels;
  for (int c = 0; c < kChannels; ++c) {
    // Mostly small, one of them large.
    words.push_back(c == 0 ? kLargest : 1 + sizes() % 64);
    const auto count = static_cast<std::int64_t>(words.back());
    channels.push_back(fabric.channel(0, {1}, Layout({TensorSpec("uint64", {count})}), kSlots,
                                      "channel " + std::to_string(c)));
  }

  std::thread sender([&] {
    Sequence sequence(1);
    std::mt19937 random(2);
    std::vector<std::uint64_t> sent(kChannels);
    std::vector<std::uint64_t> data(kLargest);
    for (std::uint64_t n = 0; n < bundles; ++n) {
      const int c = sequence.next();
      const auto index = static_cast<std::size_t>(c);
      for (std::size_t i = 0; i < words[index]; ++i) data[i] = word_of(c, sent[index], i);
      const int slot = static_cast<int>(sent[index]++ % kSlots);
      channels[index]->begin(slot, 0);
      channels[index]->push(0, data.data(), slot, 0);
      channels[index]->commit(slot, 0);
      pause(random);
    }
  });

  Sequence sequence(1);
  std::mt19937 random(3);
  std::vector<std::uint64_t> got(kChannels);
  int wrong = 0;
  for (std::uint64_t n = 0; n < bundles; ++n) {
    const int c = sequence.next();
    const auto index = static_cast<std::size_t>(c);
    const int slot = static_cast<int>(got[index] % kSlots);
    if (wait) channels[index]->get(1, slot, 0);
    const std::byte* memory = channels[index]->slot(1, slot).data;
    bool right = true;
    for (std::size_t i = 0; i < words[index]; ++i) {
      std::uint64_t word = 0;
      std::memcpy(&word, memory + 8 * i, 8);
      right = right && word == word_of(c, got[index], i);
    }
    wrong += right ? 0 : 1;
    ++got[index];
    // Without having waited there is still a bundle to take off the ring, or the sender would stop.
    if (!wait) channels[index]->get(1, slot, 0);
    channels[index]->release(1, slot, 0);
    pause(random);
  }
  sender.join();
  fabric.check();
  return wrong;
}

}  // namespace

int main() {
  CHECK(exchange(1'000'000, true) == 0);
  CHECK(exchange(20'000, false) > 0);
}
