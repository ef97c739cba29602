// How bundles travel between hosts. A fabric that spans hosts has one, for the pairs of ranks that
// share neither memory nor a bus; the others go on as on one host.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "asyncdiff/channel.hpp"
#include "asyncdiff/layout.hpp"
#include "asyncdiff/processes.hpp"

namespace asyncdiff {

class Network {
 public:
  virtual ~Network() = default;

  // What links() says of ranks on different hosts: "sockets" or "nccl".
  virtual std::string name() const = 0;

  // A channel from one rank to one other, on different hosts. Collective among the processes of
  // both, `ends`, which have agreed on the arguments. Slots, waits, deadlines and errors are those
  // of Channel.
  virtual std::shared_ptr<Channel> channel(int sender, int receiver, const Layout& layout,
                                           int slots, const std::string& name,
                                           const Party& ends) = 0;

  // `tell` is called, by any thread, once what crosses hosts has failed: the fabric then aborts
  // everywhere. Empty: nobody is told any more, once this returns.
  virtual void on_failure(std::function<void(int rank, const std::string& reason)> tell) = 0;

  // Ends all waits, now and later, until reset(). Waits for nothing.
  virtual void abort(int rank, const std::string& reason) = 0;
  // Throws the first failure since the last reset. Does not synchronize.
  virtual void check() = 0;
  // Whether reset() helps after a failure or an abort; else the fabric is over then.
  virtual bool recovers() const = 0;
  // Empties all channels; all processes are in it, nothing is in flight. The next bundle of every
  // channel is the first_bundle-th.
  virtual void reset(std::uint64_t first_bundle) = 0;
  virtual void close() = 0;
};

}  // namespace asyncdiff
