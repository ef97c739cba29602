#include "asyncdiff/cuda_fabric.hpp"

#include <algorithm>
#include <atomic>
#include <set>
#include <utility>

#include "check.hpp"
#include "cuda_channel.hpp"
#include "cuda_shared.hpp"
#include "kernels.hpp"

namespace asyncdiff {

namespace {

// Words that devices write while the host reads.
std::uint64_t load_acquire(const std::uint64_t* word) {
  return __atomic_load_n(word, __ATOMIC_ACQUIRE);
}

const char* name_of(std::uint64_t operation) {
  switch (static_cast<Operation>(operation)) {
    case Operation::kBegin:
      return "begin";
    case Operation::kCommit:
      return "commit";
    case Operation::kGet:
      return "get";
    case Operation::kRelease:
      return "release";
  }
  return "unknown operation";
}

}  // namespace

Transport transport_from(const std::string& name) {
  if (name == "auto") return Transport::kAuto;
  if (name == "peer") return Transport::kPeer;
  if (name == "staged") return Transport::kStaged;
  throw InvalidArgument("transport '" + name + "': choose auto, peer or staged");
}

int cuda_device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) == cudaSuccess) return count;
  cudaGetLastError();
  return 0;
}

Guard CudaFabric::Shared::new_end(int rank, const std::string& channel) {
  auto* record = static_cast<FailureRecord*>(lines.take(Buffer::kHost));
  ends.push_back({record, rank, channel});
  return {abort_word, record, static_cast<std::uint64_t>(deadline * 1e9)};
}

CudaFabric::CudaFabric(std::vector<int> devices, double deadline_seconds, Transport transport)
    : Fabric(static_cast<int>(devices.size()), deadline_seconds),
      shared_(std::make_shared<Shared>()) {
  const int count = cuda_device_count();
  for (int device : devices) {
    if (device < 0 || device >= count) {
      throw DeviceError("CUDA device " + std::to_string(device) + " does not exist: there " +
                        (count == 0   ? "is none (no GPU, or no driver)"
                         : count == 1 ? "is one, device 0"
                                      : "are " + std::to_string(count) + ", from 0"));
    }
  }
  for (int device : std::set<int>(devices.begin(), devices.end())) {
    const DeviceGuard guard(device);
    preload_kernels();
  }
  shared_->devices = std::move(devices);
  shared_->deadline = deadline();
  shared_->transport = transport;
  if (transport != Transport::kStaged) {
    shared_->links = find_links(shared_->devices, transport == Transport::kPeer);
  }
  shared_->abort_word = static_cast<std::uint64_t*>(shared_->lines.take(Buffer::kHost));
}

CudaFabric::~CudaFabric() = default;

const std::vector<int>& CudaFabric::devices() const { return shared_->devices; }

std::map<std::pair<int, int>, std::string> CudaFabric::links() const {
  std::map<std::pair<int, int>, std::string> out;
  for (int a = 0; a < ranks(); ++a) {
    for (int b = 0; b < ranks(); ++b) {
      const bool same =
          devices()[static_cast<std::size_t>(a)] == devices()[static_cast<std::size_t>(b)];
      const bool direct = a == b || shared_->link(a, b).direct;
      out[{a, b}] = !direct ? "staged" : same ? "memory" : "peer";
    }
  }
  return out;
}

std::map<std::pair<int, int>, std::string> CudaFabric::link_reasons() const {
  std::map<std::pair<int, int>, std::string> out;
  for (int a = 0; a < ranks(); ++a) {
    for (int b = 0; b < ranks(); ++b) {
      if (a == b) continue;
      const Link link = shared_->link(a, b);
      if (!link.direct) out[{a, b}] = link.reason;
    }
  }
  return out;
}

std::shared_ptr<Channel> CudaFabric::channel(int sender, const std::vector<int>& receivers,
                                             const Layout& layout, int slots,
                                             const std::string& name) {
  check_endpoints(sender, receivers, slots);
  if (receivers.size() > static_cast<std::size_t>(kMaxReceivers)) {
    throw InvalidArgument("a channel has at most " + std::to_string(kMaxReceivers) + " receivers");
  }
  {
    const std::lock_guard lock(shared_->mutex);
    shared_->check_open();
  }
  return std::make_shared<CudaChannel>(shared_, name, sender, receivers, layout, slots);
}

void CudaFabric::abort(int rank, const std::string& reason) {
  const std::lock_guard lock(shared_->mutex);
  if (shared_->closed) return;
  if (!shared_->aborted) shared_->aborted.emplace(rank, reason);
  __atomic_store_n(shared_->abort_word, 1, __ATOMIC_RELEASE);
}

void CudaFabric::check() {
  const std::lock_guard lock(shared_->mutex);
  shared_->check_open();
  if (load_acquire(shared_->abort_word) == 0) return;
  const Shared::End* first = nullptr;
  for (const Shared::End& end : shared_->ends) {
    if (load_acquire(&end.record->kind) == 0) continue;
    if (first == nullptr || end.record->time < first->record->time) first = &end;
  }
  if (first != nullptr) {
    const FailureRecord& r = *first->record;
    const Incident incident{
        first->rank, static_cast<int>(r.peer), first->channel, static_cast<int>(r.slot), r.expected,
        r.seen,      name_of(r.operation)};
    if (static_cast<FailureKind>(r.kind) == FailureKind::kTimeout) {
      throw ExchangeTimeout(incident, deadline());
    }
    throw SlotOrderError(incident);
  }
  if (shared_->aborted) throw *shared_->aborted;
}

void CudaFabric::reset() {
  const std::lock_guard lock(shared_->mutex);
  shared_->check_open();
  shared_->lines.clear_all();
  shared_->aborted.reset();
}

void CudaFabric::close() {
  const std::lock_guard lock(shared_->mutex);
  if (shared_->closed) return;
  shared_->closed = true;
  shared_->ends.clear();
  shared_->lines.release_all();
  shared_->abort_word = nullptr;
}

}  // namespace asyncdiff
