#include "assembly.hpp"

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdlib>
#include <functional>
#include <map>
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

namespace {

// Seconds for which a process of another host may say nothing, whatever the deadline is: a thread
// may have to wait for a core.
constexpr double kLeastPatience = 2;

}  // namespace

Assembly::Assembly(Rendezvous& rendezvous, std::vector<int> owners, double deadline)
    : owners_(std::move(owners)),
      process_(rendezvous.process()),
      count_(rendezvous.processes()),
      deadline_(deadline),
      forks_(forks()) {
  try {
    Greeting greeting = greet(rendezvous, Board::nbytes(count_), deadline_ / 2);
    memory_ = std::move(greeting.memory);
    hosts_ = std::move(greeting.hosts);
    board_ = Board(memory_.data, count_);
    watcher_ = std::make_unique<Watcher>(board_, std::move(greeting.identities), process_,
                                         deadline / 2, [this](int p) { process_ended(p); });
    relay_ = relay_to(std::move(greeting.connections));
    relay_->start();
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
    relay_->forget();
    return;
  }
  leave();
}

std::unique_ptr<Relay> Assembly::relay_to(std::map<int, Wire> connections) {
  Relay::Events events;
  events.ended = [this](int p, const std::string& why) { lost(p, why); };
  events.left = [this](int) { wake(); };
  events.noted = [this](const std::string& bytes) {
    const std::vector<std::string> parts = unpacked(bytes);
    if (parts.size() != 3) return;
    note(static_cast<BoardNote::Kind>(std::atoi(parts[0].c_str())), std::atoi(parts[1].c_str()),
         parts[2]);
    wake();
  };
  events.told = [this](const std::string& text) {
    const std::lock_guard lock(wake_mutex_);
    if (heard_) heard_(text);
  };
  const double patience = std::max(deadline_ / 2, kLeastPatience);
  return std::make_unique<Relay>(board_, process_, std::move(connections), patience,
                                 std::move(events));
}

void Assembly::on_told(std::function<void(const std::string&)> heard) {
  const std::lock_guard lock(wake_mutex_);
  heard_ = std::move(heard);
}

void Assembly::tell(const std::string& text) { relay_->tell(text); }

void Assembly::heartbeat(const std::string& doing) {
  check_own();
  board_.member(process_).step.say(doing);
  relay_->say_step(doing);
}

const BoardStep& Assembly::step(int process) const {
  return relay_->reaches(process) ? relay_->step(process) : board_.member(process).step;
}

void Assembly::ring_changed(int process) {
  if (relay_->reaches(process)) {
    relay_->ring_changed();
  } else {
    board_.member(process).changed.notify();
  }
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

bool Assembly::left(int process) const {
  if (relay_ && relay_->reaches(process)) return relay_->left(process);
  return board_.member(process).left.load() != 0;
}

// Whether it is the first.
bool Assembly::note(BoardNote::Kind kind, int process, const std::string& text) {
  BoardNote& note = board_.note();
  std::uint32_t none = BoardNote::kNone;
  if (!note.state.compare_exchange_strong(none, BoardNote::kBeingWritten)) return false;
  note.kind = kind;
  note.process = process;
  copy_text(note.text, text);
  note.state.store(BoardNote::kThere, std::memory_order_release);
  return true;
}

void Assembly::wake() {
  for (int p = 0; p < count_; ++p) board_.member(p).changed.notify();
  const std::lock_guard lock(wake_mutex_);
  if (wake_) wake_();
}

void Assembly::end(BoardNote::Kind kind, int process, const std::string& text) {
  const bool first = note(kind, process, text);
  if (first) say_note();
  wake();
}

void Assembly::say_note() {
  const BoardNote& note = board_.note();
  if (note.state.load(std::memory_order_acquire) != BoardNote::kThere) return;
  relay_->say_note(packed({std::to_string(note.kind), std::to_string(note.process), note.text}));
}

void Assembly::lost(int process, const std::string& why) {
  if (!left(process)) end(BoardNote::kEnded, process, name_of(process) + " " + why);
}

void Assembly::process_ended(int process) {
  remove_leftovers();
  lost(process, "has ended without closing the fabric: it was killed, or crashed");
}

void Assembly::check_ended(const std::vector<int>& members) {
  check_own();
  for (int p : members) {
    if (watcher_->has_ended(p)) process_ended(p);
  }
  check();
}

void Assembly::lost_because_left(int process) {
  end(BoardNote::kLeft, process,
      name_of(process) + " has closed the fabric, or ended, while others still need it");
}

void Assembly::leave() {
  if (!own() || board_.member(process_).left.exchange(1) != 0) return;
  wake();
  say_note();  // another process of this host may not have said it yet: it comes before what
               // follows
  relay_->say_left();
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
