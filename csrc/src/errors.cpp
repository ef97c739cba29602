#include "asyncdiff/errors.hpp"

#include <cstdio>
#include <string>
#include <utility>
#include <vector>

namespace asyncdiff {

namespace {

std::string where(const Incident& i) {
  return "rank " + std::to_string(i.rank) + ", channel '" + i.channel + "', " + i.operation +
         " of slot " + std::to_string(i.slot);
}

std::string seconds_text(double seconds) {
  char text[32];
  std::snprintf(text, sizeof text, "%g s", seconds);
  return text;
}

std::string timeout_text(const Incident& i, double seconds) {
  const std::string peer = "rank " + std::to_string(i.peer);
  const bool chain = i.straggler >= 0 && i.straggler != i.peer;
  const std::string who = "rank " + std::to_string(chain ? i.straggler : i.peer);
  return where(i) + ": waited " + seconds_text(seconds) + " for " + peer + " (expected epoch " +
         std::to_string(i.expected) + ", seen " + std::to_string(i.seen) + ")" +
         (chain ? ", which itself waits, as others may, for " + who + ". " + who
                : ". The peer, " + who + ",") +
         " failed, or is slower than the deadline allows: raise the deadline if it is";
}

// What has to come before a call that is out of turn.
std::string missing_before(const std::string& operation) {
  if (operation == "begin") {
    return "the bundle before it has begun and is not committed: commit it first";
  }
  if (operation == "get") return "an earlier bundle is still held: release it first";
  if (operation == "release") {
    return "no bundle is held: a slot is released once, after it was got";
  }
  return "no bundle has begun: begin comes first";  // push, commit
}

std::string slot_order_text(const Incident& i, OutOfTurn what) {
  const std::string count = " (" + std::to_string(i.seen) + " bundles so far)";
  if (what == OutOfTurn::kCall) return where(i) + count + ": " + missing_before(i.operation);
  return where(i) + ": slot " + std::to_string(i.expected) + " is next" + count +
         ". The n-th bundle, from zero, uses slot n % slots";
}

}  // namespace

Aborted::Aborted(int rank_, const std::string& reason)
    : Error("rank " + std::to_string(rank_) + " aborted the exchange: " + reason), rank(rank_) {}

ProcessLost::ProcessLost(int process_, std::vector<int> ranks_, const std::string& message)
    : Error(message), process(process_), ranks(std::move(ranks_)) {}

CollectiveTimeout::CollectiveTimeout(int process_, std::vector<int> ranks_,
                                     const std::string& message)
    : Error(message), process(process_), ranks(std::move(ranks_)) {}

ExchangeTimeout::ExchangeTimeout(const Incident& i, double deadline_seconds)
    : Error(timeout_text(i, deadline_seconds)), incident(i) {}

SlotOrderError::SlotOrderError(const Incident& i, OutOfTurn what)
    : Error(slot_order_text(i, what)), incident(i) {}

}  // namespace asyncdiff
