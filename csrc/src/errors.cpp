#include "asyncdiff/errors.hpp"

#include <sstream>

namespace asyncdiff {

namespace {

std::string where(const Incident& i) {
  std::ostringstream out;
  out << "rank " << i.rank << ", channel '" << i.channel << "', " << i.operation << " of slot "
      << i.slot;
  return out.str();
}

std::string timeout_text(const Incident& i, double seconds) {
  std::ostringstream out;
  out << where(i) << ": waited " << seconds << " s for rank " << i.peer << " (expected epoch "
      << i.expected << ", seen " << i.seen << "). Rank " << i.peer
      << " failed, or is slower than the deadline allows: raise the deadline if it is";
  return out.str();
}

std::string slot_order_text(const Incident& i) {
  std::ostringstream out;
  out << where(i) << ": slot " << i.expected << " is next (" << i.seen
      << " bundles so far). The n-th bundle uses slot n % slots, and a slot is committed after it "
         "was begun and released after it was got";
  return out.str();
}

}  // namespace

Aborted::Aborted(int rank_, const std::string& reason)
    : Error("rank " + std::to_string(rank_) + " aborted the exchange: " + reason), rank(rank_) {}

ExchangeTimeout::ExchangeTimeout(const Incident& i, double deadline_seconds)
    : Error(timeout_text(i, deadline_seconds)), incident(i) {}

SlotOrderError::SlotOrderError(const Incident& i) : Error(slot_order_text(i)), incident(i) {}

}  // namespace asyncdiff
