#include "cuda_channel.hpp"

#include <utility>

#include "check.hpp"
#include "kernels.hpp"

namespace asyncdiff {

namespace {

cudaStream_t as_stream(Stream stream) { return reinterpret_cast<cudaStream_t>(stream); }

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
  for (int rank : receivers()) {
    Receiver receiver{};
    receiver.direct = shared_->link(sender(), rank).direct;
    receiver.device = shared_->devices[static_cast<std::size_t>(rank)];
    receiver.mailbox = allocate_device(receiver.device, bytes);
    const int flag_place = receiver.direct ? receiver.device : Buffer::kHost;
    const int credit_place = receiver.direct ? sender_device() : Buffer::kHost;
    auto* arrived = static_cast<std::uint64_t*>(lines.take(flag_place));
    auto* credit = static_cast<std::uint64_t*>(lines.take(credit_place));
    receiver.handle = {static_cast<ReceiverCounters*>(lines.take(receiver.device)),
                       shared_->new_end(rank, name()),
                       slots(),
                       sender(),
                       arrived,
                       credit};
    const int i = handle_.receivers++;
    handle_.ranks[i] = rank;
    handle_.credits[i] = credit;
    handle_.arrived[i] = arrived;
    if (!receiver.direct && staging_.data == nullptr) staging_ = allocate_pinned(bytes);
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
