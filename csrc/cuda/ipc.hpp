// Device memory of other processes, through CUDA IPC.
//
// cudaIpc and not exported virtual-memory descriptors: its handles are plain bytes, which any
// rendezvous can carry; descriptors need a Unix socket between every two processes.
#pragma once

#include <cstddef>
#include <string>

#include "asyncdiff/memory.hpp"

namespace asyncdiff {

// Device memory that can be exported: alone in its 2 MiB blocks, because a handle opens whole ones.
Buffer allocate_exportable(int device, std::size_t nbytes);

// What another process needs to open it: magic, version, size and CUDA's handle, as bytes.
std::string export_device(const Buffer& buffer);
extern const std::size_t kDeviceHandleBytes;  // how long such a handle is

// Maps another process's memory for a device of this one; unmapped with the buffer. Throws
// InvalidArgument for bytes that are no handle of this version and size, CudaError where the device
// cannot reach it.
Buffer import_device(const std::string& handle, int device, std::size_t nbytes);

// The 16 bytes that name a physical device, whatever index processes have for it.
std::string uuid_of(int device);
// The index that this process has for it, or -1.
int device_of(const std::string& uuid);

}  // namespace asyncdiff
