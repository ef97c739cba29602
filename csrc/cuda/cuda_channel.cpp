#include "cuda_channel.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "blocks.hpp"
#include "check.hpp"
#include "device_guard.hpp"
#include "ipc.hpp"
#include "kernels.hpp"
#include "nvtx.hpp"

namespace asyncdiff {

namespace {

cudaStream_t as_stream(Stream stream) { return reinterpret_cast<cudaStream_t>(stream); }

}  // namespace

CudaChannel::CudaChannel(std::shared_ptr<CudaFabric::Shared> shared, std::string label, int from,
                         std::vector<int> ranks, Layout bundle, int ring, Mode how)
    : Channel(std::move(label), from, std::move(ranks), std::move(bundle), ring, how),
      shared_(std::move(shared)),
      lines_(shared_) {
  CudaFabric::Shared& all = *shared_;
  const auto words = [](std::byte* memory) { return reinterpret_cast<std::uint64_t*>(memory); };
  const bool sending = all.processes.mine(sender());
  if (mode() != Mode::kCopy &&
      layout().specs.size() > static_cast<std::size_t>(ManyPuts::kMaxPieces)) {
    throw InvalidArgument("mode " + name_of(mode()) + " takes at most " +
                          std::to_string(ManyPuts::kMaxPieces) + " tensors, channel '" + name() +
                          "' has " + std::to_string(layout().specs.size()) + ": use mode copy");
  }
  handle_.slots = slots();
  handle_.slot_nbytes = layout().nbytes;
  handle_.protocol = inlined() ? Protocol::kInline : Protocol::kFlagged;
  bool alone = all.alone(sender());
  for (int rank : receivers()) alone = alone && all.alone(rank);
  handle_.flags = flags_for(layout().nbytes, inlined() ? kInlineFlags
                                             : alone   ? kMaxFlags
                                                       : kFewFlags);
  handle_.context = lines_.new_end(sender(), name());
  const std::size_t counters = lines_.take(sender());
  lines_.add_count(sender(), counters + offsetof(SenderCounters, begun));
  lines_.add_count(sender(), counters + offsetof(SenderCounters, committed));
  if (sending) {
    handle_.counters = reinterpret_cast<SenderCounters*>(all.line(sender(), counters, sender()));
  }
  const std::vector<std::byte*> mailboxes = make_mailboxes();
  bool staged = false;
  for (const Receiver& receiver : receivers_) staged = staged || !receiver.direct;
  if (staged) {
    staging_ = keep_words(
        share_pinned(all.processes, all.processes.owner(sender()), all.home(), landing_nbytes()));
  }
  for (std::size_t i = 0; i < receivers_.size(); ++i) {
    Receiver& receiver = receivers_[i];
    const int rank = receivers()[i];
    const auto flags = static_cast<std::size_t>(handle_.flags);
    const int flags_at = receiver.direct ? rank : CudaFabric::Shared::kHostLines;
    const int credit_at = receiver.direct ? sender() : CudaFabric::Shared::kHostLines;
    const std::size_t arrived = lines_.take(flags_at, flags);
    const std::size_t credit = lines_.take(credit_at);
    const std::size_t mine = lines_.take(rank);
    for (std::size_t f = 0; f < flags; ++f) {
      lines_.add_count(flags_at, arrived + f * FlagPool::kLine);
    }
    lines_.add_count(credit_at, credit);
    lines_.add_count(rank, mine + offsetof(ReceiverCounters, got));
    lines_.add_count(rank, mine + offsetof(ReceiverCounters, released));
    const WaitContext context = lines_.new_end(rank, name());
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
      const Buffer& landing = !receiver.direct ? *staging_
                              : inlined()      ? *receiver.words
                                               : receiver.mailbox;
      receiver.handle = {reinterpret_cast<ReceiverCounters*>(all.line(rank, mine, rank)),
                         context,
                         handle_.protocol,
                         slots(),
                         handle_.flags,
                         sender(),
                         layout().nbytes,
                         words(flag),
                         words(back),
                         landing.data,
                         receiver.mailbox.data};
    }
  }
  if (staged && sending) handle_.target[handle_.targets++] = staging_->data;
}

CudaChannel::~CudaChannel() {
  if (shared_->closed) return;  // then nothing runs any more
  const std::lock_guard lock(shared_->retired_mutex);
  std::vector<Buffer>& memory = shared_->retired.memory;
  for (Receiver& receiver : receivers_) {
    memory.push_back(std::move(receiver.mailbox));
    if (receiver.words) memory.push_back(*receiver.words);
  }
  if (staging_) memory.push_back(*staging_);
}

std::shared_ptr<Buffer> CudaChannel::keep_words(Buffer memory) {
  auto out = std::make_shared<Buffer>(std::move(memory));
  if (inlined()) shared_->inline_words.push_back(out);
  return out;
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
        const bool several = all.processes.several();
        Buffer landing = several ? allocate_exportable(receiver.device, landing_nbytes())
                                 : allocate_device(receiver.device, landing_nbytes());
        if (several) {
          all.mailboxes.push_back(landing);  // until all have unmapped it
          exported += export_device(landing);
        }
        receiver.mailbox = inlined() ? allocate_device(receiver.device, bytes) : landing;
        if (inlined()) receiver.words = keep_words(std::move(landing));
      }
      receivers_.push_back(std::move(receiver));
    }
  });
  std::vector<std::byte*> seen;
  for (const Receiver& receiver : receivers_) {
    seen.push_back(receiver.words ? receiver.words->data : receiver.mailbox.data);
  }
  if (!all.processes.several()) return seen;

  const auto exports = all.processes.all_gather(exported);
  std::vector<std::size_t> read(exports.size(), 0);
  all.processes.together("open a mailbox", [&] {
    for (std::size_t i = 0; i < receivers_.size(); ++i) {
      const auto owner = static_cast<std::size_t>(all.processes.owner(receivers()[i]));
      const std::string handle = exports[owner].substr(read[owner], kDeviceHandleBytes);
      read[owner] += kDeviceHandleBytes;
      if (!sending || seen[i] != nullptr || !receivers_[i].direct) continue;
      all.foreign.push_back(import_device(handle, sender_device(), landing_nbytes()));
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
  const nvtx::Range range("begin", *this, sender(), slot);
  check_end(sender(), slot);
  const DeviceGuard guard(sender_device());
  launch_begin(handle_, slot, as_stream(stream));
}

void CudaChannel::push(std::size_t index, const void* data, int slot, Stream stream) {
  const nvtx::Range range("push", *this, sender(), slot);
  check_index(index);
  check_end(sender(), slot);
  const std::size_t nbytes = layout().specs[index].nbytes;
  if (nbytes == 0) return;
  const std::size_t at = start_of(slot) + layout().offsets[index];
  const DeviceGuard guard(sender_device());
  if (inlined()) {
    launch_push_inline(handle_, piece_of(index, data), slot, as_stream(stream));
    return;
  }
  const auto copy = [&](std::byte* target) {
    check_cuda(cudaMemcpyAsync(target, data, nbytes, cudaMemcpyDefault, as_stream(stream)),
               "pushing a tensor");
  };
  for (int i = 0; i < handle_.targets; ++i) copy(handle_.target[i] + at);
}

void CudaChannel::commit(int slot, Stream stream) {
  const nvtx::Range range("commit", *this, sender(), slot);
  check_end(sender(), slot);
  const DeviceGuard guard(sender_device());
  launch_commit(handle_, slot, as_stream(stream));
}

Piece CudaChannel::piece_of(std::size_t index, const void* data) const {
  // One type serves puts, which only read it, and unpack, which only writes it.
  return {static_cast<std::byte*>(const_cast<void*>(data)), layout().offsets[index],
          layout().specs[index].nbytes};
}

template <class P>
bool CudaChannel::add_to(P& puts, const std::vector<const void*>& tensors, int slot) const {
  check_count(tensors.size());
  check_end(sender(), slot);
  const int c = puts.count;
  int last = puts.first_piece[c];
  if (c == P::kMaxChannels || static_cast<std::size_t>(last) + tensors.size() > P::kMaxPieces) {
    return false;
  }
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    if (layout().specs[i].nbytes > 0) puts.pieces[last++] = piece_of(i, tensors[i]);
  }
  puts.sender[c] = handle_;
  puts.slot[c] = slot;
  puts.first_piece[c + 1] = last;
  puts.first_block[c + 1] = puts.first_block[c] + handle_.flags;
  puts.count = c + 1;
  return true;
}

template bool CudaChannel::add_to(ManyPuts&, const std::vector<const void*>&, int) const;

void CudaChannel::put(const std::vector<const void*>& tensors, int slot, Stream stream) {
  const nvtx::Range range("put", *this, sender(), slot);
  if (mode() == Mode::kCopy) {
    Channel::put(tensors, slot, stream);
    return;
  }
  const DeviceGuard guard(sender_device());
  const auto launched = [&](auto puts) {
    if (!add_to(puts, tensors, slot)) return false;
    launch_put(puts, shared_->launch_of(sender()), as_stream(stream));
    return true;
  };
  if (!launched(SmallPut()) && !launched(OnePut())) launched(ManyPuts());
}

void CudaChannel::get(int rank, int slot, Stream stream) {
  const nvtx::Range range("get", *this, rank, slot);
  const Receiver& receiver = receivers_[place_of(rank)];
  check_end(rank, slot);
  const DeviceGuard guard(receiver.device);
  if (inlined()) {
    launch_get_inline(receiver.handle, slot, shared_->launch_of(rank), as_stream(stream));
    return;
  }
  launch_get(receiver.handle, slot, shared_->launch_of(rank), as_stream(stream));
  if (!receiver.direct && layout().nbytes > 0) {
    check_cuda(
        cudaMemcpyAsync(receiver.mailbox.data + start_of(slot), staging_->data + start_of(slot),
                        layout().nbytes, cudaMemcpyHostToDevice, as_stream(stream)),
        "copying a staged bundle");
  }
}

const ReceiverDevice& CudaChannel::receiver_device(int rank) const {
  const Receiver& receiver = receivers_[place_of(rank)];
  check_end(rank, 0);
  return receiver.handle;
}

void CudaChannel::release(int rank, int slot, Stream stream) {
  const nvtx::Range range("release", *this, rank, slot);
  const Receiver& receiver = receivers_[place_of(rank)];
  check_end(rank, slot);
  const DeviceGuard guard(receiver.device);
  launch_release(receiver.handle, slot, shared_->launch_of(rank), as_stream(stream));
}

void CudaChannel::unpack(int rank, const std::vector<void*>& tensors, int slot, Stream stream) {
  const nvtx::Range range("unpack", *this, rank, slot);
  const Receiver& receiver = receivers_[place_of(rank)];
  check_count(tensors.size());
  check_end(rank, slot);
  const DeviceGuard guard(receiver.device);
  if (tensors.size() > static_cast<std::size_t>(Unpack::kMaxPieces)) {
    get(rank, slot, stream);
    for (std::size_t i = 0; i < tensors.size(); ++i) {
      const std::byte* from = receiver.mailbox.data + start_of(slot) + layout().offsets[i];
      check_cuda(cudaMemcpyAsync(tensors[i], from, layout().specs[i].nbytes, cudaMemcpyDefault,
                                 as_stream(stream)),
                 "unpacking a tensor");
    }
    release(rank, slot, stream);
    return;
  }
  Unpack unpack;
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    if (layout().specs[i].nbytes > 0) unpack.pieces[unpack.count++] = piece_of(i, tensors[i]);
  }
  launch_unpack(receiver.handle, unpack, slot, shared_->launch_of(rank), as_stream(stream));
}

}  // namespace asyncdiff
