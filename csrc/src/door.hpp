// How a process that listens lets others in, and how those come in: both prove that they know a
// key.
#pragma once

#include <list>
#include <map>
#include <set>
#include <string>

#include "frames.hpp"

namespace asyncdiff {

Clock::time_point after(double seconds);
std::string seconds_text(double seconds);

// Listens to all connections at once, so that strangers hold nobody up.
class Door {
 public:
  // For processes with these numbers, of so many.
  Door(Socket listener, std::set<int> expected, int processes, std::string key);

  // Whether all have come in until the limit. Throws InvalidArgument for one that knows the key,
  // but is none of them.
  bool wait(Clock::time_point limit);
  // Connections to those that have, by process.
  std::map<int, Wire>& in() { return in_; }
  // The first of those that have not.
  int missing() const;
  // What was the matter with the last connection of somebody else; empty where there was none.
  const std::string& strangers() const { return strangers_; }

 private:
  struct Guest {
    Socket socket;
    std::string hello;
    std::string said;
    Clock::time_point limit;
  };

  void let_in();
  bool listen_to(Guest& guest);

  Socket listener_;
  std::set<int> expected_;
  int processes_;
  std::string key_;
  std::list<Guest> guests_;
  std::map<int, Wire> in_;
  std::string strangers_;
};

// Tries once to come in as `process` of so many, and adds the connection as that to process `whom`.
// False where nobody listens yet, or the time is over: `why` says what was in the way. Throws
// AuthenticationError where the other side has another key, InvalidArgument where it refuses.
bool knock(const SocketAddress& address, int process, int processes, const std::string& key,
           int whom, Clock::time_point limit, std::map<int, Wire>& in, std::string& why);

}  // namespace asyncdiff
