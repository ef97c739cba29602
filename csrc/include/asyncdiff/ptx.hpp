// Every PTX instruction that the library writes itself. For device code only.
#pragma once

#include <cstdint>

namespace asyncdiff::ptx {

// Loads a flag that another device writes; what was written before the flag is visible after.
__device__ __forceinline__ std::uint64_t load_acquire_system(const std::uint64_t* address) {
  std::uint64_t value;
  asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(address) : "memory");
  return value;
}

// Stores a flag after everything that this thread saw or wrote before.
__device__ __forceinline__ void store_release_system(std::uint64_t* address, std::uint64_t value) {
  asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(address), "l"(value) : "memory");
}

// A load that always goes to memory and orders nothing.
__device__ __forceinline__ std::uint64_t load_relaxed_system(const std::uint64_t* address) {
  std::uint64_t value;
  asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(address) : "memory");
  return value;
}

// Two words at a 16-byte address. Each arrives whole; they need not arrive together.
struct Words {
  std::uint64_t first;
  std::uint64_t second;
};

__device__ __forceinline__ Words load_words_relaxed_system(const void* address) {
  Words w;
  asm volatile("ld.relaxed.sys.global.v2.u64 {%0, %1}, [%2];"
               : "=l"(w.first), "=l"(w.second)
               : "l"(address)
               : "memory");
  return w;
}

__device__ __forceinline__ void store_words_relaxed_system(void* address, Words w) {
  asm volatile("st.relaxed.sys.global.v2.u64 [%0], {%1, %2};" ::"l"(address), "l"(w.first),
               "l"(w.second)
               : "memory");
}

// Adds one to a counter that blocks of one kernel share. What they did before adding is visible to
// who reads their sum.
__device__ __forceinline__ unsigned add_one_acquire_release_device(unsigned* address) {
  unsigned before;
  asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], 1;"
               : "=r"(before)
               : "l"(address)
               : "memory");
  return before;
}

// Nanoseconds of a clock that all multiprocessors of a device share; coarse (up to 1 us).
__device__ __forceinline__ std::uint64_t global_nanoseconds() {
  std::uint64_t now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  return now;
}

}  // namespace asyncdiff::ptx
