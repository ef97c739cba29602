// How the processes of a fabric tell each other where their memory is.
#pragma once

#include <string>
#include <vector>

#include "asyncdiff/export.hpp"

namespace asyncdiff {

// Implemented by the user over whatever connects the processes already: a torch.distributed store,
// MPI, sockets. Used while fabrics and channels are made and reset, never while data moves.
class ASYNCDIFF_EXPORT Rendezvous {
 public:
  virtual ~Rendezvous() = default;
  virtual int process() const = 0;    // this one, from 0
  virtual int processes() const = 0;  // how many there are
  // Everybody gives bytes and gets everybody's, in order of process. Collective: all processes call
  // it equally often, in the same order. Throws where a process does not come.
  virtual std::vector<std::string> all_gather(const std::string& mine) = 0;
};

}  // namespace asyncdiff
