// The kernels that make a link look slower, of a thread each, in the stream that sends: one before
// each piece notes when it will have left; one before the commit waits until all have arrived. Also
// compiled for the CPU, by a test.
#pragma once

#include <cstdint>

#include "asyncdiff/channel_sender.hpp"
#include "simulated_link.hpp"

namespace asyncdiff {

// How many others send over the link to a rank.
__device__ inline std::uint64_t others_on(const LinkDevice& link, int to) {
  const int mine = link.rank * link.ranks + to;
  if (link.sharing == SimulatedLink::Sharing::kBoth) {
    return ptx::load_relaxed_system(link.busy + to * link.ranks + link.rank);
  }
  std::uint64_t sum = 0;
  for (int i = 0; i < link.ranks * link.ranks; ++i) {
    if (i != mine) sum += ptx::load_relaxed_system(link.busy + i);
  }
  return sum;
}

// Has those who share the link take their even share of the time since the last look, as far as
// something was under way. By how much later it will have left.
__device__ inline std::uint64_t share(const LinkDevice& link, int to, std::uint64_t now) {
  if (link.busy == nullptr) return 0;
  LinkState& state = link.states[to];
  const std::uint64_t before = ptx::exchange_device(&state.looked, now);
  const std::uint64_t free = ptx::load_relaxed_system(&state.free);
  const std::uint64_t until = now < free ? now : free;
  std::uint64_t late = 0;
  if (until > before) {
    const std::uint64_t others = others_on(link, to);
    late = (until - before) * others / (others + 1);
    if (late > 0) ptx::add_device(&state.free, late);
  }
  std::uint64_t* busy = link.busy + link.rank * link.ranks + to;
  ptx::store_release_system(busy, now < free + late ? 1 : 0);
  return late;
}

// Has a piece leave as soon as the link is free. When it has left.
__device__ inline std::uint64_t send(const LinkDevice& link, int to, std::uint64_t ns) {
  const std::uint64_t now = ptx::global_nanoseconds();
  share(link, to, now);
  std::uint64_t* free = &link.states[to].free;
  std::uint64_t seen = ptx::load_relaxed_system(free);
  while (true) {  // channels of the same ranks, on other streams
    const std::uint64_t left = (seen > now ? seen : now) + ns;
    const std::uint64_t found = ptx::compare_and_swap_device(free, seen, left);
    if (found == seen) {
      share(link, to, now);  // says that something is under way
      return left;
    }
    seen = found;
  }
}

// Before a piece: that it is under way from now on. Nothing, where no bundle has begun.
__global__ void depart_kernel(SenderDevice sender, LinkDevice link, std::uint64_t ns) {
  SenderCounters& counters = *sender.counters;
  if (counters.begun != counters.committed + 1) return;
  for (int i = 0; i < sender.receivers; ++i) {
    const std::uint64_t left = send(link, sender.ranks[i], ns);
    if (left > counters.left) counters.left = left;
  }
}

// Before the commit: waits until the whole bundle would have arrived.
__global__ void arrive_kernel(SenderDevice sender, LinkDevice link, int slot) {
  SenderCounters& counters = *sender.counters;
  const std::uint64_t epoch = counters.committed + 1;
  if (counters.begun != epoch) return;
  const std::uint64_t begun = ptx::global_nanoseconds();
  std::uint64_t left = counters.left > begun ? counters.left : begun;
  wait_until(sender.context, epoch, Operation::kCommit, slot, sender.ranks[0],
             [&](std::uint64_t& seen) {
               const std::uint64_t now = ptx::global_nanoseconds();
               std::uint64_t late = 0;
               for (int i = 0; i < sender.receivers; ++i) {
                 const std::uint64_t more = share(link, sender.ranks[i], now);
                 if (more > late) late = more;
               }
               left += late;
               seen = epoch - 1;
               return now >= left + link.latency_ns;
             });
}

}  // namespace asyncdiff
