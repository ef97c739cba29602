// Whom a process takes for one of its own: hosts, versions, names of memory; and when one is gone.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "../src/board.hpp"
#include "../src/greeting.hpp"
#include "../src/identity.hpp"
#include "../src/watcher.hpp"
#include "asyncdiff/errors.hpp"
#include "asyncdiff/memory.hpp"
#include "asyncdiff/shared_memory.hpp"
#include "check.hpp"
#include "in_processes.hpp"

using namespace asyncdiff;

namespace {

// A rendezvous whose other process says the same.
class Echo final : public Rendezvous {
 public:
  int process() const override { return 0; }
  int processes() const override { return 2; }
  std::vector<std::string> all_gather(const std::string& mine) override {
    if (said.empty()) said = mine;  // the greeting
    return {mine, mine};
  }
  std::string said;
};

template <class Call>
std::string message_of(Call call) {
  try {
    call();
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

void hosts_are_told_apart() {
  const Identity own = own_identity();
  CHECK(own.pid == getpid() && own.start != 0 && own.host[0] != '\0');
  Echo echo;
  const Greeting met = greet(echo, 4096, 1);
  CHECK(met.hosts == std::vector<int>({0, 0}) && met.connections.empty());
  const std::string greeting = echo.said;
  CHECK(identity_in(greeting, 0).pid == getpid());
  CHECK_THROWS(identity_in("", 0), InvalidArgument);
  CHECK(has(message_of([&] { identity_in("something else, long enough", 0); }),
            "process 0 does not greet as a fabric does"));
  Identity far = own;
  far.machine[0] = own.machine[0] == 'x' ? 'y' : 'x';
  CHECK(hosts_of({far, own, own, far}) == std::vector<int>({0, 1, 1, 0}));
  setenv("ASYNCDIFF_HOST", "left", 1);
  const Identity named = own_identity();
  CHECK(named.host == std::string("left"));
  CHECK(hosts_of({own, named}) == std::vector<int>({0, 1}));
  setenv("ASYNCDIFF_HOST", std::string(64, 'n').c_str(), 1);
  CHECK(has(message_of([] { own_identity(); }), "longer than 63 characters"));
  unsetenv("ASYNCDIFF_HOST");
}

// What a handle with this name says when it is opened.
std::string opening(const std::string& handle, const std::string& name) {
  std::string changed = handle;
  std::memset(changed.data() + handle.find('/'), 0, handle.size() - handle.find('/'));
  changed.replace(handle.find('/'), name.size(), name);
  return message_of([&] { open_shared(changed, 100); });
}

void only_our_memory_is_opened() {
  const SharedSegment segment(100);
  const std::string handle = segment.handle();
  CHECK(open_shared(handle, 100).nbytes == 100);
  const std::string name = handle.c_str() + handle.find('/');
  const std::string digits(32, '0');
  // Another program's memory, which this user may open.
  const std::string other = "/somebody-elses-" + std::to_string(getpid());
  const int descriptor = shm_open(other.c_str(), O_CREAT | O_RDWR, 0600);
  CHECK(descriptor >= 0 && ftruncate(descriptor, 4096) == 0);
  close(descriptor);
  for (const std::string& wrong :
       {other, std::string("/asyncdiff-1-2-") + digits + "0", std::string("/asyncdiff-1-2-") + "0",
        std::string("/asyncdiff-../2-") + digits, std::string("/asyncdiff-1--") + digits,
        std::string("/asyncdiff-1-2-") + "/" + digits.substr(1), std::string("/")}) {
    CHECK(has(opening(handle, wrong), "names what is none of asyncdiff's"));
  }
  shm_unlink(other.c_str());
  CHECK(opening(handle, name).empty());
  const std::string missing = name.substr(0, name.size() - 32) + digits;
  CHECK(has(opening(handle, missing), "is not in this one's /dev/shm"));
}

void who_lives_is_known() {
  CHECK(lives(getpid()));
  const pid_t child = fork();
  if (child == 0) _exit(0);
  for (int i = 0; i < 500 && lives(child); ++i) usleep(10000);
  CHECK(!lives(child));  // nobody has waited for it yet
  waitpid(child, nullptr, 0);
  CHECK(!lives(child));
}

// A process says of itself when it began, and others see the same: in an emulator, too.
void a_beginning_is_the_same_for_all() {
  usleep(50000);  // longer than a tick: the child's is later than its parent's
  int ends[2];
  CHECK(pipe(ends) == 0);
  const pid_t child = fork();
  if (child == 0) {
    const Identity own = own_identity();
    _exit(write(ends[1], &own, sizeof own) == sizeof own && pause() != 0 ? 0 : 1);
  }
  Identity said{};
  CHECK(read(ends[0], &said, sizeof said) == sizeof said);
  CHECK(said.pid == child && said.start != 0 && said.start == start_of(child));
  CHECK(said.start != own_identity().start);
  CHECK(!is_anothers(said) && !has_ended(said, own_identity()));
  kill(child, SIGKILL);
  waitpid(child, nullptr, 0);
  for (int end : ends) close(end);
}

// A child that is killed: known at once by its descriptor, and by its beats where there is none.
void an_end_is_noticed(bool by_beats) {
  const Buffer memory = allocate_host(Board::nbytes(2));
  const Board board(memory.data, 2);
  const pid_t child = fork();
  if (child == 0) {
    while (true) pause();
  }
  Identity other = own_identity();
  other.pid = child;
  other.start = start_of(child);
  if (by_beats) other.pid_namespace += 1;
  std::atomic<int> gone{-1};
  Watcher watcher(board, {own_identity(), other}, 0, 0.5, [&](int p) { gone = p; });
  watcher.start();
  watcher.all_there();
  if (by_beats) CHECK(board.beats_wanted().load() != 0);
  const bool at_once = board.beats_wanted().load() == 0;  // where descriptors are to be had
  const auto begun = std::chrono::steady_clock::now();
  const auto seconds = [&] {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - begun).count();
  };
  while (seconds() < 1) {  // longer than its patience
    if (!at_once) board.member(1).beats.fetch_add(1);
    usleep(20000);
  }
  CHECK(gone == -1);
  CHECK(at_once || board.member(0).beats.load() > 3);
  kill(child, SIGKILL);
  while (gone == -1 && seconds() < 5) usleep(1000);
  CHECK(gone == 1);
  CHECK(!at_once || seconds() < 1.3);
  waitpid(child, nullptr, 0);
}

// A process that is another one than the one that greets, and whose memory loses its name.
class Ended final : public Rendezvous {
 public:
  Ended(std::shared_ptr<Rendezvous> mine, Identity other)
      : mine_(std::move(mine)), other_(std::move(other)) {}
  int process() const override { return mine_->process(); }
  int processes() const override { return mine_->processes(); }
  std::vector<std::string> all_gather(const std::string& text) override {
    std::string said = text;
    const Identity own = own_identity();
    const std::size_t at = said.find(std::string(reinterpret_cast<const char*>(&own), sizeof own));
    if (at != std::string::npos) std::memcpy(said.data() + at, &other_, sizeof other_);
    const std::size_t name = said.find("/asyncdiff-");
    if (name != std::string::npos) CHECK(shm_unlink(said.c_str() + name) == 0);
    return mine_->all_gather(said);
  }

 private:
  std::shared_ptr<Rendezvous> mine_;
  Identity other_;
};

// It made the memory of all, and was killed; whoever noticed took the memory's name away before
// another one had opened it.
void whose_memory_is_gone_is_told(bool number_is_anothers) {
  Identity other = own_identity();
  if (number_is_anothers) {
    other.start += 100000;
  } else {
    other.pid = fork();
    if (other.pid == 0) _exit(0);
    waitpid(other.pid, nullptr, 0);
  }
  std::atomic<int> lost{0};
  const auto thrown = in_processes(3, [&](int p, std::shared_ptr<Rendezvous> rendezvous) {
    if (p == 0) rendezvous = std::make_shared<Ended>(rendezvous, other);
    try {
      greet(*rendezvous, 4096, 1);
    } catch (const ProcessLost& error) {
      if (error.process == 0) ++lost;
      throw;
    }
  });
  for (const std::string& text : thrown) CHECK(has(text, "process 0 has ended"));
  CHECK(lost == 3);
}

}  // namespace

int main() {
  hosts_are_told_apart();
  only_our_memory_is_opened();
  who_lives_is_known();
  a_beginning_is_the_same_for_all();
  an_end_is_noticed(false);
  an_end_is_noticed(true);
  whose_memory_is_gone_is_told(false);
  whose_memory_is_gone_is_told(true);
}
