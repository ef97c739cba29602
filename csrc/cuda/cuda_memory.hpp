// Device memory and pinned host memory.
#pragma once

#include <cstddef>

#include "asyncdiff/memory.hpp"
#include "asyncdiff/processes.hpp"

namespace asyncdiff {

// Zeroed device memory. Throws CudaError, naming the size, where there is not enough.
Buffer allocate_device(int device, std::size_t nbytes);

// Zeroed host memory that every device can read and write at the same address. Pinned with `device`
// current: with another one, that one would get a context.
Buffer allocate_pinned(int device, std::size_t nbytes);

// The same, seen by all of the party; made by process `creator`. Collective; `device` is this
// process's own.
Buffer share_pinned(const Party& party, int creator, int device, std::size_t nbytes);

// Sets the first nbytes to zero, or to another byte, and waits until they are.
void clear(const Buffer& buffer, std::size_t nbytes, unsigned char value = 0);

}  // namespace asyncdiff
