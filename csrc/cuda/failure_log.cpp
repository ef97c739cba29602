#include "failure_log.hpp"

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <mutex>
#include <string>
#include <utility>

#include "asyncdiff/errors.hpp"
#include "copy_text.hpp"

namespace asyncdiff {

namespace {

// Words that devices and other processes write while this one reads.
std::uint64_t load_acquire(const std::uint64_t* word) {
  return __atomic_load_n(word, __ATOMIC_ACQUIRE);
}

const char* name_of(std::uint64_t operation) {
  switch (static_cast<Operation>(operation)) {
    case Operation::kBegin:
      return "begin";
    case Operation::kPush:
      return "push";
    case Operation::kCommit:
      return "commit";
    case Operation::kGet:
      return "get";
    case Operation::kRelease:
      return "release";
  }
  return "unknown operation";
}

}  // namespace

FailureLog::FailureLog(Buffer host, std::size_t word, std::size_t note, double deadline_seconds)
    : deadline_(deadline_seconds),
      host_(std::move(host)),
      word_(reinterpret_cast<std::uint64_t*>(host_.data + word)),
      note_(reinterpret_cast<AbortNote*>(host_.data + note)) {}

bool FailureLog::failed() const {
  const std::lock_guard lock(mutex_);
  return host_.data != nullptr && load_acquire(word_) != 0;
}

void FailureLog::abort(int rank, const std::string& reason) {
  const std::lock_guard lock(mutex_);
  if (host_.data == nullptr) return;
  std::uint32_t none = AbortNote::kNone;
  if (note_->state.compare_exchange_strong(none, AbortNote::kBeingWritten)) {
    note_->rank = rank;
    copy_text(note_->reason, reason);
    note_->state.store(AbortNote::kThere, std::memory_order_release);
  }
  __atomic_store_n(word_, 1, __ATOMIC_RELEASE);
}

void FailureLog::check() const {
  const std::lock_guard lock(mutex_);
  if (host_.data == nullptr || load_acquire(word_) == 0) return;
  const End* first = nullptr;
  for (const End& end : ends_) {
    if (load_acquire(&end.record->kind) == 0) continue;
    if (first == nullptr || end.record->time < first->record->time) first = &end;
  }
  if (first != nullptr) {
    const FailureRecord& r = *first->record;
    const Incident incident{
        first->rank, static_cast<int>(r.peer), first->channel, static_cast<int>(r.slot), r.expected,
        r.seen,      name_of(r.operation)};
    switch (static_cast<FailureKind>(r.kind)) {
      case FailureKind::kTimeout:
        throw ExchangeTimeout(incident, deadline_);
      case FailureKind::kCallOrder:
        throw SlotOrderError(incident, OutOfTurn::kCall);
      default:
        throw SlotOrderError(incident, OutOfTurn::kSlot);
    }
  }
  if (note_->state.load(std::memory_order_acquire) == AbortNote::kThere) {
    throw Aborted(note_->rank, note_->reason);
  }
  throw Aborted(-1, "no reason was left");
}

WaitContext FailureLog::add_end(int rank, const std::string& channel, std::size_t record,
                                unsigned* claimed) {
  const std::lock_guard lock(mutex_);
  auto* at = reinterpret_cast<FailureRecord*>(host_.data + record);
  ends_.push_back({at, record, rank, channel});
  return {word_, at, claimed, static_cast<std::uint64_t>(deadline_ * 1e9)};
}

void FailureLog::forget(const std::function<bool(std::size_t)>& gone) {
  const std::lock_guard lock(mutex_);
  ends_.erase(
      std::remove_if(ends_.begin(), ends_.end(), [&](const End& e) { return gone(e.offset); }),
      ends_.end());
}

void FailureLog::close() {
  const std::lock_guard lock(mutex_);
  ends_.clear();
  host_ = {};
}

}  // namespace asyncdiff
