#include "identity.hpp"

#include <pthread.h>
#include <signal.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdlib>
#include <fstream>
#include <sstream>
#include <string>

#include "copy_text.hpp"

namespace asyncdiff {

namespace {

std::string first_line(const std::string& file) {
  std::ifstream in(file);
  std::string line;
  std::getline(in, line);
  return line;
}

struct Stat {
  char state = '?';
  std::uint64_t start = 0;
};

// Of /proc/PID/stat: the third field and the 22nd. The second may hold spaces and parentheses.
Stat stat_of(std::int32_t pid) {
  const std::string line = first_line("/proc/" + std::to_string(pid) + "/stat");
  const std::size_t name_end = line.rfind(')');
  Stat out;
  if (name_end == std::string::npos) return out;
  std::istringstream in(line.substr(name_end + 1));
  in >> out.state;
  std::string skipped;
  for (int field = 4; field < 22; ++field) in >> skipped;
  in >> out.start;
  return out;
}

std::atomic<unsigned> fork_count{0};

}  // namespace

std::uint64_t pid_namespace() {
  struct stat status{};
  return stat("/proc/self/ns/pid", &status) == 0 ? status.st_ino : 0;
}

Identity own_identity() {
  Identity out{};
  out.pid = getpid();
  out.start = stat_of(out.pid).start;
  out.pid_namespace = pid_namespace();
  copy_text(out.boot, first_line("/proc/sys/kernel/random/boot_id"));
  gethostname(out.host, sizeof out.host - 1);
  return out;
}

bool lives(std::int32_t pid) {
  if (kill(pid, 0) != 0 && errno == ESRCH) return false;
  const char state = stat_of(pid).state;
  return state != 'Z' && state != 'X';
}

std::uint64_t start_of(std::int32_t pid) { return stat_of(pid).start; }

unsigned forks() {
  static const int watched = pthread_atfork(nullptr, nullptr, [] { ++fork_count; });
  static_cast<void>(watched);
  return fork_count.load(std::memory_order_relaxed);
}

}  // namespace asyncdiff
