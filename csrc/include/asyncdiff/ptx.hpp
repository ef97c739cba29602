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

// Sets a word of this device. What it was before: of all threads that set it, one gets zero.
__device__ __forceinline__ unsigned set_relaxed_device(unsigned* address) {
  unsigned before;
  asm volatile("atom.exch.relaxed.gpu.global.b32 %0, [%1], 1;"
               : "=r"(before)
               : "l"(address)
               : "memory");
  return before;
}

// Words of this device that its kernels share: what was there before.
__device__ __forceinline__ std::uint64_t exchange_device(std::uint64_t* address,
                                                         std::uint64_t value) {
  std::uint64_t before;
  asm volatile("atom.exch.relaxed.gpu.global.b64 %0, [%1], %2;"
               : "=l"(before)
               : "l"(address), "l"(value)
               : "memory");
  return before;
}

__device__ __forceinline__ std::uint64_t add_device(std::uint64_t* address, std::uint64_t value) {
  std::uint64_t before;
  asm volatile("atom.add.relaxed.gpu.global.u64 %0, [%1], %2;"
               : "=l"(before)
               : "l"(address), "l"(value)
               : "memory");
  return before;
}

// Sets the word if it is what was expected.
__device__ __forceinline__ std::uint64_t compare_and_swap_device(std::uint64_t* address,
                                                                 std::uint64_t expected,
                                                                 std::uint64_t value) {
  std::uint64_t before;
  asm volatile("atom.cas.relaxed.gpu.global.b64 %0, [%1], %2, %3;"
               : "=l"(before)
               : "l"(address), "l"(expected), "l"(value)
               : "memory");
  return before;
}

// Programmatic dependent launch (compute capability 9.0 and later): a kernel that was launched so
// is set up while the one before it in the stream still runs. Here it waits until that one has
// ended and its memory is visible. Without such a launch, nothing to wait for.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// From here on the kernel after this one may be set up. After wait_for_previous_kernel(), so that
// only one kernel lies in wait at a time: its blocks hold on to a multiprocessor's threads.
__device__ __forceinline__ void let_next_kernel_launch() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Has a value of 8 bytes in registers here, and not only where it is used: of a kernel's parameter,
// which lies in memory, before a wait.
template <class T>
__device__ __forceinline__ void hold(T& value) {
  asm volatile("" : "+l"(value));
}

// Nanoseconds of a clock that all multiprocessors of a device share; coarse (up to 1 us).
__device__ __forceinline__ std::uint64_t global_nanoseconds() {
  std::uint64_t now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  return now;
}

}  // namespace asyncdiff::ptx
