#include "asyncdiff/errors.hpp"

#include <cstdio>
#include <string>

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
  return where(i) + ": waited " + seconds_text(seconds) + " for " + peer + " (expected epoch " +
         std::to_string(i.expected) + ", seen " + std::to_string(i.seen) + "). The peer, " + peer +
         ", failed, or is slower than the deadline allows: raise the deadline if it is";
}

std::string slot_order_text(const Incident& i) {
  return where(i) + ": slot " + std::to_string(i.expected) + " is next (" + std::to_string(i.seen) +
         " bundles so far). The n-th bundle uses slot n % slots, and a slot is committed after it "
         "was begun and released after it was got";
}

}  // namespace

Aborted::Aborted(int rank_, const std::string& reason)
    : Error("rank " + std::to_string(rank_) + " aborted the exchange: " + reason), rank(rank_) {}

ExchangeTimeout::ExchangeTimeout(const Incident& i, double deadline_seconds)
    : Error(timeout_text(i, deadline_seconds)), incident(i) {}

SlotOrderError::SlotOrderError(const Incident& i) : Error(slot_order_text(i)), incident(i) {}

}  // namespace asyncdiff
