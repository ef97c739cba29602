#include "cuda_channel.hpp"

#include <algorithm>
#include <utility>

#include "check.hpp"
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

CudaChannel::CudaChannel(std::shared_ptr<CudaFabric::Shared> shared, std::string name_, int sender_,
                         std::vector<int> ranks, Layout layout_, int slots_)
    : Channel(std::move(name_), sender_, std::move(ranks), std::move(layout_), slots_),
      shared_(std::move(shared)) {
  const std::size_t bytes = start_of(slots());
  const std::lock_guard lock(shared_->mutex);
  ControlLines& lines = shared_->lines;
  handle_.counters = static_cast<SenderCounters*>(lines.take(sender_device()));
  handle_.guard = shared_->new_end(sender(), name());
  handle_.slots = slots();
  handle_.slot_nbytes = layout().nbytes;
  handle_.flags = flags_for(layout().nbytes);
  for (int rank : receivers()) {
    Receiver receiver{};
    receiver.direct = shared_->link(sender(), rank).direct;
    receiver.device = shared_->devices[static_cast<std::size_t>(rank)];
    receiver.mailbox = allocate_device(receiver.device, bytes);
    const int flag_place = receiver.direct ? receiver.device : Buffer::kHost;
    const int credit_place = receiver.direct ? sender_device() : Buffer::kHost;
    const auto flags = static_cast<std::size_t>(handle_.flags);
    auto* arrived = static_cast<std::uint64_t*>(lines.take(flag_place, flags));
    auto* credit = static_cast<std::uint64_t*>(lines.take(credit_place));
    receiver.handle = {static_cast<ReceiverCounters*>(lines.take(receiver.device)),
                       shared_->new_end(rank, name()),
                       slots(),
                       handle_.flags,
                       sender(),
                       arrived,
                       credit};
    const int i = handle_.receivers++;
    handle_.ranks[i] = rank;
    handle_.credits[i] = credit;
    handle_.arrived[i] = arrived;
    if (receiver.direct) {
      handle_.target[handle_.targets++] = receiver.mailbox.data;
    } else if (staging_.data == nullptr) {
      staging_ = allocate_pinned(bytes);
      handle_.target[handle_.targets++] = staging_.data;
    }
    receivers_.push_back(std::move(receiver));
  }
}

int CudaChannel::sender_device() const {
  return shared_->devices[static_cast<std::size_t>(sender())];
}

Buffer CudaChannel::slot(int receiver, int slot) {
  check_slot(slot);
  Buffer out = receivers_[place_of(receiver)].mailbox;
  out.data += start_of(slot);
  out.nbytes = layout().nbytes;
  return out;
}

void CudaChannel::begin(int slot, Stream stream) {
  check_slot(slot);
  shared_->check_open();
  const DeviceGuard guard(sender_device());
  launch_begin(handle_, slot, as_stream(stream));
}

void CudaChannel::push(std::size_t index, const void* data, int slot, Stream stream) {
  check_slot(slot);
  check_index(index);
  shared_->check_open();
  const std::size_t nbytes = layout().specs[index].nbytes;
  if (nbytes == 0) return;
  const std::size_t at = start_of(slot) + layout().offsets[index];
  const DeviceGuard guard(sender_device());
  const auto copy = [&](std::byte* target) {
    check_cuda(cudaMemcpyAsync(target, data, nbytes, cudaMemcpyDefault, as_stream(stream)),
               "pushing a tensor");
  };
  if (staging_.data != nullptr) copy(staging_.data + at);
  for (const Receiver& receiver : receivers_) {
    if (receiver.direct) copy(receiver.mailbox.data + at);
  }
}

void CudaChannel::commit(int slot, Stream stream) {
  check_slot(slot);
  shared_->check_open();
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
  check_slot(slot);
  shared_->check_open();
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
  check_slot(slot);
  const Receiver& receiver = receivers_[place_of(rank)];
  shared_->check_open();
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
  check_slot(slot);
  const Receiver& receiver = receivers_[place_of(rank)];
  shared_->check_open();
  const DeviceGuard guard(receiver.device);
  launch_release(receiver.handle, slot, as_stream(stream));
}

}  // namespace asyncdiff
