#include <unistd.h>

#include <algorithm>
#include <cctype>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <map>
#include <memory>
#include <mutex>
#include <sstream>
#include <string>
#include <tuple>
#include <vector>

#include "asyncdiff/cuda_fabric.hpp"
#include "asyncdiff/env.hpp"
#include "check.hpp"
#include "cuda_memory.hpp"
#include "device_guard.hpp"

namespace asyncdiff {

namespace {

constexpr int kRepeats = 5;
// A busy GPU gives no figures worth keeping, and others may be waiting for this process.
constexpr std::chrono::seconds kLongest(3);

// Of a ping-pong in one graph; even, so that replays keep their slots.
int rounds_for(std::size_t nbytes) { return nbytes < (std::size_t{1} << 20) ? 20 : 4; }

// Two NVLinked H200s, one way, as the prototype measured them; inline was not measured.
PutCosts usual_costs() {
  PutCosts out;
  out.rows = {{std::size_t{64} << 10, 0, 2.9, 6.4},
              {std::size_t{1} << 20, 0, 5.3, 8.6},
              {std::size_t{4} << 20, 0, 14.1, 17.1},
              {std::size_t{16} << 20, 0, 48, 51},
              {std::size_t{64} << 20, 0, 185, 178}};
  out.copy_node_us = 2.2;
  return out;
}

struct Stream_ {
  explicit Stream_(int index) : device(index) {
    const DeviceGuard guard(device);
    check_cuda(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "making a stream");
  }
  // Without a guard the runtime would make the current device a context, which may be another GPU.
  ~Stream_() {
    quietly_on(device, [this] { cudaStreamDestroy(stream); });
  }
  Stream_(const Stream_&) = delete;
  Stream_& operator=(const Stream_&) = delete;
  operator Stream() const { return reinterpret_cast<Stream>(stream); }

  int device;
  cudaStream_t stream = nullptr;
};

struct Graph {
  template <class Work>
  Graph(const Stream_& on, Work work) : device(on.device) {
    const DeviceGuard guard(device);
    check_cuda(cudaStreamBeginCapture(on.stream, cudaStreamCaptureModeThreadLocal), "capturing");
    cudaGraph_t graph = nullptr;
    try {
      work();
    } catch (...) {
      cudaStreamEndCapture(on.stream, &graph);
      if (graph != nullptr) cudaGraphDestroy(graph);
      throw;
    }
    check_cuda(cudaStreamEndCapture(on.stream, &graph), "capturing");
    const cudaError_t code = cudaGraphInstantiate(&ready, graph, 0);
    cudaGraphDestroy(graph);
    check_cuda(code, "making a graph");
  }
  ~Graph() {
    quietly_on(device, [this] { cudaGraphExecDestroy(ready); });
  }
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;
  void launch(const Stream_& on) const {
    const DeviceGuard guard(device);
    check_cuda(cudaGraphLaunch(ready, on.stream), "launching a graph");
  }

  int device;
  cudaGraphExec_t ready = nullptr;
};

class Clock {
 public:
  explicit Clock(const Stream_& on) : on_(on) {
    const DeviceGuard guard(on.device);
    check_cuda(cudaEventCreate(&begun_), "making an event");
    check_cuda(cudaEventCreate(&ended_), "making an event");
  }
  ~Clock() {
    cudaEventDestroy(begun_);
    cudaEventDestroy(ended_);
  }
  Clock(const Clock&) = delete;
  Clock& operator=(const Clock&) = delete;
  void start() { check_cuda(cudaEventRecord(begun_, on_.stream), "recording an event"); }
  double stop_us() {
    check_cuda(cudaEventRecord(ended_, on_.stream), "recording an event");
    check_cuda(cudaEventSynchronize(ended_), "measuring puts");
    float ms = 0;
    check_cuda(cudaEventElapsedTime(&ms, begun_, ended_), "reading events");
    return 1e3 * static_cast<double>(ms);
  }

 private:
  const Stream_& on_;
  cudaEvent_t begun_ = nullptr;
  cudaEvent_t ended_ = nullptr;
};

// Half of the round trip of a bundle, between two captured graphs, in microseconds.
double one_way_us(CudaFabric& fabric, Mode mode, std::size_t nbytes, std::size_t tensors) {
  const int here = fabric.devices()[0];
  const int there = fabric.devices()[1];
  const auto size = static_cast<std::int64_t>(nbytes / tensors);
  const Layout layout(std::vector<TensorSpec>(tensors, TensorSpec("uint8", {size})));
  const Buffer first = allocate_device(here, nbytes);
  const Buffer second = allocate_device(there, nbytes);
  const auto ping = fabric.channel(0, {1}, layout, 2, "ping", mode);
  const auto pong = fabric.channel(1, {0}, layout, 2, "pong", mode);
  const Stream_ left(here);
  const Stream_ right(there);
  const int rounds = rounds_for(nbytes);
  const auto put = [&](Channel& channel, const Buffer& from, int slot, Stream stream) {
    std::vector<const void*> pieces;
    for (std::size_t i = 0; i < tensors; ++i) pieces.push_back(from.data + i * nbytes / tensors);
    channel.put(pieces, slot, stream);
  };
  const Graph ours(left, [&] {
    for (int n = 0; n < rounds; ++n) {
      put(*ping, first, n % 2, left);
      if (n > 0) pong->release(0, (n - 1) % 2, left);
      pong->get(0, n % 2, left);
    }
    pong->release(0, (rounds - 1) % 2, left);
  });
  const Graph theirs(right, [&] {
    for (int n = 0; n < rounds; ++n) {
      ping->get(1, n % 2, right);
      put(*pong, second, n % 2, right);  // the consumer's next kernel
      ping->release(1, n % 2, right);
    }
  });
  const DeviceGuard guard(here);
  Clock clock(left);
  std::vector<double> all;
  for (int i = 0; i < kRepeats; ++i) {
    theirs.launch(right);
    clock.start();
    ours.launch(left);
    all.push_back(clock.stop_us() / (2 * rounds));
  }
  check_cuda(cudaStreamSynchronize(right.stream), "measuring puts");
  fabric.check();
  // The least: what disturbs only adds.
  return *std::min_element(all.begin(), all.end());
}

PutCosts measure(int from, int to, Transport transport) {
  constexpr std::size_t kLargestInline = std::size_t{256} << 10;
  PutCosts out;
  const auto begun = std::chrono::steady_clock::now();
  for (int shift = 10; shift <= 26; shift += 2) {
    if (std::chrono::steady_clock::now() - begun > kLongest) throw Error("the GPU is busy");
    const std::size_t nbytes = std::size_t{1} << shift;
    // A fabric each: mailboxes of 64 MiB are not kept longer than needed.
    CudaFabric fabric({from, to}, 5.0, transport);
    PutCosts::Row row{nbytes, 0, 0, 0};
    if (nbytes <= kLargestInline) row.inline_us = one_way_us(fabric, Mode::kInline, nbytes, 1);
    row.kernel_us = one_way_us(fabric, Mode::kKernel, nbytes, 1);
    row.copy_us = one_way_us(fabric, Mode::kCopy, nbytes, 1);
    if (shift == 16) {
      constexpr std::size_t kMany = 8;
      const double many = one_way_us(fabric, Mode::kCopy, nbytes, kMany);
      out.copy_node_us = std::max(0.0, (many - row.copy_us) / (kMany - 1));
    }
    out.rows.push_back(row);
    fabric.close();
  }
  return out;
}

std::string name_of_device(int device) {
  cudaDeviceProp properties;
  check_cuda(cudaGetDeviceProperties(&properties, device), "naming a device");
  std::string out;
  for (const char* c = properties.name; *c != '\0'; ++c) {
    out += std::isalnum(static_cast<unsigned char>(*c)) != 0 ? *c : '-';
  }
  return out;
}

std::filesystem::path file_for(int from, int to, Transport transport) {
  const std::string folder = env::cache();
  if (folder.empty()) return {};
  const char* link = transport == Transport::kStaged ? "staged" : from == to ? "memory" : "peer";
  std::string name = "put-" + name_of_device(from);
  if (from != to) name += "-" + name_of_device(to);
  return std::filesystem::path(folder) / (name + "-" + link + ".txt");
}

// A file that cannot be read or written is no reason to fail.
bool read(const std::filesystem::path& file, PutCosts& into) {
  std::ifstream in(file);
  if (!in) return false;
  std::stringstream text;
  text << in.rdbuf();
  try {
    into = PutCosts::from_text(text.str());
    return true;
  } catch (const InvalidArgument&) {
    return false;
  }
}

void write(const std::filesystem::path& file, const PutCosts& costs) {
  std::error_code ignored;
  std::filesystem::create_directories(file.parent_path(), ignored);
  // Whole or not at all, also where several processes write it.
  std::filesystem::path fresh = file;
  fresh += "." + std::to_string(getpid());
  {
    std::ofstream out(fresh);
    out << costs.to_text();
    if (!out.flush()) return;
  }
  std::filesystem::rename(fresh, file, ignored);
}

}  // namespace

PutCosts put_costs(int from, int to, Transport transport) {
  static std::mutex mutex;
  static auto* known = new std::map<std::tuple<int, int, Transport>, PutCosts>;
  const std::lock_guard lock(mutex);
  const auto key = std::make_tuple(from, to, transport);
  const auto found = known->find(key);
  if (found != known->end()) return found->second;
  const std::filesystem::path file = file_for(from, to, transport);
  PutCosts out;
  if (file.empty() || !read(file, out)) {
    try {
      out = measure(from, to, transport);
      if (!file.empty()) write(file, out);
    } catch (const Error&) {
      out = usual_costs();
    }
  }
  return (*known)[key] = out;
}

}  // namespace asyncdiff
