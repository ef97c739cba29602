#include "identity.hpp"

#include <dirent.h>
#include <pthread.h>
#include <signal.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <sstream>
#include <string>

#include "asyncdiff/env.hpp"
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
  std::uint64_t flags = 0;
  std::uint64_t start = 0;

  // Also one that has begun to end: its sockets may be closed already, which others see.
  bool ended() const {
    constexpr std::uint64_t kExiting = 4;  // PF_EXITING of the kernel
    return state == 'Z' || state == 'X' || (flags & kExiting) != 0;
  }
};

// Of a file like /proc/PID/stat: the third field, the 9th and the 22nd. The second may hold spaces
// and parentheses.
Stat stat_in(const std::string& folder) {
  const std::string line = first_line(folder + "/stat");
  const std::size_t name_end = line.rfind(')');
  Stat out;
  if (name_end == std::string::npos) return out;
  std::istringstream in(line.substr(name_end + 1));
  in >> out.state;
  std::string skipped;
  for (int field = 4; field < 9; ++field) in >> skipped;
  in >> out.flags;
  for (int field = 10; field < 22; ++field) in >> skipped;
  in >> out.start;
  return out;
}

std::string folder_of(std::int32_t pid) { return "/proc/" + std::to_string(pid); }

std::atomic<unsigned> fork_count{0};

}  // namespace

std::uint64_t pid_namespace() {
  struct stat status{};
  return stat("/proc/self/ns/pid", &status) == 0 ? status.st_ino : 0;
}

Identity own_identity() {
  Identity out{};
  out.pid = getpid();
  out.start = start_of(out.pid);
  out.pid_namespace = pid_namespace();
  gethostname(out.host, sizeof out.host - 1);
  const std::string boot = first_line("/proc/sys/kernel/random/boot_id");  // this run of a kernel
  copy_text(out.machine, boot.empty() ? "host " + std::string(out.host) : "boot " + boot);
  const std::string named = env::host();
  if (named.empty()) return out;
  copy_text(out.host, named);
  copy_text(out.machine, "named " + named);
  return out;
}

bool stopped(std::int32_t pid) {
  const char state = stat_in(folder_of(pid)).state;
  return state == 'T' || state == 't';
}

bool lives(std::int32_t pid) {
  if (kill(pid, 0) != 0 && errno == ESRCH) return false;
  const std::string threads = folder_of(pid) + "/task";
  DIR* folder = opendir(threads.c_str());
  if (folder == nullptr) return errno != ENOENT;  // where it cannot be asked, it may live
  bool out = false;
  while (const dirent* entry = readdir(folder)) {
    if (entry->d_name[0] == '.') continue;
    const Stat stat = stat_in(threads + "/" + entry->d_name);
    out = out || (stat.state != '?' && !stat.ended());
  }
  closedir(folder);
  return out;
}

// Of the first thread, which begins with the process: an emulator of another architecture answers
// for a process's own file itself, with the beginning of the one that it was forked from.
std::uint64_t start_of(std::int32_t pid) {
  return stat_in(folder_of(pid) + "/task/" + std::to_string(pid)).start;
}

bool is_anothers(const Identity& who) {
  const std::uint64_t start = start_of(who.pid);
  return who.start != 0 && start != 0 && start != who.start;
}

bool has_ended(const Identity& who, const Identity& self) {
  const bool near = std::strcmp(who.machine, self.machine) == 0 && self.pid_namespace != 0 &&
                    who.pid_namespace == self.pid_namespace;
  return near && (!lives(who.pid) || is_anothers(who));
}

unsigned forks() {
  static const int watched = pthread_atfork(nullptr, nullptr, [] { ++fork_count; });
  static_cast<void>(watched);
  return fork_count.load(std::memory_order_relaxed);
}

}  // namespace asyncdiff
