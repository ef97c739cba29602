// The instructions of ptx.hpp for device_on_cpu.hpp: memory as one sees it whose turn it is.
#pragma once

#include <cstdint>

#include "device_on_cpu.hpp"

namespace asyncdiff::ptx {

inline std::uint64_t load_relaxed_system(const std::uint64_t* address) {
  on_cpu::machine.yield();
  return *address;
}
inline std::uint64_t load_acquire_system(const std::uint64_t* address) {
  return load_relaxed_system(address);
}
inline void store_release_system(std::uint64_t* address, std::uint64_t value) {
  on_cpu::machine.yield();
  *address = value;
  on_cpu::machine.stored(address);
}

struct Words {
  std::uint64_t first;
  std::uint64_t second;
};

inline Words load_words_relaxed_system(const void* address) {
  const auto* words = static_cast<const std::uint64_t*>(address);
  return {words[0], words[1]};
}
inline void store_words_relaxed_system(void* address, Words w) {
  auto* words = static_cast<std::uint64_t*>(address);
  words[0] = w.first;
  words[1] = w.second;
}

inline unsigned add_one_acquire_release_device(unsigned* address) { return (*address)++; }
inline unsigned set_relaxed_device(unsigned* address) {
  on_cpu::machine.yield();
  const unsigned before = *address;
  *address = 1;
  return before;
}

inline std::uint64_t exchange_device(std::uint64_t* address, std::uint64_t value) {
  on_cpu::machine.yield();
  const std::uint64_t before = *address;
  *address = value;
  return before;
}
inline std::uint64_t add_device(std::uint64_t* address, std::uint64_t value) {
  on_cpu::machine.yield();
  const std::uint64_t before = *address;
  *address += value;
  return before;
}
inline std::uint64_t compare_and_swap_device(std::uint64_t* address, std::uint64_t expected,
                                             std::uint64_t value) {
  on_cpu::machine.yield();
  const std::uint64_t before = *address;
  if (before == expected) *address = value;
  return before;
}

inline void wait_for_previous_kernel() {}
inline void let_next_kernel_launch() {}
template <class T>
void hold(T&) {}

inline std::uint64_t global_nanoseconds() { return on_cpu::machine.now(); }

}  // namespace asyncdiff::ptx
