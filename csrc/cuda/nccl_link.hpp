// What carries bundles from one rank to another, on another host.
#pragma once

#include <cstddef>
#include <cstdint>

namespace asyncdiff {

// Words that are set once a message has been carried, after its bytes.
struct Publication {
  std::uint64_t* device;  // in device memory, for kernels that wait; null where none does
  std::uint64_t bundle;   // what it is set to
  std::uint64_t* host;    // in host memory
  std::uint64_t message;  // what it is set to
};

// One side of it. Both sides enqueue the same messages in the same order, at about the same time,
// and wait for none of them. Throws NcclError.
class NcclLink {
 public:
  virtual ~NcclLink() = default;
  virtual void send(const std::byte* from, std::size_t nbytes, const Publication& then) = 0;
  virtual void receive(std::byte* to, std::size_t nbytes, const Publication& then) = 0;
  // Throws where the connection has failed.
  virtual void check() = 0;
  // Ends what is under way. Waits for nothing.
  virtual void abort() noexcept = 0;
};

}  // namespace asyncdiff
