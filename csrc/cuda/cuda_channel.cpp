#include "cuda_channel.hpp"

#include <algorithm>
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

CudaChannel::CudaChannel(std::shared_ptr<CudaFabric::Shared> shared, Party ends, std::string label,
                         int from, std::vector<int> ranks, Layout bundle, int ring, Mode how)
    : Channel(std::move(label), from, std::move(ranks), std::move(bundle), ring, how),
      shared_(std::move(shared)),
      ends_(std::move(ends)),
      flags_(shared_, ends_.members().size() > 1) {
  if (mode() != Mode::kCopy &&
      layout().specs.size() > static_cast<std::size_t>(ManyPuts::kMaxPieces)) {
    throw InvalidArgument("mode " + name_of(mode()) + " takes at most " +
                          std::to_string(ManyPuts::kMaxPieces) + " tensors, channel '" + name() +
                          "' has " + std::to_string(layout().specs.size()) + ": use mode copy");
  }
  if (!ends_.here()) return;
  const Topology& topology = shared_->topology;
  handle_.slots = slots();
  handle_.slot_nbytes = layout().nbytes;
  handle_.protocol = inlined() ? Protocol::kInline : Protocol::kFlagged;
  bool alone = topology.alone(sender());
  for (int rank : receivers()) alone = alone && topology.alone(rank);
  handle_.flags = flags_for(layout().nbytes, inlined() ? kInlineFlags
                                             : alone   ? kMaxFlags
                                                       : kFewFlags);
  std::string made;
  ends_.together("make a mailbox", [&] { made = make_own(); });
  open_others(ends_.all_gather(made));
  const auto is_staged = [](const Receiver& receiver) { return !receiver.direct; };
  if (std::any_of(receivers_.begin(), receivers_.end(), is_staged)) {
    staging_ = keep_words(share_pinned(ends_, topology.processes().owner(sender()), topology.home(),
                                       landing_nbytes()));
  }
  ends_.together("make a channel's ends", [&] {
    if (topology.mine(sender())) make_sender();
    for (std::size_t i = 0; i < receivers_.size(); ++i) {
      if (topology.mine(receivers()[i])) make_receiver(i);
    }
  });
}

void CudaChannel::make_sender() {
  const ControlMemory& control = shared_->control;
  const auto words = [](std::byte* memory) { return reinterpret_cast<std::uint64_t*>(memory); };
  const std::size_t counters = flags_.take(sender());
  flags_.add_count(sender(), counters + offsetof(SenderCounters, begun));
  flags_.add_count(sender(), counters + offsetof(SenderCounters, committed));
  handle_.counters = reinterpret_cast<SenderCounters*>(control.at(sender(), counters, sender()));
  handle_.context = flags_.add_end(sender(), name(), &handle_.counters->failed);
  for (std::size_t i = 0; i < receivers_.size(); ++i) {
    const Receiver& receiver = receivers_[i];
    const int place = handle_.receivers++;
    handle_.ranks[place] = receivers()[i];
    handle_.arrived[place] = words(control.at(flags_at(i), receiver.arrived, sender()));
    handle_.credits[place] = words(control.at(credit_at(i), receiver.credit, sender()));
    if (receiver.direct) handle_.target[handle_.targets++] = receiver.seen;
  }
  if (staging_) handle_.target[handle_.targets++] = staging_->data;
  if (shared_->simulated) link_ = shared_->simulated.of(sender());
}

void CudaChannel::make_receiver(std::size_t i) {
  Receiver& receiver = receivers_[i];
  const int rank = receivers()[i];
  const ControlMemory& control = shared_->control;
  const auto words = [](std::byte* memory) { return reinterpret_cast<std::uint64_t*>(memory); };
  const std::size_t mine = flags_.take(rank);
  flags_.add_count(rank, mine + offsetof(ReceiverCounters, got));
  flags_.add_count(rank, mine + offsetof(ReceiverCounters, released));
  auto* counts = reinterpret_cast<ReceiverCounters*>(control.at(rank, mine, rank));
  const Buffer& landing = !receiver.direct ? *staging_
                          : inlined()      ? *receiver.words
                                           : receiver.mailbox;
  receiver.handle = {counts,
                     flags_.add_end(rank, name(), &counts->failed),
                     handle_.protocol,
                     slots(),
                     handle_.flags,
                     sender(),
                     layout().nbytes,
                     words(control.at(flags_at(i), receiver.arrived, rank)),
                     words(control.at(credit_at(i), receiver.credit, rank)),
                     landing.data,
                     receiver.mailbox.data};
}

CudaChannel::~CudaChannel() {
  if (shared_->closed || shared_->topology.processes().forked()) return;  // nothing runs any more
  std::vector<Buffer> memory;
  for (Receiver& receiver : receivers_) {
    memory.push_back(std::move(receiver.mailbox));
    if (receiver.words) memory.push_back(*receiver.words);
  }
  if (staging_) memory.push_back(*staging_);
  shared_->reclaimer.retire(std::move(memory), {});
}

void CudaChannel::close() {
  if (closed_ || !ends_.here()) return;
  if (shared_->closed) {
    closed_ = true;
    return;
  }
  const std::lock_guard lock(shared_->mutex);
  agree_on_close(ends_, name());
  shared_->reclaimer.settle();
  ends_.barrier();  // nobody writes any more, data or flags
  closed_ = true;
  if (!ends_.several() || ends_.members().size() == 1) {
    receivers_.clear();
    staging_.reset();
    return;
  }
  // Unmap what others own before they free it, and the other way round.
  shared_->reclaimer.let_go(mapped_, Reclaimer::Kept::kImported);
  ends_.barrier();
  shared_->reclaimer.let_go(mapped_, Reclaimer::Kept::kExported);
  receivers_.clear();
  staging_.reset();
  flags_.others_are_done();
}

void CudaChannel::check_open() const {
  if (closed_) throw Error("channel '" + name() + "' is closed");
  shared_->check_open();
}

std::shared_ptr<Buffer> CudaChannel::keep_words(Buffer memory) {
  auto out = std::make_shared<Buffer>(std::move(memory));
  if (inlined()) shared_->control.add_inline_words(out);
  return out;
}

std::string CudaChannel::make_own() {
  const Topology& topology = shared_->topology;
  std::string exported;
  const auto add = [&](std::size_t offset) {
    const auto value = static_cast<std::uint64_t>(offset);
    exported.append(reinterpret_cast<const char*>(&value), sizeof value);
  };
  for (int rank : receivers()) {
    Receiver receiver{};
    receiver.direct = topology.link(sender(), rank).direct;
    receiver.device = topology.device(rank);
    receivers_.push_back(std::move(receiver));
  }
  for (std::size_t i = 0; i < receivers_.size() && topology.mine(sender()); ++i) {
    const std::size_t credit = flags_.take(credit_at(i));
    flags_.add_count(credit_at(i), credit);
    add(credit);
  }
  for (std::size_t i = 0; i < receivers_.size(); ++i) {
    if (!topology.mine(receivers()[i])) continue;
    const auto flags = static_cast<std::size_t>(handle_.flags);
    const std::size_t arrived = flags_.take(flags_at(i), flags);
    for (std::size_t f = 0; f < flags; ++f) {
      flags_.add_count(flags_at(i), arrived + f * FlagPool::kLine);
    }
    add(arrived);
    make_mailbox(receivers_[i], exported);
  }
  return exported;
}

void CudaChannel::make_mailbox(Receiver& receiver, std::string& exported) {
  const std::size_t bytes = start_of(slots());
  const bool others = ends_.members().size() > 1;
  Buffer landing = others ? allocate_exportable(receiver.device, landing_nbytes())
                          : allocate_device(receiver.device, landing_nbytes());
  receiver.seen = landing.data;
  if (others) {
    mapped_.push_back(landing.data);
    shared_->reclaimer.keep_exported(landing);
    exported += export_device(landing);
  }
  receiver.mailbox = inlined() ? allocate_device(receiver.device, bytes) : landing;
  if (inlined()) receiver.words = keep_words(std::move(landing));
}

void CudaChannel::open_others(const std::vector<std::string>& made) {
  const Processes& processes = shared_->topology.processes();
  std::vector<std::size_t> read(made.size(), 0);
  const auto next = [&](int rank, std::size_t nbytes) {
    const auto owner = static_cast<std::size_t>(processes.owner(rank));
    const std::string out = made[owner].substr(std::min(read[owner], made[owner].size()), nbytes);
    read[owner] += nbytes;
    if (out.size() != nbytes) throw Error("process " + std::to_string(owner) + " says too little");
    return out;
  };
  const auto number = [&](int rank) {
    std::uint64_t value = 0;
    std::memcpy(&value, next(rank, sizeof value).data(), sizeof value);
    return static_cast<std::size_t>(value);
  };
  ends_.together("open a mailbox", [&] {
    for (Receiver& receiver : receivers_) receiver.credit = number(sender());
    for (std::size_t i = 0; i < receivers_.size(); ++i) {
      Receiver& receiver = receivers_[i];
      const int rank = receivers()[i];
      receiver.arrived = number(rank);
      if (ends_.members().size() == 1) continue;
      const std::string handle = next(rank, kDeviceHandleBytes);
      const bool seen = receiver.seen != nullptr || !receiver.direct;
      if (!shared_->topology.mine(sender()) || seen) continue;
      Buffer theirs = import_device(handle, sender_device(), landing_nbytes());
      receiver.seen = theirs.data;
      mapped_.push_back(theirs.data);
      shared_->reclaimer.keep_imported(std::move(theirs));
    }
  });
}

int CudaChannel::sender_device() const { return shared_->topology.device(sender()); }

void CudaChannel::check_end(int rank, int slot) const {
  check_slot(slot);
  shared_->topology.processes().check_mine(rank);
  check_open();
}

Buffer CudaChannel::slot(int receiver, int slot) {
  check_slot(slot);
  shared_->topology.processes().check_mine(receivers()[place_of(receiver)]);
  if (closed_) throw Error("channel '" + name() + "' is closed");
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
  check_tensor(index, data);
  check_end(sender(), slot);
  const std::size_t nbytes = layout().specs[index].nbytes;
  if (nbytes == 0) return;
  const std::size_t at = start_of(slot) + layout().offsets[index];
  const DeviceGuard guard(sender_device());
  if (link_) {
    const std::uint64_t ns = shared_->simulated.link()->time_of(nbytes);
    launch_depart(handle_, *link_, ns, as_stream(stream));
  }
  if (mode() != Mode::kCopy) {
    launch_push(handle_, piece_of(layout(), index, data), slot, as_stream(stream));
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
  if (link_) launch_arrive(handle_, *link_, slot, as_stream(stream));
  launch_commit(handle_, slot, as_stream(stream));
}

void CudaChannel::check_put(const std::vector<const void*>& tensors, int slot) const {
  check_tensors(tensors);
  check_end(sender(), slot);
}

bool CudaChannel::add_to(ManyPuts& puts, const std::vector<const void*>& tensors, int slot) const {
  check_put(tensors, slot);
  return add_bundle(puts, handle_, layout(), tensors, slot);
}

void CudaChannel::put(const std::vector<const void*>& tensors, int slot, Stream stream) {
  const nvtx::Range range("put", *this, sender(), slot);
  if (mode() == Mode::kCopy || link_) {
    Channel::put(tensors, slot, stream);
    return;
  }
  check_put(tensors, slot);
  const DeviceGuard guard(sender_device());
  launch_bundle(handle_, layout(), tensors, slot, shared_->topology.launch_of(sender()),
                as_stream(stream));
}

void CudaChannel::get(int rank, int slot, Stream stream) {
  const nvtx::Range range("get", *this, rank, slot);
  const std::size_t place = place_of(rank);
  check_end(rank, slot);
  const Receiver& receiver = receivers_[place];
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
  const std::size_t place = place_of(rank);
  check_end(rank, 0);
  return receivers_[place].handle;
}

void CudaChannel::release(int rank, int slot, Stream stream) {
  const nvtx::Range range("release", *this, rank, slot);
  const std::size_t place = place_of(rank);
  check_end(rank, slot);
  const Receiver& receiver = receivers_[place];
  const DeviceGuard guard(receiver.device);
  launch_release(receiver.handle, slot, shared_->topology.launch_of(rank), as_stream(stream));
}

}  // namespace asyncdiff
