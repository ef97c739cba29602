// Fabrics over several hosts, played by processes of one that say they are on others.
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "../src/crossing.hpp"
#include "asyncdiff/errors.hpp"
#include "asyncdiff/host_fabric.hpp"
#include "asyncdiff/interrupt.hpp"
#include "asyncdiff/socket_rendezvous.hpp"
#include "check.hpp"

using namespace asyncdiff;

namespace {

constexpr double kDeadline = 5;

using Work = std::function<void(Fabric& fabric, int process)>;

std::shared_ptr<Rendezvous> meet(const std::string& path, int process, int processes) {
  return std::make_shared<SocketRendezvous>(SocketAddress{"", 0, path}, process, processes, "key",
                                            20);
}

// The processes of a fabric meet over it.
class Over final : public Rendezvous {
 public:
  Over(const Fabric& fabric, int process) : fabric_(fabric), process_(process) {}
  int process() const override { return process_; }
  int processes() const override { return fabric_.ranks(); }
  std::vector<std::string> all_gather(const std::string& mine) override {
    return fabric_.all_gather(mine, kDeadline);
  }

 private:
  const Fabric& fabric_;
  int process_;
};

// Runs `work` in a process for each letter, its host. What each ended with, as waitpid tells.
std::vector<int> on_hosts(const std::string& hosts, const Work& work) {
  static int runs = 0;
  const std::string path =
      "/tmp/asyncdiff-test-" + std::to_string(getpid()) + "-" + std::to_string(++runs);
  const int count = static_cast<int>(hosts.size());
  std::vector<pid_t> children, stopped;
  for (int p = 0; p < count; ++p) {
    children.push_back(fork());
    if (children.back() != 0) continue;
    setenv("ASYNCDIFF_HOST", std::string(1, hosts[static_cast<std::size_t>(p)]).c_str(), 1);
    setenv("ASYNCDIFF_INTERFACE", "lo", 1);
    std::vector<int> owners;
    for (int r = 0; r < count; ++r) owners.push_back(r);
    const auto fabric = make_host_fabric(owners, kDeadline, meet(path, p, count));
    work(*fabric, p);
    fabric->close();
    _exit(0);
  }
  std::vector<int> out(children.size());
  for (std::size_t i = 0; i < children.size(); ++i) {
    waitpid(children[i], &out[i], WUNTRACED);
    if (WIFSTOPPED(out[i])) stopped.push_back(children[i]);
  }
  for (pid_t child : stopped) {
    kill(child, SIGKILL);
    waitpid(child, nullptr, 0);
  }
  return out;
}

void all_well(const std::vector<int>& statuses) {
  for (int status : statuses) CHECK(status == 0);
}

Layout numbers(std::int64_t count) { return Layout({TensorSpec("int32", {count})}); }

std::vector<std::int32_t> bundle(std::int64_t count, int value) {
  return std::vector<std::int32_t>(static_cast<std::size_t>(count), value);
}

void expect(Channel& channel, int rank, int slot, int value) {
  channel.get(rank, slot, 0);
  const auto* data = reinterpret_cast<const std::int32_t*>(channel.slot(rank, slot).data);
  const std::size_t last = channel.layout().specs[0].nbytes / sizeof *data - 1;
  CHECK(data[0] == value && data[last] == value);
  channel.release(rank, slot, 0);
}

// One sender; receivers on its own host and on others; bundles larger than what sockets hold.
void bundles_reach_all_hosts() {
  all_well(on_hosts("aabc", [](Fabric& fabric, int process) {
    const auto links = fabric.links();
    CHECK(links.at({0, 1}) == "memory" && links.at({0, 2}) == "sockets");
    CHECK(fabric.recovers() && fabric.kind() == "host");
    const std::int64_t count = 3 << 20;
    const auto all = fabric.channel(0, {1, 2, 3}, numbers(count), 2, "all");
    const auto back = fabric.channel(3, {0}, numbers(1), 1, "");
    CHECK(back->name() == "3 to 0");
    for (std::uint64_t first : {std::uint64_t{0}, std::uint64_t{5}}) {
      for (std::uint64_t i = first; i < first + 7; ++i) {
        const int slot = static_cast<int>(i % 2);
        const int value = static_cast<int>(i);
        if (process == 0) {
          const auto data = bundle(count, value);
          fabric.put_batch({{all, {data.data()}, slot}}, 0);
          expect(*back, 0, 0, value);
        } else {
          expect(*all, process, slot, value);
          if (process == 3) back->put({&value}, 0, 0);
        }
      }
      fabric.reset(5);
    }
    all->close();
    back->close();
  }));
}

// What is under way when everybody resets is gone, and what was begun is not.
void a_reset_empties_what_is_under_way() {
  all_well(on_hosts("ab", [](Fabric& fabric, int process) {
    const std::int64_t count = 4 << 20;
    const auto way = fabric.channel(0, {1}, numbers(count), 2, "way");
    for (int round = 0; round < 5; ++round) {
      const auto data = bundle(count, round);
      if (process == 0) {
        for (int slot : {0, 1}) way->put({data.data()}, slot, 0);
      } else if (round % 2 == 1) {
        expect(*way, 1, 0, round);
      }
      fabric.reset();
    }
    const auto data = bundle(count, 77);
    if (process == 0) way->put({data.data()}, 0, 0);
    if (process == 1) expect(*way, 1, 0, 77);
  }));
}

// Who closes has sent what it has put, whether somebody waits for it already or comes later.
void what_was_sent_before_a_close_arrives(bool later) {
  all_well(on_hosts("ab", [later](Fabric& fabric, int process) {
    const std::int64_t count = 8 << 20;
    const auto way = fabric.channel(0, {1}, numbers(count), 2, "way");
    if (process == 0) {
      for (int slot : {0, 1}) way->put({bundle(count, slot).data()}, slot, 0);
      return;
    }
    if (later) usleep(300000);
    for (int slot : {0, 1}) expect(*way, 1, slot, slot);
    try {
      way->get(1, 0, 0);
      CHECK(false);
    } catch (const ProcessLost& lost) {
      CHECK(lost.process == 0);
    }
  }));
}

// Who closes right after a call that all made was in it: on another host, whose processes hear of
// it one by one, too.
void a_call_that_was_made_counts() {
  all_well(on_hosts("aab", [](Fabric& outer, int process) {
    for (int i = 0; i < 100; ++i) {
      const auto inner =
          make_host_fabric({0, 1, 2}, kDeadline, std::make_shared<Over>(outer, process));
      inner->all_gather(std::string(5000, 'x'), kDeadline);
      inner->close();
    }
  }));
}

double seconds_since(std::chrono::steady_clock::time_point begun) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begun).count();
}

// Killed at once; stopped, as a host that has lost its power, when it was silent for long enough.
void who_ends_is_lost_on_all_hosts(int how) {
  const auto statuses = on_hosts("aab", [how](Fabric& fabric, int process) {
    const auto first = fabric.channel(0, {2}, numbers(10), 2, "first");
    const auto second = fabric.channel(0, {1}, numbers(10), 2, "second");
    const auto begun = std::chrono::steady_clock::now();
    if (process == 2) {
      usleep(100000);
      kill(getpid(), how);
    }
    try {
      if (process == 0) {
        const auto data = bundle(10, 1);
        for (int i = 0;; ++i) first->put({data.data()}, i % 2, 0);
      }
      second->get(1, 0, 0);
      CHECK(false);
    } catch (const ProcessLost& lost) {
      CHECK(lost.process == 2 && lost.ranks == std::vector<int>{2});
      CHECK(seconds_since(begun) < (how == SIGKILL ? 1 : kDeadline));
    }
  });
  CHECK(statuses[0] == 0 && statuses[1] == 0);
}

// What an interrupt throws, where one was asked for.
struct Interrupted {};
std::atomic<bool> interrupting{false};

// A begin that waits for another host, and has begun on its own, is none when it is interrupted.
void who_goes_on_is_waited_for_on_all_hosts() {
  all_well(on_hosts("aba", [](Fabric& fabric, int process) {
    for (int i = 0; process == 1 && i < 15; ++i) {
      fabric.heartbeat("part " + std::to_string(i));
      usleep(50000);
    }
    fabric.all_gather("", 0.5);
    if (process == 1) usleep(900000);
    std::string text;
    try {
      fabric.all_gather("", 0.5);
    } catch (const CollectiveTimeout& error) {
      CHECK(error.process == 1);
      text = error.what();
    }
    CHECK(text.find("(whose last word was 'part 14')") != std::string::npos);
  }));
}

void an_interrupted_begin_can_be_repeated() {
  all_well(on_hosts("aab", [](Fabric& fabric, int process) {
    const auto way = fabric.channel(0, {1, 2}, numbers(10), 1, "way");
    const auto go_on = fabric.channel(0, {2}, numbers(1), 1, "go on");
    const auto interrupted = [&](const std::vector<std::int32_t>& data) {
      interrupting = true;
      try {
        way->put({data.data()}, 0, 0);
      } catch (const Interrupted&) {
        interrupting = false;
        return true;
      }
      return false;
    };
    set_interrupt_check([] {
      if (interrupting) throw Interrupted();
    });
    const int one = 1;
    if (process == 0) {
      way->put({bundle(10, 1).data()}, 0, 0);
      CHECK(interrupted(bundle(10, 2)) && interrupted(bundle(10, 2)));
      go_on->put({&one}, 0, 0);
      way->put({bundle(10, 2).data()}, 0, 0);
      CHECK(interrupted(bundle(10, 3)));
    } else {
      if (process == 2) expect(*go_on, 2, 0, 1);
      expect(*way, process, 0, 1);
      if (process == 1) expect(*way, 1, 0, 2);
      if (process == 2) way->get(2, 0, 0);  // held until the reset
    }
    fabric.reset();
    if (process == 0) {
      way->put({bundle(10, 4).data()}, 0, 0);
    } else {
      expect(*way, process, 0, 4);
    }
  }));
}

// Somebody else on the port: it is let alone, and keeps nobody out.
void strangers_are_refused() {
  setenv("ASYNCDIFF_INTERFACE", "lo", 1);
  Crossing zero(0, {0, 1}), one(1, {0, 1}), stranger(1, {0, 1});
  const std::vector<std::string> offers = {zero.offer(), one.offer()};
  const pid_t child = fork();
  if (child == 0) {
    try {  // it knows where, and not what the others have told each other
      stranger.connect({offers[0], stranger.offer()}, 1);
    } catch (const CollectiveTimeout& error) {
      _exit(std::string(error.what()).find("another process listens there") != std::string::npos
                ? 0
                : 2);
    }
    _exit(1);
  }
  const pid_t other = fork();
  if (other == 0) {
    usleep(300000);
    _exit(one.connect(offers, 5).size() == 1 ? 0 : 1);
  }
  CHECK(zero.connect(offers, 5).count(1) == 1);
  for (pid_t each : {child, other}) {
    int status = 0;
    waitpid(each, &status, 0);
    CHECK(status == 0);
  }
  unsetenv("ASYNCDIFF_INTERFACE");
}

// An interface that is not there, in one process: said in all of them, before anybody waits.
void an_interface_that_is_not_there_is_named() {
  setenv("ASYNCDIFF_INTERFACE", "nonsense", 1);
  try {
    const Crossing crossing(0, {0, 1});
    CHECK(false);
  } catch (const InvalidArgument& error) {
    const std::string text = error.what();
    CHECK(text.find("ASYNCDIFF_INTERFACE='nonsense' is no network interface") == 0);
    CHECK(text.find("lo (127.0.0.1)") != std::string::npos);
  }
  unsetenv("ASYNCDIFF_INTERFACE");
}

}  // namespace

int main() {
  bundles_reach_all_hosts();
  a_reset_empties_what_is_under_way();
  for (bool later : {false, true}) what_was_sent_before_a_close_arrives(later);
  a_call_that_was_made_counts();
  who_ends_is_lost_on_all_hosts(SIGKILL);
  who_ends_is_lost_on_all_hosts(SIGSTOP);
  who_goes_on_is_waited_for_on_all_hosts();
  an_interrupted_begin_can_be_repeated();
  strangers_are_refused();
  an_interface_that_is_not_there_is_named();
}
