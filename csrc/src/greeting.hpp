// What processes tell each other first, over a rendezvous.
#pragma once

#include <string>
#include <vector>

#include "asyncdiff/memory.hpp"
#include "asyncdiff/rendezvous.hpp"
#include "identity.hpp"

namespace asyncdiff {

struct Greeting {
  std::vector<Identity> identities;  // by process
  Buffer memory;                     // that all of them see
};

// Collective. Throws InvalidArgument where processes are of different machines or versions, and the
// same Error everywhere if it fails in one.
Greeting greet(Rendezvous& rendezvous, std::size_t nbytes);

// Throws InvalidArgument, for `process`, if this is not how another process of this machine greets.
Identity identity_in(const std::string& bytes, int process, const Identity& own);

}  // namespace asyncdiff
