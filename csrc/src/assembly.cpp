#include "assembly.hpp"

#include <chrono>
#include <cstddef>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "asyncdiff/errors.hpp"
#include "asyncdiff/shared_memory.hpp"
#include "copy_text.hpp"
#include "greeting.hpp"

namespace asyncdiff {

Assembly::Assembly(Rendezvous& rendezvous, std::vector<int> owners, double deadline)
    : owners_(std::move(owners)),
      process_(rendezvous.process()),
      count_(rendezvous.processes()),
      deadline_(deadline),
      forks_(forks()) {
  try {
    Greeting greeting = greet(rendezvous, Board::nbytes(count_));
    memory_ = std::move(greeting.memory);
    board_ = Board(memory_.data, count_);
    watcher_ = std::make_unique<Watcher>(board_, std::move(greeting.identities), process_,
                                         deadline / 2, [this](int p) { process_ended(p); });
    watcher_->start();
    std::vector<int> everybody;
    for (int p = 0; p < count_; ++p) everybody.push_back(p);
    exchange(everybody, "", "make a fabric", deadline_);
    watcher_->all_there();
  } catch (const ProcessLost& error) {  // a rendezvous knows no ranks
    remove_leftovers();
    throw ProcessLost(error.process, ranks_of(error.process), error.what());
  } catch (const CollectiveTimeout& error) {
    remove_leftovers();
    throw CollectiveTimeout(error.process, ranks_of(error.process), error.what());
  } catch (...) {
    remove_leftovers();
    throw;
  }
}

Assembly::~Assembly() {
  if (!own()) {
    watcher_->forget();
    return;
  }
  leave();
}

void Assembly::on_end(std::function<void()> wake) {
  const std::lock_guard lock(wake_mutex_);
  wake_ = std::move(wake);
}

std::vector<int> Assembly::ranks_of(int process) const {
  std::vector<int> out;
  for (std::size_t rank = 0; rank < owners_.size(); ++rank) {
    if (owners_[rank] == process) out.push_back(static_cast<int>(rank));
  }
  return out;
}

std::string Assembly::name_of(int process) const {
  const std::vector<int> ranks = ranks_of(process);
  std::string out = "process " + std::to_string(process);
  if (ranks.empty()) return out + " (no rank)";
  out += ranks.size() == 1 ? " (rank" : " (ranks";
  for (int rank : ranks) out += " " + std::to_string(rank);
  return out + ")";
}

void Assembly::end(BoardNote::Kind kind, int process, const std::string& text) {
  BoardNote& note = board_.note();
  std::uint32_t none = BoardNote::kNone;
  if (note.state.compare_exchange_strong(none, BoardNote::kBeingWritten)) {
    note.kind = kind;
    note.process = process;
    copy_text(note.text, text);
    note.state.store(BoardNote::kThere, std::memory_order_release);
  }
  for (int p = 0; p < count_; ++p) board_.member(p).changed.notify();
  const std::lock_guard lock(wake_mutex_);
  if (wake_) wake_();
}

void Assembly::process_ended(int process) {
  remove_leftovers();
  if (left(process)) return;
  end(BoardNote::kEnded, process,
      name_of(process) + " has ended without closing the fabric: it was killed, or crashed");
}

void Assembly::lost_because_left(int process) {
  end(BoardNote::kLeft, process,
      name_of(process) + " has closed the fabric, or ended, while others still need it");
}

void Assembly::leave() {
  if (!own() || board_.member(process_).left.exchange(1) != 0) return;
  for (int p = 0; p < count_; ++p) board_.member(p).changed.notify();
  const std::lock_guard lock(wake_mutex_);
  if (wake_) wake_();
}

void Assembly::check() const {
  const BoardNote& note = board_.note();
  std::uint32_t state = note.state.load(std::memory_order_acquire);
  if (state == BoardNote::kNone) return;
  // Writing takes a microsecond, but its thread may have to wait for a core, or have been killed.
  const auto until = std::chrono::steady_clock::now() + std::chrono::seconds(1);
  while (state == BoardNote::kBeingWritten && std::chrono::steady_clock::now() < until) {
    std::this_thread::yield();
    state = note.state.load(std::memory_order_acquire);
  }
  if (state != BoardNote::kThere) {
    throw ProcessLost(-1, {}, "a process ended while it told others of a failure");
  }
  const std::string text = note.text;
  switch (note.kind) {
    case BoardNote::kEnded:
    case BoardNote::kLeft:
      throw ProcessLost(note.process, ranks_of(note.process), text);
    case BoardNote::kLate:
      throw CollectiveTimeout(note.process, ranks_of(note.process), text);
    case BoardNote::kDiffered:
      throw InvalidArgument(text);
    default:
      throw Error(text);
  }
}

void Assembly::check_own() const {
  if (!own()) {
    throw Error("this process was forked from the one whose fabric this is, and does not act for " +
                name_of(process_) + ": make a fabric here, or start processes without fork");
  }
}

}  // namespace asyncdiff
