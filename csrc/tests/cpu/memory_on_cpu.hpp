// Device memory that is host memory.
#pragma once

namespace on_cpu {

extern bool memory_is_full;  // set by a test: nothing can be allocated

}  // namespace on_cpu
