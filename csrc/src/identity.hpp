// Who a process is, and on which host, for the others of its fabric.
#pragma once

#include <cstdint>

namespace asyncdiff {

// Plain memory: it is sent to other processes.
struct Identity {
  std::int32_t pid;
  std::uint32_t reserved;
  std::uint64_t start;          // when the process began, in ticks since boot; 0 unknown
  std::uint64_t pid_namespace;  // 0 unknown
  char machine[72];             // the same for all processes of a host, and of no other
  char host[64];                // its name, for messages
};

Identity own_identity();

// Containers may share /dev/shm and not know each other's processes. Zero: unknown. Asked each
// time, because a fork may change it.
std::uint64_t pid_namespace();

// Whether a process of this PID namespace has not ended; one that nobody has waited for yet has.
bool lives(std::int32_t pid);
// Whether a process of this PID namespace is stopped, by a signal or a debugger.
bool stopped(std::int32_t pid);
// When a process of this PID namespace began; 0 unknown.
std::uint64_t start_of(std::int32_t pid);

// Whether the number of a process of this PID namespace is another's by now, which began at another
// time.
bool is_anothers(const Identity& who);
// Whether a process is known to have ended; of this host and PID namespace alone is that known.
bool has_ended(const Identity& who, const Identity& self);

// How often this process and its ancestors were forked: a child has another number than its parent.
unsigned forks();

}  // namespace asyncdiff
