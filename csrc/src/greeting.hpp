// What processes tell each other first, over a rendezvous.
#pragma once

#include <cstddef>
#include <map>
#include <string>
#include <vector>

#include "asyncdiff/memory.hpp"
#include "asyncdiff/rendezvous.hpp"
#include "frames.hpp"
#include "identity.hpp"

namespace asyncdiff {

struct Greeting {
  std::vector<Identity> identities;  // by process
  std::vector<int> hosts;            // by process: numbers from 0, in order of first processes
  Buffer memory;                     // that all processes of this one's host see
  std::map<int, Wire> connections;   // to the processes of other hosts
};

// Collective. Connecting takes `seconds` at most, which should be less than the others wait at the
// rendezvous: else they take who waits for one that is missing. Throws, everywhere,
// CollectiveTimeout for a process that is not reached and ProcessLost for one that is seen to have
// ended; InvalidArgument where processes are of different versions, and the same Error everywhere
// if it fails in one.
Greeting greet(Rendezvous& rendezvous, std::size_t nbytes, double seconds);

// Throws InvalidArgument, for `process`, if this is not how a process greets.
Identity identity_in(const std::string& bytes, int process);

// The number of each process's host.
std::vector<int> hosts_of(const std::vector<Identity>& identities);

}  // namespace asyncdiff
