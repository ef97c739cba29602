#include "asyncdiff/interrupt.hpp"

#include <atomic>

namespace asyncdiff {

namespace {

std::atomic<InterruptCheck> installed{nullptr};

}  // namespace

void set_interrupt_check(InterruptCheck check) { installed.store(check); }

void check_interrupt() {
  const InterruptCheck check = installed.load();
  if (check != nullptr) check();
}

}  // namespace asyncdiff
