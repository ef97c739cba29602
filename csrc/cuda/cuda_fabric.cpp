#include "asyncdiff/cuda_fabric.hpp"

#include <algorithm>
#include <cstddef>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "agreement.hpp"
#include "crossing.hpp"
#include "cuda_channel.hpp"
#include "cuda_shared.hpp"
#include "device_guard.hpp"
#include "frames.hpp"
#include "kernels.hpp"
#include "nccl_network.hpp"
#include "spanning_fabric.hpp"

namespace asyncdiff {

namespace {

void check_lengths(const std::vector<int>& devices, const std::vector<int>& owners) {
  if (owners.size() != devices.size()) {
    throw InvalidArgument("devices and owners differ in length: both have one entry a rank");
  }
}

const char* kind_of(const Link& link) {
  return !link.direct ? "staged" : link.same ? "memory" : "peer";
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

CudaFabric::CudaFabric(std::vector<int> devices, double deadline_seconds, Transport transport,
                       std::optional<SimulatedLink> link)
    : Fabric(static_cast<int>(devices.size()), deadline_seconds) {
  shared_ =
      std::make_shared<Shared>(Processes(ranks()), std::move(devices), deadline(), transport, link);
}

CudaFabric::CudaFabric(std::vector<int> devices, std::vector<int> owners, double deadline_seconds,
                       Transport transport, std::shared_ptr<Rendezvous> rendezvous,
                       std::optional<SimulatedLink> link)
    : Fabric(static_cast<int>(devices.size()), deadline_seconds) {
  check_lengths(devices, owners);
  Processes all(std::move(owners), std::move(rendezvous), deadline());
  if (all.hosts() > 1) {
    throw InvalidArgument("the processes are on " + std::to_string(all.hosts()) +
                          " hosts, and a CudaFabric is of one: make_cuda_fabric() spans them");
  }
  shared_ =
      std::make_shared<Shared>(std::move(all), std::move(devices), deadline(), transport, link);
}

CudaFabric::CudaFabric(Processes all, std::vector<int> devices, double deadline_seconds,
                       Transport transport, std::optional<SimulatedLink> link)
    : Fabric(static_cast<int>(devices.size()), deadline_seconds),
      shared_(std::make_shared<Shared>(std::move(all), std::move(devices), deadline(), transport,
                                       link)) {}

std::shared_ptr<Fabric> make_cuda_fabric(std::vector<int> devices, std::vector<int> owners,
                                         double deadline, Transport transport,
                                         std::shared_ptr<Rendezvous> rendezvous,
                                         std::optional<SimulatedLink> link) {
  check_fabric(static_cast<int>(devices.size()), deadline);
  check_lengths(devices, owners);
  Processes all(std::move(owners), std::move(rendezvous), deadline);
  auto here = std::make_shared<CudaFabric>(all, devices, deadline, transport, link);
  if (all.hosts() == 1) return here;
  auto network = make_nccl_network(all, std::move(devices), deadline, connect_hosts(all, deadline));
  return std::make_shared<SpanningFabric>(std::move(here), std::move(network), std::move(all),
                                          true);
}

CudaFabric::~CudaFabric() = default;

const std::vector<int>& CudaFabric::devices() const { return shared_->topology.devices(); }

std::map<std::pair<int, int>, std::string> CudaFabric::links() const {
  std::map<std::pair<int, int>, std::string> out;
  for (int rank = 0; rank < ranks(); ++rank) out[{rank, rank}] = "memory";
  for (const auto& [pair, link] : shared_->topology.links()) {
    out[pair] = shared_->simulated ? "simulated" : kind_of(link);
  }
  return out;
}

std::map<std::pair<int, int>, std::string> CudaFabric::link_reasons() const {
  std::map<std::pair<int, int>, std::string> out;
  for (const auto& [pair, link] : shared_->topology.links()) {
    if (shared_->simulated) {
      out[pair] = simulated_link() + " is simulated over " + kind_of(link);
    } else if (!link.direct) {
      out[pair] = link.reason;
    }
  }
  return out;
}

std::string CudaFabric::simulated_link() const {
  return shared_->simulated ? shared_->simulated.link()->describe() : "";
}

std::shared_ptr<Channel> CudaFabric::channel(int sender, const std::vector<int>& receivers,
                                             const Layout& layout, int slots,
                                             const std::string& name, Mode mode) {
  check_endpoints(sender, receivers, slots);
  if (receivers.size() > static_cast<std::size_t>(kMaxReceivers)) {
    throw InvalidArgument("a channel has at most " + std::to_string(kMaxReceivers) + " receivers");
  }
  shared_->check_open();
  Reclaimer::Taken gone = shared_->reclaimer.free_retired();
  const std::lock_guard lock(shared_->mutex);
  shared_->deal_out_again(std::move(gone));
  const Party ends = ends_of(sender, receivers);
  if (ends.here()) {
    agree_on_channel(ends, sender, receivers, layout, slots, name, mode);
    if (mode == Mode::kAuto) mode = shared_->topology.fastest(ends, sender, receivers, layout);
  } else if (mode == Mode::kAuto) {
    mode = Mode::kCopy;  // nobody uses it
  }
  // What is inline is there as soon as it is stored: nothing could come later.
  if (shared_->simulated && mode == Mode::kInline) mode = Mode::kKernel;
  return std::make_shared<CudaChannel>(shared_, ends, name, sender, receivers, layout, slots, mode);
}

const Processes& CudaFabric::processes() const { return shared_->topology.processes(); }

bool CudaFabric::made(const Channel& channel) const {
  const auto* ours = dynamic_cast<const CudaChannel*>(&channel);
  return ours != nullptr && ours->of(*shared_);
}

void CudaFabric::put_batch(const std::vector<Put>& puts, Stream stream) {
  check_batch(puts);
  if (puts.empty()) return;
  if (shared_->simulated) {
    put_by_link(puts, stream);
    return;
  }
  const int sender = puts.front().channel->sender();
  const DeviceGuard guard(shared_->topology.device(sender));
  ManyPuts many;
  const auto launch = [&] {
    const Launch how = shared_->topology.launch_of(sender);
    if (many.count > 0) launch_put(many, how, reinterpret_cast<cudaStream_t>(stream));
    many = {};
  };
  for (const Put& put : puts) {
    auto& channel = static_cast<CudaChannel&>(*put.channel);
    if (channel.add_to(many, put.tensors, put.slot)) continue;
    launch();
    if (!channel.add_to(many, put.tensors, put.slot)) channel.put(put.tensors, put.slot, stream);
  }
  launch();
}

void CudaFabric::put_by_link(std::vector<Put> puts, Stream stream) {
  // Who waits until a large bundle has arrived tells late of a small one.
  std::stable_sort(puts.begin(), puts.end(), [](const Put& a, const Put& b) {
    return a.channel->layout().nbytes < b.channel->layout().nbytes;
  });
  for (const Put& put : puts) {
    static_cast<const CudaChannel&>(*put.channel).check_put(put.tensors, put.slot);
  }
  for (const Put& put : puts) {
    put.channel->begin(put.slot, stream);
    for (std::size_t i = 0; i < put.tensors.size(); ++i) {
      put.channel->push(i, put.tensors[i], put.slot, stream);
    }
  }
  for (const Put& put : puts) put.channel->commit(put.slot, stream);
}

ReceiverDevice CudaFabric::receiver_device(const Channel& channel, int receiver) const {
  check_own(channel);
  return static_cast<const CudaChannel&>(channel).receiver_device(receiver);
}

void CudaFabric::abort(int rank, const std::string& reason) {
  if (processes().forked()) throw Error("a forked process does not abort its parent's fabric");
  shared_->failures.abort(rank, reason);  // without the lock, which waits are made under
  if (processes().hosts() > 1) {
    processes().tell_other_hosts(packed({std::to_string(rank), reason}));
  }
}

void CudaFabric::check() {
  shared_->check_open();
  shared_->check();
}

void CudaFabric::reset(std::uint64_t first_bundle) {
  const std::lock_guard lock(shared_->mutex);
  // Nobody counts on while another process still works, and nobody works while one still resets.
  agree_on_reset(processes(), first_bundle, [&] { shared_->check_open(); });
  shared_->failures.reset();
  shared_->control.reset(first_bundle);
  processes().everybody().barrier();
}

void CudaFabric::close() {
  shared_->reclaimer.settle();
  const std::lock_guard lock(shared_->mutex);
  if (!shared_->closed) shared_->close();
}

}  // namespace asyncdiff
