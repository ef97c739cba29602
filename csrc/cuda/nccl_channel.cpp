#include "nccl_channel.hpp"

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "agreement.hpp"
#include "blocks.hpp"
#include "bundle.hpp"
#include "cuda_memory.hpp"
#include "device_guard.hpp"
#include "kernels.hpp"
#include "nvtx.hpp"

namespace asyncdiff {

namespace {

cudaStream_t as_stream(Stream stream) { return reinterpret_cast<cudaStream_t>(stream); }

template <class T>
T* line(const Buffer& memory, std::size_t index) {
  return reinterpret_cast<T*>(memory.data + index * FlagPool::kLine);
}

}  // namespace

NcclChannel::NcclChannel(std::shared_ptr<NcclShared> shared, Party ends, std::string label,
                         int from, int to, Layout bundle, int ring)
    : Channel(std::move(label), from, {to}, std::move(bundle), ring, Mode::kKernel),
      shared_(std::move(shared)),
      ends_(std::move(ends)) {
  if (!ends_.here()) return;
  const Processes& processes = shared_->processes();
  const bool sends = processes.mine(from);
  const auto link = shared_->link(from, to, ends_);
  const std::uint32_t own = sends ? shared_->next_channel() : 0;
  std::string told(reinterpret_cast<const char*>(&own), sizeof own);
  const auto all = ends_.all_gather(sends ? told : "");
  told = all.at(static_cast<std::size_t>(processes.owner(from)));
  std::uint32_t channel = 0;
  std::memcpy(&channel, told.data(), std::min(told.size(), sizeof channel));
  try {
    ends_.together("make a channel's end", [&] {
      if (sends) {
        make_sender(channel, link);
      } else {
        make_receiver(channel, link);
      }
    });
  } catch (...) {
    // The other process has failed: nothing is on its way to what was made here.
    if (memory_ && memory_->end) shared_->give_back(*memory_);
    throw;
  }
}

template <class End>
std::shared_ptr<End> NcclChannel::make_end(int rank, int peer, std::uint32_t channel,
                                           std::shared_ptr<NcclLink> link) const {
  auto out = std::make_shared<End>();
  out->channel = channel;
  out->process = shared_->processes().owner(peer);
  out->name = name();
  out->rank = rank;
  out->peer = peer;
  out->link = std::move(link);
  out->nbytes = layout().nbytes;
  out->slots = slots();
  return out;
}

void NcclChannel::allocate(int rank, std::size_t lines) {
  memory_ = std::make_shared<NcclEndMemory>();
  // Slots begin where tensors may.
  memory_->lines = (lines + 1) / 2 * 2 * FlagPool::kLine;
  memory_->device = allocate_device(
      shared_->device(rank), memory_->lines + layout().nbytes * static_cast<std::size_t>(slots()));
}

void NcclChannel::make_sender(std::uint32_t channel, std::shared_ptr<NcclLink> link) {
  const int peer = receivers().front();
  allocate(sender(), 1);
  const int flags = flags_for(layout().nbytes, kMaxFlags);
  constexpr std::size_t kWords = FlagPool::kLine / sizeof(std::uint64_t);
  const std::size_t tensors = layout().specs.size();
  // A word for each tensor, a line for each of the others.
  memory_->words = static_cast<std::size_t>(flags) + 2 + (tensors + kWords - 1) / kWords;
  std::uint64_t* const words = shared_->take_words(memory_->words, memory_->first);
  auto end = make_end<NcclOutgoing>(sender(), peer, channel, std::move(link));
  end->credit = words;
  end->carried = words + kFlagStride;
  end->committed = words + 2 * kFlagStride;
  end->flags = flags;
  pushed_ = words + (flags + 2) * kFlagStride;
  end->pushed = pushed_;
  end->ends.assign(layout().offsets.begin(), layout().offsets.end());
  if (!end->ends.empty()) {
    end->ends.erase(end->ends.begin());
    end->ends.push_back(layout().nbytes);
  }
  end->staging = memory_->device.data + memory_->lines;
  auto* const counters = line<SenderCounters>(memory_->device, 0);
  from_.counters = counters;
  from_.context = shared_->failures().add_end(sender(), name(), &counters->failed);
  from_.protocol = Protocol::kFlagged;
  from_.slots = slots();
  from_.flags = flags;
  from_.receivers = from_.targets = 1;
  from_.slot_nbytes = layout().nbytes;
  from_.ranks[0] = peer;
  from_.credits[0] = end->credit;
  from_.arrived[0] = words + 2 * kFlagStride;
  from_.target[0] = memory_->device.data + memory_->lines;
  memory_->record = from_.context.record;
  memory_->device_counts = {offsetof(SenderCounters, begun), offsetof(SenderCounters, committed)};
  for (int i = 0; i < flags; ++i) end->counts.push_back(from_.arrived[0] + i * kFlagStride);
  for (std::size_t i = 0; i < tensors; ++i) end->counts.push_back(pushed_ + i);
  memory_->end = end;
  shared_->keep(memory_);
  shared_->courier().add(std::move(end));
}

void NcclChannel::make_receiver(std::uint32_t channel, std::shared_ptr<NcclLink> link) {
  const int rank = receivers().front();
  allocate(rank, 2);
  memory_->words = 2;
  std::uint64_t* const words = shared_->take_words(memory_->words, memory_->first);
  auto end = make_end<NcclIncoming>(rank, sender(), channel, std::move(link));
  end->released = words;
  end->carried = words + kFlagStride;
  end->arrived = line<std::uint64_t>(memory_->device, 1);
  end->mailbox = memory_->device.data + memory_->lines;
  auto* const counters = line<ReceiverCounters>(memory_->device, 0);
  to_.counters = counters;
  to_.context = shared_->failures().add_end(rank, name(), &counters->failed);
  to_.protocol = Protocol::kFlagged;
  to_.slots = slots();
  to_.flags = 1;
  to_.sender_rank = sender();
  to_.slot_nbytes = layout().nbytes;
  to_.arrived = end->arrived;
  to_.credit = words;
  to_.source = to_.mailbox = end->mailbox;
  memory_->record = to_.context.record;
  memory_->device_counts = {offsetof(ReceiverCounters, got), offsetof(ReceiverCounters, released),
                            FlagPool::kLine};
  end->counts = {words};
  memory_->end = end;
  shared_->keep(memory_);
  shared_->courier().add(std::move(end));
}

void NcclChannel::close() {
  if (closed_ || !ends_.here()) return;
  const std::lock_guard lock(shared_->calls());
  if (shared_->closed()) {
    closed_ = true;
    return;
  }
  agree_on_close(ends_, name());
  shared_->settle();
  std::uint64_t sent = 0;
  ends_.together("send what is left", [&] {
    shared_->check();
    auto* const out = dynamic_cast<NcclOutgoing*>(memory_->end.get());
    if (out != nullptr) sent = shared_->courier().wait_until_sent(*out);
  });
  std::string told(reinterpret_cast<const char*>(&sent), sizeof sent);
  const auto all = ends_.all_gather(told);
  told = all.at(static_cast<std::size_t>(shared_->processes().owner(sender())));
  std::memcpy(&sent, told.data(), std::min(told.size(), sizeof sent));
  ends_.together("receive what is left", [&] {
    const auto* const in = dynamic_cast<const NcclIncoming*>(memory_->end.get());
    if (in != nullptr) shared_->courier().wait_until_arrived(*in, sent);
  });
  closed_ = true;
  shared_->give_back(*memory_);
  memory_.reset();
}

void NcclChannel::check_open() const {
  if (closed_) throw Error("channel '" + name() + "' is closed");
  shared_->check_open();
}

void NcclChannel::check_end(int rank, int slot) const {
  check_slot(slot);
  shared_->processes().check_mine(rank);
  check_open();
}

Buffer NcclChannel::slot(int receiver, int slot) {
  check_slot(slot);
  shared_->processes().check_mine(receivers()[place_of(receiver)]);
  if (closed_) throw Error("channel '" + name() + "' is closed");
  Buffer out = shared_->lent().lend(memory_->device);
  out.data += memory_->lines + layout().nbytes * static_cast<std::size_t>(slot);
  out.nbytes = layout().nbytes;
  return out;
}

void NcclChannel::begin(int slot, Stream stream) {
  const nvtx::Range range("begin", *this, sender(), slot);
  check_end(sender(), slot);
  const DeviceGuard guard(shared_->device(sender()));
  launch_begin(from_, slot, as_stream(stream));
}

void NcclChannel::push(std::size_t index, const void* data, int slot, Stream stream) {
  const nvtx::Range range("push", *this, sender(), slot);
  check_tensor(index, data);
  check_end(sender(), slot);
  if (layout().specs[index].nbytes == 0) return;
  const DeviceGuard guard(shared_->device(sender()));
  launch_push(from_, piece_of(layout(), index, data), slot, as_stream(stream));
  // Not for bundles that go as a whole.
  if (in_parts()) launch_pushed(from_, slot, pushed_ + index, as_stream(stream));
}

void NcclChannel::commit(int slot, Stream stream) {
  const nvtx::Range range("commit", *this, sender(), slot);
  check_end(sender(), slot);
  const DeviceGuard guard(shared_->device(sender()));
  launch_commit(from_, slot, as_stream(stream));
  shared_->courier().wake();
}

void NcclChannel::put(const std::vector<const void*>& tensors, int slot, Stream stream) {
  const nvtx::Range range("put", *this, sender(), slot);
  check_tensors(tensors);
  check_end(sender(), slot);
  const DeviceGuard guard(shared_->device(sender()));
  // What is packed of a large bundle crosses while the rest of it is packed.
  if (!in_parts() &&
      launch_bundle(from_, layout(), tensors, slot, Launch::kOrdinary, as_stream(stream))) {
    shared_->courier().wake();
    return;
  }
  Channel::put(tensors, slot, stream);
}

void NcclChannel::get(int receiver, int slot, Stream stream) {
  const nvtx::Range range("get", *this, receiver, slot);
  const int rank = receivers()[place_of(receiver)];
  check_end(rank, slot);
  const DeviceGuard guard(shared_->device(rank));
  launch_get(to_, slot, Launch::kOrdinary, as_stream(stream));
}

void NcclChannel::wait_for(int receiver, std::uint64_t count) {
  const nvtx::Range range("wait_for", *this, receiver, 0);
  check_end(receivers()[place_of(receiver)], 0);
  shared_->wait([&](NcclCourier& courier) {
    courier.wait_for(dynamic_cast<const NcclIncoming&>(*memory_->end), count);
  });
}

void NcclChannel::wait_free(std::uint64_t count) {
  const nvtx::Range range("wait_free", *this, sender(), 0);
  check_end(sender(), 0);
  shared_->wait([&](NcclCourier& courier) {
    courier.wait_free(dynamic_cast<const NcclOutgoing&>(*memory_->end), count);
  });
}

void NcclChannel::release(int receiver, int slot, Stream stream) {
  const nvtx::Range range("release", *this, receiver, slot);
  const int rank = receivers()[place_of(receiver)];
  check_end(rank, slot);
  const DeviceGuard guard(shared_->device(rank));
  launch_release(to_, slot, Launch::kOrdinary, as_stream(stream));
  shared_->courier().wake();
}

}  // namespace asyncdiff
