#include "spanning_channel.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "asyncdiff/errors.hpp"

namespace asyncdiff {

SpanningChannel::SpanningChannel(std::shared_ptr<const ResetCount> fabric, Processes processes,
                                 Parts parts, bool enqueues, std::string label, int from,
                                 std::vector<int> ranks, Layout bundle, int ring)
    : Channel(std::move(label), from, std::move(ranks), std::move(bundle), ring,
              parts.local ? parts.local->mode() : Mode::kCopy),
      fabric_(std::move(fabric)),
      processes_(std::move(processes)),
      parts_(std::move(parts)),
      enqueues_(enqueues) {}

std::vector<Channel*> SpanningChannel::all() const {
  std::vector<Channel*> out;
  if (parts_.local) out.push_back(parts_.local.get());
  for (const auto& part : parts_.remote) out.push_back(part.get());
  return out;
}

Channel& SpanningChannel::part_of(int receiver) const {
  place_of(receiver);
  for (Channel* part : all()) {
    const std::vector<int>& ranks = part->receivers();
    if (std::find(ranks.begin(), ranks.end(), receiver) != ranks.end()) return *part;
  }
  processes_.check_mine(receiver);
  throw Error("channel '" + name() + "' has no end here");
}

void SpanningChannel::check_sender(int slot) const {
  check_slot(slot);
  processes_.check_mine(sender());
}

Buffer SpanningChannel::slot(int receiver, int slot) {
  check_slot(slot);
  return part_of(receiver).slot(receiver, slot);
}

void SpanningChannel::begin(int slot, Stream stream) {
  check_sender(slot);
  const std::vector<Channel*> parts = all();
  // One that was interrupted is begun again where it was: no part begins twice.
  const std::size_t begun = std::exchange(begun_, 0);
  for (std::size_t i = interrupted_ == *fabric_ ? begun : 0; i < parts.size(); ++i) {
    try {
      parts[i]->begin(slot, stream);
    } catch (const Error&) {
      throw;
    } catch (...) {
      begun_ = i;
      interrupted_ = *fabric_;
      throw;
    }
  }
}

void SpanningChannel::push(std::size_t index, const void* data, int slot, Stream stream) {
  check_sender(slot);
  for (Channel* part : all()) part->push(index, data, slot, stream);
}

void SpanningChannel::commit(int slot, Stream stream) {
  check_sender(slot);
  for (Channel* part : all()) part->commit(slot, stream);
}

void SpanningChannel::put(const std::vector<const void*>& tensors, int slot, Stream stream) {
  check_sender(slot);
  check_tensors(tensors);
  if (!enqueues_) return Channel::put(tensors, slot, stream);
  for (Channel* part : all()) part->put(tensors, slot, stream);
}

void SpanningChannel::get(int receiver, int slot, Stream stream) {
  check_slot(slot);
  part_of(receiver).get(receiver, slot, stream);
}

void SpanningChannel::wait_for(int receiver, std::uint64_t count) {
  part_of(receiver).wait_for(receiver, count);
}

void SpanningChannel::wait_free(std::uint64_t count) {
  processes_.check_mine(sender());
  for (Channel* part : all()) part->wait_free(count);
}

void SpanningChannel::release(int receiver, int slot, Stream stream) {
  check_slot(slot);
  part_of(receiver).release(receiver, slot, stream);
}

void SpanningChannel::close() {
  for (Channel* part : all()) part->close();
}

}  // namespace asyncdiff
