// The network of GPUs between processes that say they are on different hosts: all of it but CUDA
// and NCCL, which are played on the CPU.
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <string>
#include <thread>
#include <vector>

#include "../cuda/nccl_network.hpp"
#include "../src/crossing.hpp"
#include "asyncdiff/errors.hpp"
#include "asyncdiff/socket_rendezvous.hpp"
#include "check.hpp"
#include "cpu/memory_on_cpu.hpp"

using namespace asyncdiff;

namespace {

using Clock = std::chrono::steady_clock;

std::vector<int> from_zero(int count) {
  std::vector<int> out(static_cast<std::size_t>(count));
  std::iota(out.begin(), out.end(), 0);
  return out;
}

// One process of so many, with a rank.
struct Host {
  Host(const std::string& path, int rank, int count, double deadline)
      : mine(rank),
        ranks(count),
        processes(
            from_zero(count),
            std::make_shared<SocketRendezvous>(SocketAddress{"", 0, path}, rank, count, "key", 20),
            deadline),
        network(make_nccl_network(processes, std::vector<int>(from_zero(count).size(), 0), deadline,
                                  connect_hosts(processes, deadline))) {}

  // To the next rank.
  std::shared_ptr<Channel> channel(int from, const Layout& layout, int slots) {
    const int to = (from + 1) % ranks;
    const std::string name = "from " + std::to_string(from);
    return network->channel(from, to, layout, slots, name, processes.party_of({from, to}));
  }
  void together() const { processes.everybody().barrier(); }

  int mine;
  int ranks;
  Processes processes;
  std::shared_ptr<Network> network;
};

// Runs it in processes of as many hosts. What each ended with, as waitpid tells.
std::vector<int> on_hosts(int count, const std::function<void(Host&)>& work, double deadline = 20) {
  static int runs = 0;
  const std::string path =
      "/tmp/asyncdiff-nccl-" + std::to_string(getpid()) + "-" + std::to_string(++runs);
  std::vector<pid_t> children;
  for (int p = 0; p < count; ++p) {
    children.push_back(fork());
    if (children.back() != 0) continue;
    alarm(100);
    setenv("ASYNCDIFF_HOST", std::to_string(p).c_str(), 1);
    setenv("ASYNCDIFF_INTERFACE", "lo", 1);
    try {
      Host host(path, p, count, deadline);
      work(host);
      host.network->close();
    } catch (const std::exception& error) {
      std::fprintf(stderr, "process %d: %s\n", p, error.what());
      _exit(2);
    }
    _exit(0);
  }
  std::vector<int> out(children.size());
  for (std::size_t p = 0; p < children.size(); ++p) waitpid(children[p], &out[p], 0);
  return out;
}

void all_well(const std::vector<int>& statuses) {
  for (int status : statuses) CHECK(status == 0);
}

using Bytes = std::vector<unsigned char>;

std::vector<Bytes> tensors_of(const Layout& layout, int value) {
  std::vector<Bytes> out;
  for (const TensorSpec& spec : layout.specs) {
    out.emplace_back(spec.nbytes, static_cast<unsigned char>(value++));
  }
  return out;
}

void put(Channel& channel, int slot, int value) {
  const std::vector<Bytes> tensors = tensors_of(channel.layout(), value);
  std::vector<const void*> pointers;
  for (const Bytes& tensor : tensors) pointers.push_back(tensor.data());
  channel.put(pointers, slot, 0);
}

void expect(Channel& channel, int rank, int slot, int value) {
  channel.get(rank, slot, 0);
  const Buffer memory = channel.slot(rank, slot);
  const std::vector<Bytes> tensors = tensors_of(channel.layout(), value);
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    const std::byte* there = memory.data + channel.layout().offsets[i];
    if (tensors[i].empty()) continue;
    CHECK(std::memcmp(there, tensors[i].data(), tensors[i].size()) == 0);
  }
}

Layout layout_of(const std::vector<std::int64_t>& sizes) {
  std::vector<TensorSpec> specs;
  for (std::int64_t size : sizes) specs.emplace_back("int8", std::vector<std::int64_t>{size});
  return Layout(specs);
}

const std::vector<Layout>& layouts() {
  static const std::vector<Layout> all = {
      layout_of({1}),
      layout_of({}),
      layout_of({0, 5}),
      layout_of(std::vector<std::int64_t>(330, 3)),
      layout_of({5'000'000, 0, 3, 5'000'000, 700}),
  };
  return all;
}

void bundles_cross_both_ways() {
  all_well(on_hosts(2, [](Host& host) {
    for (std::size_t which = 0; which < layouts().size(); ++which) {
      const int slots = static_cast<int>(which % 3) + 1;
      const auto up = host.channel(0, layouts()[which], slots);
      const auto down = host.channel(1, layouts()[which], slots);
      CHECK(up->mode() == Mode::kKernel);
      Channel& mine = host.mine == 0 ? *up : *down;
      Channel& theirs = host.mine == 0 ? *down : *up;
      for (int n = 0; n < 8; ++n) {
        put(mine, n % slots, n + host.mine);
        if (n % 2 == 0) theirs.wait_for(host.mine, static_cast<std::uint64_t>(n) + 1);
        expect(theirs, host.mine, n % slots, n + 1 - host.mine);
        theirs.release(host.mine, n % slots, 0);
      }
      host.network->check();
      up->close();
      down->close();
      up->close();
      CHECK_THROWS(up->slot(1, 0), Error);
    }
  }));
}

// Nobody has asked for what was sent, and nobody does any more.
void a_reset_drops_what_was_not_read() {
  all_well(on_hosts(2, [](Host& host) {
    const auto up = host.channel(0, layouts()[4], 2);
    for (const std::uint64_t first : {std::uint64_t{4}, std::uint64_t{0}, ~std::uint64_t{0} - 2}) {
      host.network->reset(first);
      for (std::uint64_t n = first; n != first + 6; ++n) {
        const int slot = static_cast<int>(n % 2);
        const int value = static_cast<int>(n % 100);
        if (host.mine == 0) put(*up, slot, value);
        if (host.mine == 1) up->wait_for(1, n - first + 1);
        if (host.mine == 1) expect(*up, 1, slot, value);
        if (host.mine == 1 && n != first + 5) up->release(1, slot, 0);
      }
      if (host.mine == 0) {
        // Begun, and partly there.
        const int slot = static_cast<int>((first + 6) % 2);
        const Bytes tensor(5'000'000, 1);
        up->begin(slot, 0);
        up->push(0, tensor.data(), slot, 0);
      }
      host.together();
      host.network->check();
    }
    const auto dropped = host.channel(0, layouts()[0], 1);
    if (host.mine == 0) put(*dropped, 0, 1);
  }));
}

void changes_of_shape_leave_nothing_behind() {
  all_well(on_hosts(2, [](Host& host) {
    // More lines of control memory than there are: 16384.
    for (int n = 0; n < 600; ++n) {
      const auto one = host.channel(n % 2, layout_of({200'000}), 1);
      if (host.mine == n % 2) {
        put(*one, 0, n % 100);
      } else if (n % 3 != 0) {
        expect(*one, host.mine, 0, n % 100);
      }
      one->close();
    }
    host.network->check();
  }));
}

// Where it cannot be made in one process, what it took in the other is there for others again.
void a_channel_that_fails_in_one_process_leaves_nothing_behind() {
  all_well(on_hosts(2, [](Host& host) {
    const auto there = host.channel(0, layouts()[0], 1);
    for (int n = 0; n < 1300; ++n) {
      on_cpu::memory_is_full = host.mine == n % 2;
      CHECK_THROWS(host.channel(0, layout_of({200'000}), 1), Error);
    }
    on_cpu::memory_is_full = false;
    const auto up = host.channel(0, layout_of({200'000}), 1);
    if (host.mine == 0) put(*up, 0, 7);
    if (host.mine == 1) expect(*up, 1, 0, 7);
    host.network->check();
  }));
}

// Neither the courier nor NCCL's threads are in it.
void a_forked_child_gives_nothing_back() {
  all_well(on_hosts(2, [](Host& host) {
    const auto up = host.channel(0, layouts()[0], 1);
    const pid_t child = fork();
    if (child == 0) {
      alarm(20);
      CHECK_THROWS(up->close(), Error);
      host.network->close();
      host.network.reset();
      _exit(0);
    }
    int status = 0;
    waitpid(child, &status, 0);
    CHECK(status == 0);
    host.together();
    if (host.mine == 0) put(*up, 0, 7);
    if (host.mine == 1) expect(*up, 1, 0, 7);
    host.network->check();
  }));
}

// Each has channels with two others, but knows nothing of what these do with each other.
void hosts_in_a_circle() {
  all_well(on_hosts(3, [](Host& host) {
    std::vector<std::shared_ptr<Channel>> all;
    for (int from = 0; from < 3; ++from) {
      const int to = (from + 1) % 3;
      if (host.mine != from && host.mine != to) {
        all.push_back(nullptr);
      } else {
        all.push_back(host.channel(from, layouts()[static_cast<std::size_t>(2 * from)], 2));
      }
    }
    const int before = (host.mine + 2) % 3;
    Channel& mine = *all[static_cast<std::size_t>(host.mine)];
    Channel& theirs = *all[static_cast<std::size_t>(before)];
    for (const std::uint64_t first : {std::uint64_t{0}, std::uint64_t{1}}) {
      for (std::uint64_t n = first; n < first + 20; ++n) {
        const int slot = static_cast<int>(n % 2);
        put(mine, slot, static_cast<int>(n) + host.mine);
        expect(theirs, host.mine, slot, static_cast<int>(n) + before);
        theirs.release(host.mine, slot, 0);
      }
      host.network->check();
      host.network->reset(1);
    }
  }));
}

void one_that_never_sends_is_named() {
  all_well(on_hosts(
      2,
      [](Host& host) {
        const auto up = host.channel(0, layouts()[0], 2);
        std::string told;
        host.network->on_failure(
            [&](int rank, const std::string& why) { told = std::to_string(rank) + " " + why; });
        host.together();
        if (host.mine == 1) {
          up->get(1, 0, 0);
          CHECK_THROWS(host.network->check(), ExchangeTimeout);
          CHECK(!host.network->recovers());
          CHECK_THROWS(host.network->reset(0), ExchangeTimeout);
          std::this_thread::sleep_for(std::chrono::milliseconds(300));
          host.network->on_failure({});
          CHECK(told.find("1 rank 1, channel 'from 0', get of slot 0") == 0);
        } else {
          std::this_thread::sleep_for(std::chrono::milliseconds(1500));
          host.network->abort(1, "the other one has failed");
          CHECK_THROWS(host.network->check(), Aborted);
        }
      },
      1.0));
}

void an_abort_ends_a_wait() {
  all_well(on_hosts(2, [](Host& host) {
    const auto up = host.channel(0, layouts()[0], 1);
    std::thread aborting([&] {
      std::this_thread::sleep_for(std::chrono::milliseconds(200));
      host.network->abort(host.mine, "enough");
    });
    if (host.mine == 0) {
      put(*up, 0, 1);
      put(*up, 0, 2);  // nobody has released the slot
    } else {
      up->get(1, 0, 0);
      up->get(1, 0, 0);
    }
    CHECK_THROWS(host.network->check(), Aborted);
    aborting.join();
  }));
}

void one_that_is_killed_is_named_at_once() {
  const auto statuses = on_hosts(2, [](Host& host) {
    const auto up = host.channel(0, layouts()[4], 2);
    const auto down = host.channel(1, layouts()[4], 2);
    Channel& mine = host.mine == 0 ? *up : *down;
    Channel& theirs = host.mine == 0 ? *down : *up;
    std::thread killing;
    if (host.mine == 1) {
      killing = std::thread([] {
        std::this_thread::sleep_for(std::chrono::milliseconds(150));
        kill(getpid(), SIGKILL);
      });
    }
    const auto begun = Clock::now();
    bool lost = false;
    for (int n = 0; !lost; ++n) {
      put(mine, n % 2, n % 100);
      theirs.get(host.mine, n % 2, 0);
      theirs.release(host.mine, n % 2, 0);
      try {
        host.network->check();
      } catch (const ProcessLost& error) {
        CHECK(error.process == 1 && error.ranks == std::vector<int>{1});
        lost = true;
      }
    }
    CHECK(Clock::now() - begun < std::chrono::seconds(8));
    const auto closing = Clock::now();
    host.network->close();
    CHECK(Clock::now() - closing < std::chrono::seconds(4));
  });
  CHECK(statuses[0] == 0 && WIFSIGNALED(statuses[1]));
}

}  // namespace

int main() {
  setenv("ASYNCDIFF_NCCL", CARRYING_NCCL, 1);
  bundles_cross_both_ways();
  a_reset_drops_what_was_not_read();
  changes_of_shape_leave_nothing_behind();
  a_channel_that_fails_in_one_process_leaves_nothing_behind();
  a_forked_child_gives_nothing_back();
  hosts_in_a_circle();
  one_that_never_sends_is_named();
  an_abort_ends_a_wait();
  one_that_is_killed_is_named_at_once();
}
