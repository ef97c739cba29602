// Simulated links: of the host fabric, by the clock; and the kernels of GPUs, on the CPU.
#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "asyncdiff/errors.hpp"
#include "asyncdiff/host_fabric.hpp"
#include "check.hpp"
#include "device_on_cpu.hpp"
// After it.
#include "../cuda/signals.cuh"
#include "../cuda/simulated_link.cuh"

using namespace asyncdiff;

namespace {

using Sharing = SimulatedLink::Sharing;

// --- the host fabric

constexpr std::size_t kBytes = 1 << 20;
constexpr double kGbPerS = 0.1;  // a bundle takes 10.5 ms
constexpr double kLatencyUs = 2000;
constexpr double kTakes = kBytes / kGbPerS / 1e6;  // ms
constexpr double kLatency = kLatencyUs / 1e3;
// What a machine with much to do may add. The fastest of several tries counts.
constexpr double kLate = 8;
constexpr int kTries = 7;

double now_ms() {
  const auto now = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration<double, std::milli>(now).count();
}

Layout bytes(std::size_t nbytes) {
  return Layout({TensorSpec("uint8", {static_cast<std::int64_t>(nbytes)})});
}

// Puts a bundle in each channel at once, and gets them all: milliseconds until the last was there.
double exchange(const std::vector<std::shared_ptr<Channel>>& channels) {
  const std::vector<std::byte> data(kBytes);
  const double begun = now_ms();
  for (const auto& channel : channels) {
    channel->begin(0, 0);
    channel->push(0, data.data(), 0, 0);
    channel->commit(0, 0);
  }
  const double sent = now_ms();
  for (const auto& channel : channels) {
    for (const int rank : channel->receivers()) channel->get(rank, 0, 0);
  }
  const double there = now_ms();
  CHECK(sent - begun < 10 * kTakes);  // the sender waits for nothing
  for (const auto& channel : channels) {
    for (const int rank : channel->receivers()) channel->release(rank, 0, 0);
  }
  return there - begun;
}

// By ordered pairs of ranks.
double fastest(Sharing sharing, const std::vector<std::vector<int>>& pairs) {
  HostFabric fabric(4, 20.0, SimulatedLink{kGbPerS, kLatencyUs, sharing});
  std::vector<std::shared_ptr<Channel>> channels;
  for (const auto& pair : pairs) {
    const std::vector<int> to(pair.begin() + 1, pair.end());
    channels.push_back(fabric.channel(pair[0], to, bytes(kBytes), 1, "by link"));
  }
  double best = 1e9;
  for (int i = 0; i < kTries; ++i) {
    const double ms = exchange(channels);
    CHECK(ms >= kLatency + kTakes);  // never earlier, whatever the machine does
    best = std::min(best, ms);
  }
  return best;
}

bool takes(double ms, int bundles) {
  const double model = kLatency + bundles * kTakes;
  return ms >= model && ms <= model + kLate;
}

void host_bundles_take_their_time() {
  CHECK(takes(fastest(Sharing::kNone, {{0, 1}}), 1));
  CHECK(takes(fastest(Sharing::kNone, {{0, 1}, {0, 1}}), 2));
  CHECK(takes(fastest(Sharing::kNone, {{0, 1}, {1, 0}, {0, 2}, {2, 3}}), 1));
  CHECK(takes(fastest(Sharing::kNone, {{0, 1, 2}}), 1));
}

void host_bundles_queue_where_they_share() {
  CHECK(takes(fastest(Sharing::kBoth, {{0, 1}, {1, 0}}), 2));
  CHECK(takes(fastest(Sharing::kBoth, {{0, 1}, {0, 2}}), 1));
  CHECK(takes(fastest(Sharing::kAll, {{0, 1}, {2, 3}, {3, 0}}), 3));
  CHECK(takes(fastest(Sharing::kAll, {{0, 1, 2}}), 2));
}

// Pieces leave while others are still made, and an empty bundle takes the latency.
void host_pieces_and_latency() {
  HostFabric fabric(2, 20.0, SimulatedLink{kGbPerS, kLatencyUs});
  const auto pieces = fabric.channel(
      0, {1}, Layout({TensorSpec("uint8", {kBytes / 2}), TensorSpec("uint8", {kBytes / 2})}), 1,
      "pieces");
  const auto empty = fabric.channel(0, {1}, Layout({}), 2, "empty");
  const std::vector<std::byte> data(kBytes);
  double best = 1e9, signal = 1e9;
  for (int i = 0; i < kTries; ++i) {
    const double begun = now_ms();
    pieces->begin(0, 0);
    pieces->push(0, data.data(), 0, 0);
    std::this_thread::sleep_for(std::chrono::duration<double, std::milli>(0.4 * kTakes));
    pieces->push(1, data.data(), 0, 0);
    pieces->commit(0, 0);
    pieces->get(1, 0, 0);
    best = std::min(best, now_ms() - begun);
    pieces->release(1, 0, 0);
    const double then = now_ms();
    empty->put({}, i % 2, 0);
    empty->get(1, i % 2, 0);
    CHECK(now_ms() - then >= kLatency);
    signal = std::min(signal, now_ms() - then);
    empty->release(1, i % 2, 0);
  }
  CHECK(takes(best, 1));
  CHECK(signal <= kLatency + kLate);
  for (const auto& [pair, link] : fabric.links()) {
    CHECK(link == (pair.first == pair.second ? "memory" : "simulated"));
  }
  CHECK(fabric.simulated_link() == "0.1GB/s,2000us");
  CHECK(fabric.link_reasons().size() == 2);
}

void host_waits_end() {
  HostFabric fabric(2, 0.2, SimulatedLink{1e-6, 0});  // a kilobyte a second
  const auto channel = fabric.channel(0, {1}, bytes(1 << 16), 2, "slow");
  const std::vector<std::byte> data(1 << 16);
  channel->put({data.data()}, 0, 0);
  const double begun = now_ms();
  CHECK_THROWS(channel->get(1, 0, 0), ExchangeTimeout);
  CHECK(now_ms() - begun >= 190);
  fabric.reset();  // and forgets what was under way
  channel->put({data.data()}, 0, 0);
  std::thread other([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    fabric.abort(0, "enough");
  });
  CHECK_THROWS(channel->get(1, 0, 0), Aborted);
  other.join();
}

// A latency with which nothing would arrive before the deadline.
void host_refuses_what_is_never_there() {
  CHECK_THROWS(HostFabric(2, 2.0, SimulatedLink{1, 2e6}), InvalidArgument);
  CHECK_THROWS(HostFabric(2, 2.0, SimulatedLink{1, 5e6}), InvalidArgument);
  CHECK(HostFabric(2, 2.0, SimulatedLink{1, 1.9e6}).simulated_link() == "1GB/s,1.9e+06us");
}

// --- as text

std::string said(const std::string& text) {
  const auto link = simulated_link_from(text);
  return link ? link->describe() : "none";
}

void text_of_links() {
  for (const char* off : {"", " ", "off", "OFF", "Off", " off", "off\t", " oFF \n"}) {
    CHECK(said(off) == "none");
  }
  for (const char* wrong : {"o ff", "offf", "off,off"}) {
    CHECK_THROWS(simulated_link_from(wrong), InvalidArgument);
  }
  // The micro sign and the Greek letter.
  CHECK(said("25GB/s,10\u00b5s") == "25GB/s,10us");
  CHECK(said("25GB/s,10 \u03bcs,all") == "25GB/s,10us,all");
  CHECK_THROWS(simulated_link_from("25GB/s,10\u00b5"), InvalidArgument);
  CHECK(said("500kB/s,1ms") == "0.0005GB/s,1000us");
  CHECK(said("1kB/s,1ms") == "1e-06GB/s,1000us");
  CHECK_THROWS(simulated_link_from("0.9kB/s,1ms"), InvalidArgument);
}

// --- the kernels, whose clock moves by a tenth of a millisecond with each look

constexpr std::uint64_t kMs = 1'000'000;
constexpr int kRanks = 3;

// Two ranks that send to others, each with a clock of the same machine and states of its own.
struct World {
  explicit World(Sharing sharing, int receivers = 1) {
    for (int r = 0; r < 2; ++r) {
      sender[r].counters = &counters[r];
      sender[r].context = {&abort, &record[r], &counters[r].failed, 1000 * kMs};
      sender[r].slots = 2;
      sender[r].flags = 1;
      sender[r].receivers = receivers;
      for (int i = 0; i < receivers; ++i) {
        sender[r].ranks[i] = i == 0 ? 1 - r : 2;
        sender[r].credits[i] = &credit;
        sender[r].arrived[i] = &arrived[r][i];
      }
      link[r] = {states[r], sharing == Sharing::kNone ? nullptr : busy, r, kRanks, sharing,
                 2 * kMs};
    }
  }

  // Kernels of one thread each, that run at the same time.
  template <class... Kernels>
  static void run(Kernels... kernels) {
    const std::vector<std::function<void()>> all{kernels...};
    on_cpu::machine.run(1, static_cast<unsigned>(all.size()), [&] {
      const unsigned mine = threadIdx.x;
      all[mine]();
    });
  }
  void begin(int r) {
    on_cpu::machine.run(1, kWarp, [&] { begin_kernel(sender[r], slot[r]); });
  }
  void depart(int r, std::uint64_t ns) {
    run([&] { depart_kernel(sender[r], link[r], ns); });
  }
  void arrive(int r) {
    run([&] { arrive_kernel(sender[r], link[r], slot[r]); });
  }
  void commit(int r) {
    on_cpu::machine.run(1, kWarp, [&] { commit_kernel(sender[r], slot[r]); });
    slot[r] = 1 - slot[r];
    credit = counters[0].committed < counters[1].committed ? counters[1].committed
                                                           : counters[0].committed;
  }

  SenderDevice sender[2]{};
  SenderCounters counters[2]{};
  FailureRecord record[2]{};
  LinkDevice link[2]{};
  LinkState states[2][kRanks]{};
  std::uint64_t busy[kRanks * kRanks]{};
  std::uint64_t arrived[2][2]{};
  std::uint64_t credit = 0;
  std::uint64_t abort = 0;
  int slot[2] = {0, 0};
};

// Lets so many milliseconds go by.
void wait_ms(int ms) {
  on_cpu::machine.run(1, 1, [&] {
    for (int i = 0; i < 10 * ms; ++i) on_cpu::machine.yield();
  });
}

bool near(std::uint64_t ns, std::uint64_t model) {
  return ns >= model && ns <= model + 6 * kMs / 10 + model / 50;
}

void kernels_take_their_time() {
  World world(Sharing::kNone);
  for (int n = 0; n < 3; ++n) {
    world.begin(0);
    const std::uint64_t begun = on_cpu::machine.now();
    world.depart(0, 10 * kMs);
    world.depart(0, 5 * kMs);                        // queues behind the first
    CHECK(on_cpu::machine.now() - begun < 3 * kMs);  // the stream goes on
    world.arrive(0);
    const std::uint64_t took = on_cpu::machine.now() - begun;
    CHECK(near(took, (10 + 5 + 2) * kMs));
    CHECK(world.arrived[0][0] == static_cast<std::uint64_t>(n));
    world.commit(0);
    CHECK(world.arrived[0][0] == static_cast<std::uint64_t>(n) + 1);
    CHECK(world.abort == 0);
  }
  // A piece that was sent long ago has left: what is left is the latency.
  world.begin(0);
  world.depart(0, kMs);
  wait_ms(20);
  const std::uint64_t begun = on_cpu::machine.now();
  world.arrive(0);
  CHECK(near(on_cpu::machine.now() - begun, 2 * kMs));
}

// Both ranks send a bundle of 10 ms at the same time. When each has arrived.
std::vector<std::uint64_t> both_send(World& world) {
  std::vector<std::uint64_t> took(2);
  for (const int r : {0, 1}) world.begin(r);
  const std::uint64_t begun = on_cpu::machine.now();
  const auto work = [&](int r) {
    depart_kernel(world.sender[r], world.link[r], 10 * kMs);
    arrive_kernel(world.sender[r], world.link[r], 0);
    took[static_cast<std::size_t>(r)] = on_cpu::machine.now() - begun;
  };
  World::run([&] { work(0); }, [&] { work(1); });
  CHECK(world.abort == 0);
  return took;
}

void kernels_share_evenly() {
  {
    World world(Sharing::kNone);
    for (const std::uint64_t ns : both_send(world)) CHECK(near(ns, 12 * kMs));
  }
  for (const Sharing sharing : {Sharing::kBoth, Sharing::kAll}) {
    World world(sharing);
    for (const std::uint64_t ns : both_send(world)) CHECK(near(ns, 22 * kMs));
    // Nobody is under way any more, so the next one has the link for itself.
    world.commit(0);
    CHECK(world.busy[0 * kRanks + 1] == 0 && world.busy[1 * kRanks + 0] == 0);
    world.begin(0);
    const std::uint64_t begun = on_cpu::machine.now();
    world.depart(0, 10 * kMs);
    world.arrive(0);
    CHECK(near(on_cpu::machine.now() - begun, 12 * kMs));
  }
  // To two receivers: over links of their own at the same time, or twice over the same one.
  for (const auto& [sharing, ms] :
       {std::pair{Sharing::kBoth, 12u}, std::pair{Sharing::kAll, 22u}}) {
    World world(sharing, 2);
    world.begin(0);
    const std::uint64_t begun = on_cpu::machine.now();
    world.depart(0, 10 * kMs);
    world.arrive(0);
    const std::uint64_t took = on_cpu::machine.now() - begun;
    CHECK(took >= ms * kMs && took <= (ms + 4) * kMs);  // a look at all words takes a millisecond
  }
}

void kernels_end_with_the_deadline() {
  World world(Sharing::kAll);
  world.depart(0, 10 * kMs);  // before a begin: nothing is sent
  CHECK(world.states[0][1].free == 0 && world.counters[0].left == 0);
  world.arrive(0);
  world.sender[0].context.deadline_ns = 10 * kMs;
  world.begin(0);
  world.depart(0, 1000 * kMs);
  world.arrive(0);
  CHECK(world.abort == 1);
  CHECK(world.record[0].kind == static_cast<std::uint64_t>(FailureKind::kTimeout));
  CHECK(world.record[0].operation == static_cast<std::uint64_t>(Operation::kCommit));
  CHECK(world.record[0].peer == 1 && world.record[0].expected == 1);
  // An abort ends it, too.
  World aborted(Sharing::kNone);
  aborted.begin(0);
  aborted.depart(0, 1000 * kMs);
  aborted.abort = 1;
  const std::uint64_t begun = on_cpu::machine.now();
  aborted.arrive(0);
  CHECK(on_cpu::machine.now() - begun < 2 * kMs && aborted.record[0].kind == 0);
}

}  // namespace

int main() {
  text_of_links();
  host_bundles_take_their_time();
  host_bundles_queue_where_they_share();
  host_pieces_and_latency();
  host_waits_end();
  host_refuses_what_is_never_there();
  kernels_take_their_time();
  kernels_share_evenly();
  kernels_end_with_the_deadline();
}
