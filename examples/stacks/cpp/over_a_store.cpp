// Processes that have a key-value store already exchange bundles in a ring. Start each of them with
// what launchers set:
//
//   RANK=0 WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=29400 ./over_a_store   (and RANK=1)
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "asyncdiff/host_fabric.hpp"
#include "key_value_store.hpp"
#include "store_rendezvous.hpp"

namespace {

constexpr double kDeadline = 30.0;
constexpr int kSlots = 2;
constexpr int kBundles = 1000;
constexpr std::int64_t kCount = 257;

std::string said(const char* name) {
  const char* value = std::getenv(name);
  if (value == nullptr) throw std::runtime_error(std::string(name) + " is not set");
  return value;
}

void exchange(asyncdiff::Fabric& fabric, int rank) {
  const asyncdiff::Layout layout({asyncdiff::TensorSpec("int64", {kCount})});
  const int ranks = fabric.ranks();
  std::vector<std::shared_ptr<asyncdiff::Channel>> ring;
  for (int r = 0; r < ranks; ++r) {
    ring.push_back(fabric.channel(r, {(r + 1) % ranks}, layout, kSlots, "to the next"));
  }
  const int before = (rank + ranks - 1) % ranks;
  std::vector<std::int64_t> numbers(kCount);
  for (int n = 0; n < kBundles; ++n) {
    numbers.assign(kCount, rank * kBundles + n);
    ring[static_cast<std::size_t>(rank)]->put({numbers.data()}, n % kSlots, 0);

    asyncdiff::Channel& coming = *ring[static_cast<std::size_t>(before)];
    coming.get(rank, n % kSlots, 0);
    std::memcpy(numbers.data(), coming.slot(rank, n % kSlots).data, layout.specs[0].nbytes);
    coming.release(rank, n % kSlots, 0);
    for (std::int64_t number : numbers) {
      if (number != before * kBundles + n) throw std::runtime_error("a wrong bundle");
    }
  }
}

}  // namespace

int main() {
  try {
    const int rank = std::stoi(said("RANK")), ranks = std::stoi(said("WORLD_SIZE"));
    KeyValueStore store(said("MASTER_ADDR"), std::stoi(said("MASTER_PORT")), rank == 0, kDeadline);

    // Rank r is process r. The store is used while the fabric is made, and never again.
    std::vector<int> owners;
    for (int r = 0; r < ranks; ++r) owners.push_back(r);
    auto meeting = std::make_shared<StoreRendezvous<KeyValueStore>>(store, "exchange", rank, ranks);
    const auto fabric = asyncdiff::make_host_fabric(owners, kDeadline, meeting);
    exchange(*fabric, rank);
    fabric->all_gather("done", kDeadline);  // nobody leaves while others still read
    fabric->close();
    if (rank == 0) std::printf("%d bundles in a ring of %d processes\n", kBundles, ranks);
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
