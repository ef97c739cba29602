#include "failure_log.hpp"

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

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

constexpr std::size_t kHeadBytes = 4096;

}  // namespace

// A record, and what it belongs to, behind what kernels write.
struct FailureLog::Line {
  std::uint64_t kind, operation, slot, expected, seen;
  std::int64_t peer;
  std::uint64_t time;
  std::int32_t rank;
  char channel[68];
};

struct FailureLog::Head {
  std::uint64_t abort_word;
  char padding[120];
  AbortNote note;
};

std::size_t FailureLog::nbytes(int processes) {
  return kHeadBytes + static_cast<std::size_t>(processes) * kMostEnds * sizeof(Line);
}

FailureLog::FailureLog(Buffer memory, int process, int processes, double deadline_seconds,
                       int first)
    : deadline_(deadline_seconds),
      process_(process),
      processes_(processes),
      first_(first),
      memory_(std::move(memory)),
      own_lines_(kMostEnds * sizeof(Line)) {
  static_assert(sizeof(Line) == sizeof(FailureRecord) && sizeof(Line) == FlagPool::kLine);
  static_assert(offsetof(Line, time) == offsetof(FailureRecord, time));
  static_assert(sizeof(Head) <= kHeadBytes);
}

FailureLog::Line* FailureLog::lines_of(int process) const {
  return reinterpret_cast<Line*>(memory_.data + kHeadBytes) +
         static_cast<std::size_t>(process) * kMostEnds;
}

FailureLog::Head& FailureLog::head() const { return *reinterpret_cast<Head*>(memory_.data); }

bool FailureLog::failed() const {
  const std::lock_guard lock(mutex_);
  return memory_.data != nullptr && load_acquire(&head().abort_word) != 0;
}

void FailureLog::abort(int rank, const std::string& reason) {
  const std::lock_guard lock(mutex_);
  if (memory_.data == nullptr) return;
  AbortNote& note = head().note;
  std::uint32_t none = AbortNote::kNone;
  if (note.state.compare_exchange_strong(none, AbortNote::kBeingWritten)) {
    note.rank = rank;
    copy_text(note.reason, reason);
    note.state.store(AbortNote::kThere, std::memory_order_release);
  }
  __atomic_store_n(&head().abort_word, 1, __ATOMIC_RELEASE);
}

void FailureLog::end_waits() {
  const std::lock_guard lock(mutex_);
  if (memory_.data != nullptr) __atomic_store_n(&head().abort_word, 1, __ATOMIC_RELEASE);
}

void FailureLog::check(const std::function<void(int)>& why) const {
  std::vector<Line> told;
  std::string aborted = "no reason was left";
  int aborter = -1;
  {
    const std::lock_guard lock(mutex_);
    if (memory_.data == nullptr) return;
    if (load_acquire(&head().abort_word) != 0) {
      for (int p = 0; p < processes_; ++p) {
        const Line* lines = lines_of(p);
        for (std::size_t i = 0; i < kMostEnds; ++i) {
          if (load_acquire(&lines[i].kind) != 0) told.push_back(lines[i]);
        }
      }
      const AbortNote& note = head().note;
      if (note.state.load(std::memory_order_acquire) == AbortNote::kThere) {
        aborted = note.reason;
        aborter = note.rank;
      }
    } else {
      aborted.clear();
    }
  }
  if (aborted.empty()) {
    why(-1);
    return;
  }
  const auto first = std::min_element(told.begin(), told.end(),
                                      [](const Line& a, const Line& b) { return a.time < b.time; });
  if (first == told.end()) {
    if (aborter < 0) why(-1);
    throw Aborted(aborter, aborted);
  }
  Incident incident{first->rank,
                    static_cast<int>(first->peer),
                    first->channel,
                    static_cast<int>(first->slot),
                    first->expected,
                    first->seen,
                    name_of(first->operation),
                    -1};
  switch (static_cast<FailureKind>(first->kind)) {
    case FailureKind::kTimeout:
      break;
    case FailureKind::kCallOrder:
      throw SlotOrderError(incident, OutOfTurn::kCall);
    default:
      throw SlotOrderError(incident, OutOfTurn::kSlot);
  }
  // Who waits for whom, as far as they have told: at most once around.
  incident.straggler = incident.peer;
  for (std::size_t i = 0; i < told.size(); ++i) {
    const auto next = std::find_if(told.begin(), told.end(), [&](const Line& line) {
      return line.rank == incident.straggler &&
             static_cast<FailureKind>(line.kind) == FailureKind::kTimeout;
    });
    if (next == told.end()) break;
    incident.straggler = static_cast<int>(next->peer);
  }
  why(incident.straggler);
  throw ExchangeTimeout(incident, deadline_);
}

void FailureLog::reset() {
  const std::lock_guard lock(mutex_);
  if (memory_.data == nullptr) return;
  if (process_ == first_) std::memset(memory_.data, 0, sizeof(Head));
  Line* lines = lines_of(process_);
  for (std::size_t i = 0; i < own_lines_.used() / sizeof(Line); ++i) {
    std::memset(&lines[i], 0, offsetof(Line, rank));
  }
}

WaitContext FailureLog::add_end(int rank, const std::string& channel, unsigned* claimed) {
  const std::lock_guard lock(mutex_);
  if (memory_.data == nullptr) throw Error("the fabric is closed");
  Line* line = lines_of(process_) + own_lines_.take() / sizeof(Line);
  line->rank = rank;
  copy_text(line->channel, channel);
  return {&head().abort_word, reinterpret_cast<FailureRecord*>(line), claimed,
          static_cast<std::uint64_t>(deadline_ * 1e9)};
}

void FailureLog::remove_end(const FailureRecord* record) {
  const std::lock_guard lock(mutex_);
  if (memory_.data == nullptr) return;
  auto* line = const_cast<Line*>(reinterpret_cast<const Line*>(record));
  std::memset(line, 0, sizeof *line);
  own_lines_.give_back(static_cast<std::size_t>(line - lines_of(process_)) * sizeof(Line), 1);
}

void FailureLog::close() {
  const std::lock_guard lock(mutex_);
  memory_ = {};
}

}  // namespace asyncdiff
