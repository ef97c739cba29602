// What the fake NCCL of the tests was asked to do, and what it is to do.
#pragma once

#include <atomic>
#include <cstddef>

struct FakeNccl {
  static constexpr int kForever = -1;

  // How often a call is still in progress when it is asked for, and what it then is.
  std::atomic<int> polls{0};
  std::atomic<int> state{0};
  std::atomic<int> id_result{0}, make_result{0}, send_result{7};
  std::atomic<bool> aborts_wait{false};

  std::atomic<int> made{0}, finalized{0}, destroyed{0}, aborted{0};
  unsigned char config[48];
  int ranks, rank;
  char id_byte;
  struct {
    std::size_t count;
    int type;
    int peer;
    void* stream;
  } last;
};
