// Connections between the processes of a fabric that are on different hosts.
#pragma once

#include <functional>
#include <map>
#include <string>
#include <vector>

#include "asyncdiff/export.hpp"
#include "asyncdiff/interrupt.hpp"
#include "asyncdiff/processes.hpp"
#include "frames.hpp"

namespace asyncdiff {

// Each process listens, tells all others where (its offer), and then connects: of two processes the
// one with the greater number to the other. They prove to each other that they know what was
// offered, and which of them they are.
class Crossing {
 public:
  // hosts[p] is the number of the host of process p. Listens, where there are other hosts.
  Crossing(int process, std::vector<int> hosts);

  std::string offer() const;
  // Connections to all processes of other hosts, by process; offers[p] is that of process p. Throws
  // CollectiveTimeout where one is not reached, or does not connect, within so many seconds, and
  // what check() throws, which is asked all the time.
  std::map<int, Wire> connect(const std::vector<std::string>& offers, double seconds,
                              const std::function<void()>& check = check_interrupt);

 private:
  bool other_host(int process) const;
  // Of the connections to `listener`.
  static std::string key_of(const std::vector<std::string>& offers, int listener);

  int process_;
  std::vector<int> hosts_;
  std::vector<std::string> addresses_;
  int port_ = 0;
  std::string secret_;
  Socket listener_;
};

// The same among processes that have met; collective among all. Throws what a failure of the fabric
// throws, too.
ASYNCDIFF_EXPORT std::map<int, Wire> connect_hosts(const Processes& processes, double seconds);

}  // namespace asyncdiff
