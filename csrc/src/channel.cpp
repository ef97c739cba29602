#include "asyncdiff/channel.hpp"

#include <algorithm>
#include <cstddef>
#include <string>
#include <utility>
#include <vector>

#include "asyncdiff/errors.hpp"

namespace asyncdiff {

Mode mode_from(const std::string& name) {
  for (Mode mode : {Mode::kAuto, Mode::kInline, Mode::kKernel, Mode::kCopy}) {
    if (name == name_of(mode)) return mode;
  }
  throw InvalidArgument("mode '" + name + "': choose auto, inline, kernel or copy");
}

std::string name_of(Mode mode) {
  switch (mode) {
    case Mode::kAuto:
      return "auto";
    case Mode::kInline:
      return "inline";
    case Mode::kKernel:
      return "kernel";
    case Mode::kCopy:
      return "copy";
  }
  return "unknown mode";
}

std::string channel_name(int sender, const std::vector<int>& receivers) {
  std::string out = std::to_string(sender) + " to";
  for (int receiver : receivers) out += " " + std::to_string(receiver);
  return out;
}

void Channel::wait_for(int receiver, std::uint64_t /*count*/) { place_of(receiver); }

void Channel::wait_free(std::uint64_t /*count*/) {}

void Channel::put(const std::vector<const void*>& tensors, int slot, Stream stream) {
  check_tensors(tensors);
  begin(slot, stream);
  for (std::size_t i = 0; i < tensors.size(); ++i) push(i, tensors[i], slot, stream);
  commit(slot, stream);
}

Channel::Channel(std::string name, int sender, std::vector<int> receivers, Layout layout, int slots,
                 Mode mode)
    : name_(std::move(name)),
      sender_(sender),
      receivers_(std::move(receivers)),
      layout_(std::move(layout)),
      slots_(slots),
      mode_(mode) {
  if (name_.empty()) name_ = channel_name(sender_, receivers_);
  // Of all mailboxes; inline words take twice the memory.
  const std::size_t bundles = 2 * static_cast<std::size_t>(slots_) * receivers_.size();
  if (bundles > 0 && layout_.nbytes > kMostBytes / bundles) {
    throw InvalidArgument("channel '" + name_ + "' is too large to address: bundles of " +
                          std::to_string(layout_.nbytes) + " bytes in " + std::to_string(slots_) +
                          " slots of " + std::to_string(receivers_.size()) +
                          " receivers; make bundles smaller or slots fewer");
  }
}

void Channel::check_slot(int slot) const {
  if (slot < 0 || slot >= slots_) {
    throw InvalidArgument("slot " + std::to_string(slot) + ": channel '" + name_ + "' has " +
                          std::to_string(slots_) + " slots, from 0");
  }
}

void Channel::check_tensor(std::size_t index, const void* data) const {
  if (index >= layout_.specs.size()) {
    throw InvalidArgument("tensor " + std::to_string(index) + ": the bundle of channel '" + name_ +
                          "' has " + std::to_string(layout_.specs.size()) + " tensors, from 0");
  }
  if (data == nullptr && layout_.specs[index].nbytes > 0) {
    throw InvalidArgument("tensor " + std::to_string(index) + " of channel '" + name_ +
                          "' has no memory: its address is null");
  }
}

void Channel::check_tensors(const std::vector<const void*>& tensors) const {
  if (tensors.size() != layout_.specs.size()) {
    throw InvalidArgument(std::to_string(tensors.size()) + " tensors for channel '" + name_ +
                          "', whose bundle has " + std::to_string(layout_.specs.size()));
  }
  for (std::size_t i = 0; i < tensors.size(); ++i) check_tensor(i, tensors[i]);
}

std::size_t Channel::place_of(int receiver) const {
  const auto found = std::find(receivers_.begin(), receivers_.end(), receiver);
  if (found == receivers_.end()) {
    throw InvalidArgument("rank " + std::to_string(receiver) + " does not receive from channel '" +
                          name_ + "'");
  }
  return static_cast<std::size_t>(found - receivers_.begin());
}

}  // namespace asyncdiff
