// How the processes of a rendezvous over sockets come together.
#pragma once

#include <map>
#include <string>

#include "door.hpp"

namespace asyncdiff {

// Process 0: connections to all others, by process. As SocketRendezvous says.
std::map<int, Wire> wait_for_others(const SocketAddress& address, int processes,
                                    const std::string& key, double timeout);
// Another process: its connection to process 0.
std::map<int, Wire> join_first(const SocketAddress& address, int process, int processes,
                               const std::string& key, double timeout);

}  // namespace asyncdiff
