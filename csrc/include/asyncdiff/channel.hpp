// A one-way channel: one sender, one or more receivers, a ring of slots, a fixed bundle layout.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "asyncdiff/export.hpp"
#include "asyncdiff/layout.hpp"
#include "asyncdiff/memory.hpp"

namespace asyncdiff {

// A stream of the fabric's kind as an integer (cudaStream_t; ignored on the host). 0 is the default
// stream.
using Stream = std::uintptr_t;

// How a channel between GPUs moves bundles. Copy: copy engines, tensor by tensor, which takes no
// multiprocessor. Kernel: a launch stores a tensor, or in a put all of them, to all receivers.
// Inline: the same with data and flag in one store, for small bundles. Auto: the fastest of them by
// measured costs of a put (put_costs.hpp). On the host they are all the same, a copy.
enum class Mode { kAuto, kInline, kKernel, kCopy };

ASYNCDIFF_EXPORT Mode mode_from(const std::string& name);
ASYNCDIFF_EXPORT std::string name_of(Mode mode);

// What a channel is called that was given no name.
ASYNCDIFF_EXPORT std::string channel_name(int sender, const std::vector<int>& receivers);

// The n-th bundle (n = 0, 1, ...) uses slot n % slots. Callers name the slot, so that a captured
// graph always touches the same memory; the channel checks it against its own count, which on CUDA
// lives in device memory and is advanced by the kernels, so that replays count.
//
// Sender:    begin(slot)  push(tensor) ...  commit(slot), or put(tensors, slot)
// Receiver:  get(slot)  ...reads the slot...  release(slot)
//
// begin waits until every receiver has released what the slot held before. commit makes the
// bundle visible; data is ordered before it. On the host these calls block and throw; on CUDA they
// only enqueue, and what goes wrong on the device shows in Fabric::check().
//
// A begin that fails, or comes out of turn, grants no slot: pushes behind it store nothing, and
// commit tells nobody. Copy engines cannot be told not to copy, so that with Mode::kCopy the copies
// behind such a begin run, into a slot that may still be read. But the failure is there before the
// first of them: whoever has read slots, synchronizes and then finds that Fabric::check() throws
// nothing has read whole bundles.
class ASYNCDIFF_EXPORT Channel {
 public:
  Channel(std::string name, int sender, std::vector<int> receivers, Layout layout, int slots,
          Mode mode);
  virtual ~Channel() = default;
  Channel(const Channel&) = delete;
  Channel& operator=(const Channel&) = delete;

  const std::string& name() const { return name_; }
  int sender() const { return sender_; }
  const std::vector<int>& receivers() const { return receivers_; }
  const Layout& layout() const { return layout_; }
  int slots() const { return slots_; }
  // Never kAuto.
  Mode mode() const { return mode_; }

  // Throws InvalidArgument for more or fewer tensors than a bundle has, and for one of some bytes
  // at a null pointer, which no kernel could read.
  void check_tensors(const std::vector<const void*>& tensors) const;

  // The memory of a slot in a receiver's mailbox.
  virtual Buffer slot(int receiver, int slot) = 0;

  virtual void begin(int slot, Stream stream) = 0;
  // Copies one tensor, laid out like specs[index], to all receivers.
  virtual void push(std::size_t index, const void* data, int slot, Stream stream) = 0;
  virtual void commit(int slot, Stream stream) = 0;
  // All three for a whole bundle: tensors[i] is laid out like specs[i].
  virtual void put(const std::vector<const void*>& tensors, int slot, Stream stream);
  virtual void get(int receiver, int slot, Stream stream) = 0;
  // Blocks until `count` bundles since the fabric was reset have arrived at this receiver, if they
  // come from another host's GPU; elsewhere returns at once. A get of the last of them then waits
  // for nothing on the device. Throws what check() does, ExchangeTimeout at the deadline.
  virtual void wait_for(int receiver, std::uint64_t count);
  // Blocks until receivers on other hosts have released what lay where the `count`-th bundle since
  // the fabric was reset goes; elsewhere returns at once. Its begin then waits for none of them on
  // the device. Throws as wait_for does.
  virtual void wait_free(std::uint64_t count);
  virtual void release(int receiver, int slot, Stream stream) = 0;

  // Gives back what the channel has; it cannot be used any more. Nothing may be in flight. With
  // several processes it is collective among those that run its ends. A second call does nothing.
  virtual void close() = 0;

 protected:
  void check_slot(int slot) const;
  // The same as check_tensors() for one of them.
  void check_tensor(std::size_t index, const void* data) const;
  // The receiver's place in receivers(); throws InvalidArgument if it has none.
  std::size_t place_of(int receiver) const;

 private:
  std::string name_;
  int sender_;
  std::vector<int> receivers_;
  Layout layout_;
  int slots_;
  Mode mode_;
};

// One put of several that go together.
struct Put {
  std::shared_ptr<Channel> channel;
  std::vector<const void*> tensors;
  int slot;
};

}  // namespace asyncdiff
