// What processes do together, played by threads: a failure of one is everybody's, and so is a call
// that they make differently.
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <functional>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "asyncdiff/errors.hpp"
#include "asyncdiff/host_fabric.hpp"
#include "asyncdiff/processes.hpp"
#include "asyncdiff/socket_rendezvous.hpp"
#include "check.hpp"
#include "in_processes.hpp"

using namespace asyncdiff;

namespace {

template <class Throw>
std::vector<std::string> together(Throw throws) {
  return in_processes(3, [&](int p, std::shared_ptr<Rendezvous> rendezvous) {
    const Processes processes({0, 1, 2}, std::move(rendezvous), 5);
    processes.everybody().together("take memory", [&] {
      if (p == 1) throws();
    });
  });
}

void any_failure_is_everybodys() {
  auto thrown = together([] { throw std::bad_alloc(); });
  CHECK(has(thrown[1], "bad_alloc") && !has(thrown[1], "process"));
  CHECK(has(thrown[0], "process 1 could not take memory: ") && thrown[2] == thrown[0]);
  thrown = together([] { throw std::runtime_error(""); });
  CHECK(has(thrown[2], "process 1 could not take memory: unknown error"));
  thrown = together([] { throw 7; });
  CHECK(thrown[1] == "an int" && has(thrown[0], "unknown error"));
}

// Not the failure itself, which is that process's doing: its memory may have lost its name.
void a_failure_is_that_a_process_has_ended() {
  int told[2];
  CHECK(pipe(told) == 0);
  const std::string address = "/tmp/asyncdiff-test-" + std::to_string(getpid());
  const auto process = [&](int p) {
    return Processes(
        {0, 1},
        std::make_shared<SocketRendezvous>(SocketAddress{"", 0, address}, p, 2, "a key", 10), 5);
  };
  const pid_t child = fork();
  if (child == 0) {
    const Processes processes = process(1);
    CHECK(write(told[1], "x", 1) == 1);
    try {
      processes.everybody().together("open memory", [] {});
    } catch (const Error&) {
    }
    _exit(0);
  }
  const Processes processes = process(0);
  bool lost = false;
  try {
    processes.everybody().together("open memory", [&] {
      char text = 0;
      CHECK(read(told[0], &text, 1) == 1);
      std::this_thread::sleep_for(std::chrono::milliseconds(100));  // it has sent that it is done
      kill(child, SIGKILL);
      waitpid(child, nullptr, 0);
      throw Error("it is not there");
    });
  } catch (const ProcessLost& error) {
    lost = error.process == 1 && error.ranks == std::vector<int>{1};
  }
  CHECK(lost);
}

using Make = std::function<void(int, HostFabric&)>;

std::vector<std::string> on_fabrics(const Make& work, int count = 2) {
  return in_processes(count, [&](int p, std::shared_ptr<Rendezvous> rendezvous) {
    std::vector<int> owners;
    for (int i = 0; i < count; ++i) owners.push_back(i);
    HostFabric fabric(owners, 5.0, std::move(rendezvous));
    work(p, fabric);
  });
}

const Layout kLayout({TensorSpec("float32", {4, 3, 1})});

void a_difference_is_named() {
  const auto differ = [](const Make& work, const std::string& what, const std::string& one,
                         const std::string& two) {
    const auto thrown = on_fabrics(work);
    CHECK(
        has(thrown[0], what + " is " + one + " here, " + two + " in process 1. This is process 0"));
    CHECK(
        has(thrown[1], what + " is " + two + " here, " + one + " in process 0. This is process 1"));
    CHECK(has(thrown[0], "in the same order"));
  };
  const auto layouts = [&](const std::vector<TensorSpec>& one, const std::vector<TensorSpec>& two) {
    return [=](int p, HostFabric& fabric) {
      fabric.channel(0, {1}, Layout(p == 0 ? one : two), 2, "");
    };
  };
  // All of as many bytes.
  differ(layouts({TensorSpec("float16", {4})}, {TensorSpec("bfloat16", {4})}), "tensor 0",
         "float16(4) with strides (1)", "bfloat16(4) with strides (1)");
  differ(layouts({TensorSpec("int8", {2, 3})}, {TensorSpec("int8", {3, 2})}), "tensor 0",
         "int8(2, 3) with strides (3, 1)", "int8(3, 2) with strides (2, 1)");
  differ(layouts({TensorSpec("int8", {2, 3}, {3, 1})}, {TensorSpec("int8", {2, 3}, {1, 2})}),
         "tensor 0", "int8(2, 3) with strides (3, 1)", "int8(2, 3) with strides (1, 2)");
  differ(layouts({TensorSpec("int8", {512})}, std::vector<TensorSpec>(2, TensorSpec("int8", {1}))),
         "the number of tensors", "1", "2");
  const auto channels = [](std::vector<int> slots, std::vector<std::string> names) {
    return [=](int p, HostFabric& fabric) {
      const auto i = static_cast<std::size_t>(p);
      fabric.channel(0, {1}, kLayout, slots[i], names[i]);
    };
  };
  differ(channels({2, 3}, {"a", "a"}), "the number of its slots", "2", "3");
  differ(channels({2, 2}, {"a", "b"}), "the channel's name", "'a'", "'b'");
  differ([](int p, HostFabric& fabric) { fabric.channel(p, {1 - p}, kLayout, 2, "a"); },
         "its sender", "0", "1");
  differ(
      [](int p, HostFabric& fabric) {
        fabric.channel(0, {1}, kLayout, 2, "a", p == 0 ? Mode::kAuto : Mode::kCopy);
      },
      "its mode", "auto", "copy");
  differ([](int p, HostFabric& fabric) { fabric.reset(p == 0 ? 5 : 6); }, "its first bundle", "5",
         "6");
  differ(
      [](int p, HostFabric& fabric) {
        if (p == 0) {
          fabric.reset();
        } else {
          fabric.channel(0, {1}, kLayout, 2, "a");
        }
      },
      "the call", "reset", "make a channel");
}

void receivers_and_ranks_may_differ() {
  const auto thrown = on_fabrics(
      [](int p, HostFabric& fabric) {
        fabric.channel(0, p == 2 ? std::vector<int>{2, 1} : std::vector<int>{1, 2}, kLayout, 2, "");
      },
      3);
  CHECK(has(thrown[0],
            "the list of its receivers is (1 2) here, (2 1) in process 2. This is process 0"));
  CHECK(has(thrown[2],
            "(1 2) in process 0; the list of its receivers is (2 1) here, (1 2) in process 1"));
  const auto fabrics = in_processes(2, [](int p, std::shared_ptr<Rendezvous> rendezvous) {
    const HostFabric fabric(p == 0 ? std::vector<int>{0, 1} : std::vector<int>{1, 0, 1}, 5.0,
                            std::move(rendezvous));
  });
  CHECK(has(fabrics[0], "the list of its ranks' processes is (0 1) here, (1 0 1) in process 1"));
}

void what_is_alike_goes_on() {
  const auto thrown = on_fabrics([](int p, HostFabric& fabric) {
    // A stride that means nothing may differ; nothing is left over by a call that failed.
    const std::vector<std::int64_t> strides = {3, 1, p};
    fabric.channel(0, {1}, Layout({TensorSpec("float32", {4, 3, 1}, strides)}), 2, "a");
    CHECK_THROWS(fabric.channel(0, {1}, kLayout, 2 + p, "b"), InvalidArgument);
    // What is wrong by itself is refused before anybody is asked.
    CHECK_THROWS(fabric.channel(0, {p == 0 ? 7 : 8}, kLayout, 2, "b"), InvalidArgument);
    const auto channel = fabric.channel(0, {1}, kLayout, 2, "b");
    fabric.reset(2);
    const float values[12] = {1};
    if (p == 0) channel->put({values}, 0, 0);
    if (p == 1) channel->get(1, 0, 0);
  });
  CHECK(thrown[0].empty() && thrown[1].empty());
}

void only_the_ends_make_a_channel() {
  const auto thrown = on_fabrics(
      [](int p, HostFabric& fabric) {
        if (p == 2) {
          // In a call of its own meanwhile, and in none.
          const auto others = fabric.channel(0, {1}, kLayout, 2, "a");
          others->close();
          CHECK_THROWS(others->get(1, 0, 0), InvalidArgument);
          CHECK_THROWS(others->slot(1, 0), InvalidArgument);
        } else {
          for (int i = 0; i < 50; ++i) {
            const auto channel = fabric.channel(0, {1}, kLayout, 1 + i, "a");
            const float values[12] = {1};
            if (p == 0) channel->put({values}, 0, 0);
            if (p == 1) channel->get(1, 0, 0);
            channel->close();
            channel->close();
            CHECK_THROWS(channel->get(1, 0, 0), Error);
          }
        }
        const auto all = fabric.all_gather(std::string(20000, static_cast<char>('a' + p)), 5);
        CHECK(all.size() == 3 && all[2] == std::string(20000, 'c') && all[1][0] == 'b');
        fabric.reset();
      },
      3);
  CHECK(thrown[0].empty() && thrown[1].empty() && thrown[2].empty());
}

void calls_of_others_are_not_mixed_up() {
  auto thrown = on_fabrics(
      [](int p, HostFabric& fabric) {
        if (p == 0) fabric.channel(0, {1}, kLayout, 2, "a");
        if (p > 0) fabric.reset();
      },
      3);
  for (const std::string& text : thrown) CHECK(has(text, "in the same order"));
  CHECK(has(thrown[0] + thrown[1], "'make a channel' of processes (0 1)"));
  CHECK(has(thrown[0] + thrown[1], "'reset' of processes (0 1 2)"));
  thrown = on_fabrics([](int p, HostFabric& fabric) {
    if (p == 0) fabric.all_gather("a", 5);
    if (p == 1) fabric.reset();
  });
  CHECK(has(thrown[0], "process 1 makes another call"));
  CHECK(has(thrown[1], "something else was called in process 0"));
}

void who_does_not_come_is_named() {
  for (const bool leaves : {false, true}) {
    std::vector<std::string> texts(3);
    const auto thrown = on_fabrics(
        [&](int p, HostFabric& fabric) {
          if (p == 1) {
            std::this_thread::sleep_for(std::chrono::milliseconds(100));  // all are there
            if (leaves) fabric.close();
            std::this_thread::sleep_for(std::chrono::milliseconds(400));
          } else if (leaves) {
            CHECK_THROWS(fabric.all_gather("", 5), ProcessLost);
          } else {
            CHECK_THROWS(fabric.all_gather("", 0.2), CollectiveTimeout);
          }
          try {
            fabric.check();
          } catch (const Error& error) {
            texts[static_cast<std::size_t>(p)] = error.what();
          }
        },
        3);
    CHECK(has(texts[0], "process 1 (rank 1)") && has(texts[2], "process 1 (rank 1)"));
    CHECK(has(texts[0], leaves ? "has closed the fabric" : "waited 0.2 s at 'gather'"));
    CHECK(has(texts[1], leaves ? "the fabric is closed" : "process 1 (rank 1)"));
    for (const std::string& text : thrown) CHECK(text.empty());
  }
}

void who_goes_on_is_waited_for() {
  std::string text;
  const auto thrown = on_fabrics(
      [&](int p, HostFabric& fabric) {
        for (int i = 0; p == 1 && i < 20; ++i) {
          fabric.heartbeat("part " + std::to_string(i));
          std::this_thread::sleep_for(std::chrono::milliseconds(50));
        }
        fabric.all_gather("", 0.5);
        if (p == 1) {
          fabric.heartbeat("the last part");
          std::this_thread::sleep_for(std::chrono::milliseconds(900));
        }
        try {
          fabric.all_gather("", 0.5);
        } catch (const CollectiveTimeout& error) {
          CHECK(error.process == 1);
          if (p == 0) text = error.what();
        }
      },
      3);
  for (const std::string& each : thrown) CHECK(each.empty());
  CHECK(
      has(text,
          "waited 0.5 s at 'gather' for process 1 (rank 1) (whose last word was 'the last part')"));
}

void the_end_of_a_chain_is_named() {
  std::vector<std::string> texts(3);
  const auto run = [&](bool closes) {
    return in_processes(3, [&](int p, std::shared_ptr<Rendezvous> rendezvous) {
      HostFabric fabric({0, 1, 2}, 0.5, std::move(rendezvous));
      const auto first = fabric.channel(0, {1}, kLayout, 1, "first");
      const auto second = fabric.channel(1, {2}, kLayout, 1, "second");
      if (p == 0) {
        std::this_thread::sleep_for(std::chrono::milliseconds(100));
        if (closes) fabric.close();
        std::this_thread::sleep_for(std::chrono::milliseconds(900));
        return;
      }
      if (p == 1) std::this_thread::sleep_for(std::chrono::milliseconds(100));
      try {
        (p == 1 ? first : second)->get(p, 0, 0);
      } catch (const ProcessLost& error) {
        CHECK(closes && error.process == 0 && error.ranks == std::vector<int>{0});
        texts[static_cast<std::size_t>(p)] = error.what();
      } catch (const ExchangeTimeout& error) {
        CHECK(!closes && error.incident.straggler == 0);
        texts[static_cast<std::size_t>(p)] = error.what();
      }
    });
  };
  auto thrown = run(false);
  CHECK(has(texts[2], "for rank 1") && has(texts[2], "itself waits, as others may, for rank 0"));
  thrown = run(true);
  CHECK(has(texts[1], "process 0 (rank 0) has closed the fabric") && texts[1] == texts[2]);
}

}  // namespace

int main() {
  a_failure_is_that_a_process_has_ended();  // first: it forks
  any_failure_is_everybodys();
  a_difference_is_named();
  receivers_and_ranks_may_differ();
  what_is_alike_goes_on();
  only_the_ends_make_a_channel();
  calls_of_others_are_not_mixed_up();
  who_does_not_come_is_named();
  who_goes_on_is_waited_for();
  the_end_of_a_chain_is_named();
}
