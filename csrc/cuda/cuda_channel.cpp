#include "cuda_channel.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "check.hpp"
#include "ipc.hpp"
#include "kernels.hpp"

namespace asyncdiff {

namespace {

cudaStream_t as_stream(Stream stream) { return reinterpret_cast<cudaStream_t>(stream); }

// Blocks of a fused put: few, because each takes a multiprocessor from whoever computes beside it.
int flags_for(std::size_t nbytes) {
  constexpr std::size_t kBytesPerBlock = std::size_t{64} << 10;
  const std::size_t blocks = (nbytes + kBytesPerBlock - 1) / kBytesPerBlock;
  return static_cast<int>(std::clamp<std::size_t>(blocks, 1, kMaxFlags));
}

}  // namespace

CudaChannel::CudaChannel(std::shared_ptr<CudaFabric::Shared> shared, std::string label, int from,
                         std::vector<int> ranks, Layout bundle, int ring)
    : Channel(std::move(label), from, std::move(ranks), std::move(bundle), ring),
      shared_(std::move(shared)) {
  CudaFabric::Shared& all = *shared_;
  const auto index = [](int rank) { return static_cast<std::size_t>(rank); };
  const auto words = [](std::byte* memory) { return reinterpret_cast<std::uint64_t*>(memory); };
  const bool sending = all.processes.mine(sender());
  // Every process takes the same lines in the same order, those that it does not use included.
  handle_.slots = slots();
  handle_.slot_nbytes = layout().nbytes;
  handle_.flags = flags_for(layout().nbytes);
  handle_.guard = all.new_end(sender(), name());
  const std::size_t counters = all.lines[index(sender())].take();
  if (sending) {
    handle_.counters = reinterpret_cast<SenderCounters*>(all.line(sender(), counters, sender()));
  }
  const std::vector<std::byte*> mailboxes = make_mailboxes();
  bool staged = false;
  for (std::size_t i = 0; i < receivers_.size(); ++i) {
    Receiver& receiver = receivers_[i];
    const int rank = receivers()[i];
    staged = staged || !receiver.direct;
    const auto flags = static_cast<std::size_t>(handle_.flags);
    Lines& flag_lines = receiver.direct ? all.lines[index(rank)] : all.host_lines;
    Lines& credit_lines = receiver.direct ? all.lines[index(sender())] : all.host_lines;
    const std::size_t arrived = flag_lines.take(flags);
    const std::size_t credit = credit_lines.take();
    const std::size_t mine = all.lines[index(rank)].take();
    const Guard guard = all.new_end(rank, name());
    if (sending) {
      const int place = handle_.receivers++;
      handle_.ranks[place] = rank;
      handle_.arrived[place] =
          words(receiver.direct ? all.line(rank, arrived, sender()) : all.host.data + arrived);
      handle_.credits[place] =
          words(receiver.direct ? all.line(sender(), credit, sender()) : all.host.data + credit);
      if (receiver.direct) handle_.target[handle_.targets++] = mailboxes[i];
    }
    if (all.processes.mine(rank)) {
      std::byte* flag = receiver.direct ? all.line(rank, arrived, rank) : all.host.data + arrived;
      std::byte* back = receiver.direct ? all.line(sender(), credit, rank) : all.host.data + credit;
      receiver.handle = {reinterpret_cast<ReceiverCounters*>(all.line(rank, mine, rank)),
                         guard,
                         slots(),
                         handle_.flags,
                         sender(),
                         words(flag),
                         words(back)};
    }
  }
  if (staged) {
    staging_ = share_pinned(all.processes, all.processes.owner(sender()), start_of(slots()));
    if (sending) handle_.target[handle_.targets++] = staging_.data;
  }
}

std::vector<std::byte*> CudaChannel::make_mailboxes() {
  CudaFabric::Shared& all = *shared_;
  const std::size_t bytes = start_of(slots());
  const bool sending = all.processes.mine(sender());
  std::string exported;
  all.processes.together("make a mailbox", [&] {
    for (int rank : receivers()) {
      Receiver receiver{};
      receiver.direct = all.link(sender(), rank).direct;
      receiver.device = all.devices[static_cast<std::size_t>(rank)];
      if (all.processes.mine(rank)) {
        receiver.mailbox = all.processes.several() ? allocate_exportable(receiver.device, bytes)
                                                   : allocate_device(receiver.device, bytes);
        if (all.processes.several()) {
          all.mailboxes.push_back(receiver.mailbox);  // until all have unmapped it
          exported += export_device(receiver.mailbox);
        }
      }
      receivers_.push_back(std::move(receiver));
    }
  });
  std::vector<std::byte*> seen;
  for (const Receiver& receiver : receivers_) seen.push_back(receiver.mailbox.data);
  if (!all.processes.several()) return seen;

  const auto exports = all.processes.all_gather(exported);
  std::vector<std::size_t> read(exports.size(), 0);
  all.processes.together("open a mailbox", [&] {
    for (std::size_t i = 0; i < receivers_.size(); ++i) {
      const auto owner = static_cast<std::size_t>(all.processes.owner(receivers()[i]));
      const std::string handle = exports[owner].substr(read[owner], kDeviceHandleBytes);
      read[owner] += kDeviceHandleBytes;
      if (!sending || seen[i] != nullptr || !receivers_[i].direct) continue;
      all.foreign.push_back(import_device(handle, sender_device(), bytes));
      seen[i] = all.foreign.back().data;
    }
  });
  return seen;
}

int CudaChannel::sender_device() const {
  return shared_->devices[static_cast<std::size_t>(sender())];
}

void CudaChannel::check_end(int rank, int slot) const {
  check_slot(slot);
  shared_->processes.check_mine(rank);
  shared_->check_open();
}

Buffer CudaChannel::slot(int receiver, int slot) {
  check_slot(slot);
  shared_->processes.check_mine(receivers()[place_of(receiver)]);
  Buffer out = receivers_[place_of(receiver)].mailbox;
  out.data += start_of(slot);
  out.nbytes = layout().nbytes;
  return out;
}

void CudaChannel::begin(int slot, Stream stream) {
  check_end(sender(), slot);
  const DeviceGuard guard(sender_device());
  launch_begin(handle_, slot, as_stream(stream));
}

void CudaChannel::push(std::size_t index, const void* data, int slot, Stream stream) {
  check_index(index);
  check_end(sender(), slot);
  const std::size_t nbytes = layout().specs[index].nbytes;
  if (nbytes == 0) return;
  const std::size_t at = start_of(slot) + layout().offsets[index];
  const DeviceGuard guard(sender_device());
  const auto copy = [&](std::byte* target) {
    check_cuda(cudaMemcpyAsync(target, data, nbytes, cudaMemcpyDefault, as_stream(stream)),
               "pushing a tensor");
  };
  for (int i = 0; i < handle_.targets; ++i) copy(handle_.target[i] + at);
}

void CudaChannel::commit(int slot, Stream stream) {
  check_end(sender(), slot);
  const DeviceGuard guard(sender_device());
  launch_commit(handle_, slot, as_stream(stream));
}

void CudaChannel::put(const std::vector<const void*>& tensors, int slot, Stream stream,
                      PutMode mode) {
  check_count(tensors.size());
  if (mode == PutMode::kCopy) return Channel::put(tensors, slot, stream, mode);
  if (tensors.size() > static_cast<std::size_t>(Bundle::kMax)) {
    throw InvalidArgument("a put by kernel takes at most " + std::to_string(Bundle::kMax) +
                          " tensors, channel '" + name() + "' has " +
                          std::to_string(tensors.size()) + ": use mode copy");
  }
  check_end(sender(), slot);
  Bundle bundle{};
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    const std::size_t nbytes = layout().specs[i].nbytes;
    if (nbytes == 0) continue;
    bundle.pieces[bundle.count++] = {static_cast<const std::byte*>(tensors[i]), layout().offsets[i],
                                     nbytes};
  }
  const DeviceGuard guard(sender_device());
  launch_put(handle_, bundle, slot, as_stream(stream));
}

void CudaChannel::get(int rank, int slot, Stream stream) {
  const Receiver& receiver = receivers_[place_of(rank)];
  check_end(rank, slot);
  const DeviceGuard guard(receiver.device);
  launch_get(receiver.handle, slot, as_stream(stream));
  if (!receiver.direct && layout().nbytes > 0) {
    check_cuda(
        cudaMemcpyAsync(receiver.mailbox.data + start_of(slot), staging_.data + start_of(slot),
                        layout().nbytes, cudaMemcpyHostToDevice, as_stream(stream)),
        "copying a staged bundle");
  }
}

void CudaChannel::release(int rank, int slot, Stream stream) {
  const Receiver& receiver = receivers_[place_of(rank)];
  check_end(rank, slot);
  const DeviceGuard guard(receiver.device);
  launch_release(receiver.handle, slot, as_stream(stream));
}

}  // namespace asyncdiff
