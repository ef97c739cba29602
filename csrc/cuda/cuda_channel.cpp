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
#include "cuda_memory.hpp"
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
      flags_(shared_) {
  const Topology& topology = shared_->topology;
  const ControlMemory& control = shared_->control;
  const auto words = [](std::byte* memory) { return reinterpret_cast<std::uint64_t*>(memory); };
  const bool sending = topology.mine(sender());
  if (mode() != Mode::kCopy &&
      layout().specs.size() > static_cast<std::size_t>(ManyPuts::kMaxPieces)) {
    throw InvalidArgument("mode " + name_of(mode()) + " takes at most " +
                          std::to_string(ManyPuts::kMaxPieces) + " tensors, channel '" + name() +
                          "' has " + std::to_string(layout().specs.size()) + ": use mode copy");
  }
  handle_.slots = slots();
  handle_.slot_nbytes = layout().nbytes;
  handle_.protocol = inlined() ? Protocol::kInline : Protocol::kFlagged;
  bool alone = topology.alone(sender());
  for (int rank : receivers()) alone = alone && topology.alone(rank);
  handle_.flags = flags_for(layout().nbytes, inlined() ? kInlineFlags
                                             : alone   ? kMaxFlags
                                                       : kFewFlags);
  const std::size_t counters = flags_.take(sender());
  flags_.add_count(sender(), counters + offsetof(SenderCounters, begun));
  flags_.add_count(sender(), counters + offsetof(SenderCounters, committed));
  if (sending) {
    handle_.counters = reinterpret_cast<SenderCounters*>(control.at(sender(), counters, sender()));
  }
  handle_.context = flags_.add_end(sender(), name(), sending ? &handle_.counters->failed : nullptr);
  const std::vector<std::byte*> mailboxes = make_mailboxes();
  bool staged = false;
  for (const Receiver& receiver : receivers_) staged = staged || !receiver.direct;
  if (staged) {
    staging_ = keep_words(share_pinned(topology.processes(), topology.processes().owner(sender()),
                                       topology.home(), landing_nbytes()));
  }
  for (std::size_t i = 0; i < receivers_.size(); ++i) {
    Receiver& receiver = receivers_[i];
    const int rank = receivers()[i];
    const auto flags = static_cast<std::size_t>(handle_.flags);
    const int flags_at = receiver.direct ? rank : ControlMemory::kHost;
    const int credit_at = receiver.direct ? sender() : ControlMemory::kHost;
    const std::size_t arrived = flags_.take(flags_at, flags);
    const std::size_t credit = flags_.take(credit_at);
    const std::size_t mine = flags_.take(rank);
    for (std::size_t f = 0; f < flags; ++f) {
      flags_.add_count(flags_at, arrived + f * FlagPool::kLine);
    }
    flags_.add_count(credit_at, credit);
    flags_.add_count(rank, mine + offsetof(ReceiverCounters, got));
    flags_.add_count(rank, mine + offsetof(ReceiverCounters, released));
    ReceiverCounters* counts = nullptr;
    if (topology.mine(rank)) {
      counts = reinterpret_cast<ReceiverCounters*>(control.at(rank, mine, rank));
    }
    const WaitContext context =
        flags_.add_end(rank, name(), counts != nullptr ? &counts->failed : nullptr);
    if (sending) {
      const int place = handle_.receivers++;
      handle_.ranks[place] = rank;
      handle_.arrived[place] = words(control.at(flags_at, arrived, sender()));
      handle_.credits[place] = words(control.at(credit_at, credit, sender()));
      if (receiver.direct) handle_.target[handle_.targets++] = mailboxes[i];
    }
    if (counts != nullptr) {
      const Buffer& landing = !receiver.direct ? *staging_
                              : inlined()      ? *receiver.words
                                               : receiver.mailbox;
      receiver.handle = {counts,
                         context,
                         handle_.protocol,
                         slots(),
                         handle_.flags,
                         sender(),
                         layout().nbytes,
                         words(control.at(flags_at, arrived, rank)),
                         words(control.at(credit_at, credit, rank)),
                         landing.data,
                         receiver.mailbox.data};
    }
  }
  if (staged && sending) handle_.target[handle_.targets++] = staging_->data;
}

CudaChannel::~CudaChannel() {
  if (shared_->closed) return;  // then nothing runs any more
  std::vector<Buffer> memory;
  for (Receiver& receiver : receivers_) {
    memory.push_back(std::move(receiver.mailbox));
    if (receiver.words) memory.push_back(*receiver.words);
  }
  if (staging_) memory.push_back(*staging_);
  shared_->reclaimer.retire(std::move(memory), {});
}

std::shared_ptr<Buffer> CudaChannel::keep_words(Buffer memory) {
  auto out = std::make_shared<Buffer>(std::move(memory));
  if (inlined()) shared_->control.add_inline_words(out);
  return out;
}

std::vector<std::byte*> CudaChannel::make_mailboxes() {
  const Topology& topology = shared_->topology;
  const Processes& processes = topology.processes();
  const std::size_t bytes = start_of(slots());
  const bool sending = topology.mine(sender());
  std::string exported;
  processes.together("make a mailbox", [&] {
    for (int rank : receivers()) {
      Receiver receiver{};
      receiver.direct = topology.link(sender(), rank).direct;
      receiver.device = topology.device(rank);
      if (topology.mine(rank)) {
        const bool several = processes.several();
        Buffer landing = several ? allocate_exportable(receiver.device, landing_nbytes())
                                 : allocate_device(receiver.device, landing_nbytes());
        if (several) {
          shared_->reclaimer.keep_exported(landing);
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
  if (!processes.several()) return seen;

  const auto exports = processes.all_gather(exported);
  std::vector<std::size_t> read(exports.size(), 0);
  processes.together("open a mailbox", [&] {
    for (std::size_t i = 0; i < receivers_.size(); ++i) {
      const auto owner = static_cast<std::size_t>(processes.owner(receivers()[i]));
      const std::string handle = exports[owner].substr(read[owner], kDeviceHandleBytes);
      read[owner] += kDeviceHandleBytes;
      if (!sending || seen[i] != nullptr || !receivers_[i].direct) continue;
      Buffer theirs = import_device(handle, sender_device(), landing_nbytes());
      seen[i] = theirs.data;
      shared_->reclaimer.keep_imported(std::move(theirs));
    }
  });
  return seen;
}

int CudaChannel::sender_device() const { return shared_->topology.device(sender()); }

void CudaChannel::check_end(int rank, int slot) const {
  check_slot(slot);
  shared_->topology.processes().check_mine(rank);
  shared_->check_open();
}

Buffer CudaChannel::slot(int receiver, int slot) {
  check_slot(slot);
  shared_->topology.processes().check_mine(receivers()[place_of(receiver)]);
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
  if (mode() != Mode::kCopy) {
    launch_push(handle_, piece_of(index, data), slot, as_stream(stream));
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
  return {static_cast<const std::byte*>(data), layout().offsets[index],
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
    launch_put(puts, shared_->topology.launch_of(sender()), as_stream(stream));
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
    launch_get_inline(receiver.handle, slot, shared_->topology.launch_of(rank), as_stream(stream));
    return;
  }
  launch_get(receiver.handle, slot, shared_->topology.launch_of(rank), as_stream(stream));
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
  launch_release(receiver.handle, slot, shared_->topology.launch_of(rank), as_stream(stream));
}

}  // namespace asyncdiff
