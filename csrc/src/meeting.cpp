#include "meeting.hpp"

#include <unistd.h>

#include <map>
#include <set>
#include <string>
#include <utility>

#include "asyncdiff/errors.hpp"
#include "asyncdiff/interrupt.hpp"

namespace asyncdiff {

namespace {

// Takes the path of a Unix socket away again.
class Path {
 public:
  explicit Path(const std::string& path) : path_(path) {}
  ~Path() {
    if (!path_.empty()) unlink(path_.c_str());
  }
  Path(const Path&) = delete;
  Path& operator=(const Path&) = delete;

 private:
  std::string path_;
};

}  // namespace

std::map<int, Wire> wait_for_others(const SocketAddress& address, int processes,
                                    const std::string& key, double timeout) {
  if (processes == 1) return {};
  std::set<int> others;
  for (int p = 1; p < processes; ++p) others.insert(p);
  Door door(listen_at(address, processes + 64), others, processes, key);
  const Path path(address.path);
  if (door.wait(after(timeout))) return std::move(door.in());
  std::string there = "0";
  for (const auto& [p, wire] : door.in()) there += ", " + std::to_string(p);
  const std::string text =
      "only processes [" + there + "] of " + std::to_string(processes) + " came within " +
      seconds_text(timeout) +
      (door.strangers().empty() ? "" : " (of the connections that came, " + door.strangers() + ")");
  for (auto& [p, wire] : door.in()) wire.tell_end(kLate, door.missing(), text);
  throw CollectiveTimeout(door.missing(), {}, text);
}

std::map<int, Wire> join_first(const SocketAddress& address, int process, int processes,
                               const std::string& key, double timeout) {
  const Clock::time_point limit = after(timeout);
  std::string why = "it does not listen";
  std::map<int, Wire> out;
  for (bool first = true; first || Clock::now() < limit; first = false) {
    if (!first) {
      usleep(20000);
      check_interrupt();
    }
    if (knock(address, process, processes, key, 0, limit, out, why)) return out;
  }
  throw CollectiveTimeout(0, {},
                          "process 0 was not met at " + text_of(address) + " within " +
                              seconds_text(timeout) + ": " + why);
}

}  // namespace asyncdiff
