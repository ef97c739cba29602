// A library with NCCL's calls, for tests: it connects nobody, and does what it is told to do.
#include "fake_nccl.hpp"

#include <atomic>
#include <chrono>
#include <cstring>
#include <thread>

extern "C" {

FakeNccl fake_nccl;
}

namespace {

struct Communicator {
  int state = 0;
};

// How often one has been aborted while a message waited.
void wait(const std::atomic<bool>& waits, int aborted) {
  while (waits && fake_nccl.aborted == aborted) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
}

int message() {
  wait(fake_nccl.messages_wait, fake_nccl.aborted);
  return fake_nccl.send_result;
}

}  // namespace

extern "C" {

int ncclGetVersion(int* version) {
  *version = FAKE_NCCL_VERSION;
  return 0;
}

struct Id {
  char bytes[128];
};

int ncclGetUniqueId(Id* id) {
  std::memset(id->bytes, 7, sizeof id->bytes);
  return fake_nccl.id_result;
}

int ncclCommInitRankConfig(Communicator** out, int ranks, Id id, int rank, void* config) {
  std::memcpy(fake_nccl.config, config, sizeof fake_nccl.config);
  fake_nccl.ranks = ranks;
  fake_nccl.rank = rank;
  fake_nccl.id_byte = id.bytes[127];
  if (fake_nccl.make_result != 0) return fake_nccl.make_result;
  while (fake_nccl.making_waits) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  *out = new Communicator;
  ++fake_nccl.made;
  return 0;
}

int ncclCommGetAsyncError(Communicator*, int* state) {
  *state = fake_nccl.state;
  return 0;
}

int ncclCommFinalize(Communicator*) {
  ++fake_nccl.finalized;
  return 0;
}

int ncclCommDestroy(Communicator* one) {
  ++fake_nccl.destroyed;
  delete one;
  return 0;
}

int ncclCommAbort(Communicator* one) {
  while (fake_nccl.aborts_wait) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  ++fake_nccl.aborted;
  delete one;
  return 0;
}

#ifndef FAKE_NCCL_WITHOUT_SEND
int ncclSend(const void*, std::size_t count, int type, int peer, Communicator*, void* stream) {
  fake_nccl.last = {count, type, peer, stream};
  return message();
}
#endif

int ncclRecv(void*, std::size_t count, int type, int peer, Communicator*, void* stream) {
  fake_nccl.last = {count, type, peer, stream};
  return message();
}

const char* ncclGetErrorString(int result) { return result == 6 ? "remote error" : "other error"; }
const char* ncclGetLastError(Communicator*) { return "the cable is out"; }
}
