// Where processes of other hosts reach this one.
#pragma once

#include <string>
#include <vector>

#include "socket.hpp"

namespace asyncdiff {

// Numeric addresses of this machine, the best first: those of ASYNCDIFF_INTERFACE; else the one by
// which it reaches MASTER_ADDR; else, where nothing is said of that or it is this machine alone,
// all that it has. Throws InvalidArgument for an interface that is not there.
std::vector<std::string> own_addresses();

// Listens at a free port, which `port` becomes: at the address, if there is one alone, else at all.
Socket listen_at_own(const std::vector<std::string>& addresses, int& port);

}  // namespace asyncdiff
