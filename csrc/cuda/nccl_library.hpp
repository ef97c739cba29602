// NCCL, loaded at run time: building needs nothing of it, and neither does who uses one host.
#pragma once

#include <cstddef>
#include <string>

#include "asyncdiff/nccl.hpp"

namespace asyncdiff {

// A communicator as NCCL has it.
struct NcclHandle;

// What NCCL has both sides of a communicator told, by other means, before they make it.
struct NcclUniqueId {
  char bytes[128];
};

// A result, the same in all versions; others are failures whose text NCCL has.
constexpr int kNcclSuccess = 0, kNcclRemoteError = 6, kNcclInProgress = 7;

// How a communicator is made, as it was in NCCL 2.18: newer versions know by `size` and `version`
// what is missing.
struct NcclConfig {
  static constexpr int kUndefined = -2147483647 - 1;

  std::size_t size = sizeof(NcclConfig);
  unsigned magic = 0xcafebeef;
  unsigned version = 21800;
  int blocking = kUndefined;
  int cluster_size = kUndefined;
  int fewest_blocks = kUndefined;
  int most_blocks = kUndefined;
  const char* network = nullptr;
  int share_split = kUndefined;
};
static_assert(sizeof(NcclConfig) == 48 && offsetof(NcclConfig, network) == 32);

// The calls that are used here, with NCCL's parameters; streams are cudaStream_t.
class NcclLibrary {
 public:
  // The one of this process, loaded at the first call: what env::nccl() names; else what is loaded
  // already; else what the loader finds, or set_nccl_path() named. Throws NcclError, saying what to
  // install, where there is none or it is too old; the next call then tries again.
  static const NcclLibrary& get();

  // The library in this file.
  explicit NcclLibrary(const std::string& path);

  // As 2.27.5
  std::string version() const;
  // Throws NcclError, with NCCL's text, unless it is a success or in progress.
  void check(int result, const std::string& what, NcclHandle* communicator = nullptr) const;

  int (*get_unique_id)(NcclUniqueId*);
  int (*make)(NcclHandle**, int ranks, NcclUniqueId, int rank, NcclConfig*);
  int (*finalize)(NcclHandle*);
  int (*destroy)(NcclHandle*);
  int (*abort)(NcclHandle*);
  int (*async_error)(NcclHandle*, int* result);
  int (*send)(const void*, std::size_t count, int type, int peer, NcclHandle*, void* stream);
  int (*receive)(void*, std::size_t count, int type, int peer, NcclHandle*, void* stream);

 private:
  explicit NcclLibrary(void* loaded);

  const char* (*error_string_)(int);
  const char* (*last_error_)(NcclHandle*);
  int version_ = 0;
};

}  // namespace asyncdiff
