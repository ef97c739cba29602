// Ends waits on the host before their time, where whoever runs the library asks for it: for Ctrl-C.
#pragma once

#include "asyncdiff/export.hpp"

namespace asyncdiff {

// Throws if there is a reason to stop. Threads that wait on the host call it about ten times a
// second, and after a signal; they hold no lock then. A begin, get or put that ends so was not
// done, and can be done again.
using InterruptCheck = void (*)();

// Null, as at the beginning: nothing ends a wait but what it waits for, a failure or the deadline.
ASYNCDIFF_EXPORT void set_interrupt_check(InterruptCheck check);

ASYNCDIFF_EXPORT void check_interrupt();

}  // namespace asyncdiff
