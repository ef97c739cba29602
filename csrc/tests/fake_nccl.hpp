// What the fake NCCL of the tests was asked to do, and what it is to do.
#pragma once

#include <atomic>
#include <cstddef>

struct FakeNccl {
  // Which calls do not return, until this is over; a message's also ends when it is aborted.
  std::atomic<bool> making_waits{false}, messages_wait{false}, aborts_wait{false};
  std::atomic<int> state{0};
  std::atomic<int> id_result{0}, make_result{0}, send_result{0};

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
