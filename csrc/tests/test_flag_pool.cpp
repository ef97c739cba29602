// Lines are dealt out once, and again after they were given back.
#include <cstddef>
#include <random>
#include <utility>
#include <vector>

#include "../src/flag_pool.hpp"
#include "asyncdiff/errors.hpp"
#include "check.hpp"

using asyncdiff::Error;
using asyncdiff::FlagPool;

namespace {

constexpr std::size_t kAll = FlagPool::kBytes / FlagPool::kLine;

void all_can_be_taken_once() {
  FlagPool lines;
  CHECK(lines.take() == 0 && lines.take(3) == 128 && lines.take() == 512);
  CHECK(lines.take(kAll - 5) == 640);
  CHECK_THROWS(lines.take(), Error);
  lines.give_back(128, 3);
  CHECK_THROWS(lines.take(4), Error);
  CHECK(lines.take() == 128 && lines.take(2) == 256);
  CHECK_THROWS(lines.take(), Error);
  CHECK(lines.used() == FlagPool::kBytes);
}

// In whatever order lines come back, they are one piece in the end, and nobody has another's.
void pieces_grow_together() {
  std::mt19937 random(1);
  FlagPool lines;
  std::vector<bool> taken(kAll, false);
  std::vector<std::pair<std::size_t, std::size_t>> held;
  const auto give_back = [&](std::size_t which) {
    const auto [first, count] = held[which];
    for (std::size_t i = 0; i < count; ++i) taken[first / FlagPool::kLine + i] = false;
    lines.give_back(first, count);
    held[which] = held.back();
    held.pop_back();
  };
  for (int n = 0; n < 20000; ++n) {
    if (!held.empty() && random() % 2 == 0) {
      give_back(random() % held.size());
      continue;
    }
    const std::size_t count = random() % 2 == 0 ? 1 : 32;
    const std::size_t first = lines.take(count);
    for (std::size_t i = 0; i < count; ++i) {
      const std::size_t line = first / FlagPool::kLine + i;
      CHECK(line < kAll && !taken[line]);
      taken[line] = true;
    }
    held.emplace_back(first, count);
  }
  while (!held.empty()) give_back(held.size() - 1);
  CHECK(lines.take(lines.used() / FlagPool::kLine) == 0);
}

}  // namespace

int main() {
  all_can_be_taken_once();
  pieces_grow_together();
}
