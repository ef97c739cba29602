// NCCL as it is found and loaded, with fakes of it.
#include <cstdlib>
#include <string>

#include "../cuda/nccl_library.hpp"
#include "asyncdiff/errors.hpp"
#include "check.hpp"

using namespace asyncdiff;

namespace {

template <class Work>
std::string message_of(Work work) {
  try {
    work();
  } catch (const NcclError& error) {
    return error.what();
  }
  return "";
}

bool has(const std::string& text, const char* part) { return text.find(part) != std::string::npos; }

void one_that_is_missing_is_said_to_be_installed() {
  setenv("ASYNCDIFF_NCCL", "/nowhere/libnccl.so.2", 1);
  const std::string named = message_of([] { NcclLibrary::get(); });
  CHECK(has(named, "/nowhere/libnccl.so.2") && has(named, "nvidia-nccl-cu13"));
  unsetenv("ASYNCDIFF_NCCL");
  // No loader finds one here, where nothing of it is installed.
  const std::string none = message_of([] { NcclLibrary::get(); });
  CHECK(none.empty() || (has(none, "NCCL 2.18.0 or newer") && has(none, "ASYNCDIFF_NCCL")));
  if (none.empty()) return;
  set_nccl_path("/nowhere/in/a/wheel.so");
  CHECK(has(message_of([] { NcclLibrary::get(); }), "/nowhere/in/a/wheel.so"));
  set_nccl_path(FAKE_NCCL);
  CHECK(NcclLibrary::get().version() == "2.27.5");
}

void one_that_is_too_old_is_refused() {
  const std::string old = message_of([] { NcclLibrary(FAKE_OLD_NCCL); });
  CHECK(has(old, "NCCL 2.17.1 is too old") && has(old, "2.18.0 or newer is needed"));
  CHECK(has(message_of([] { NcclLibrary(FAKE_BROKEN_NCCL); }), "has no ncclSend"));
}

void what_it_says_is_passed_on() {
  const NcclLibrary library(FAKE_NCCL);
  library.check(kNcclSuccess, "anything");
  library.check(kNcclInProgress, "anything");
  CHECK(message_of([&] { library.check(kNcclRemoteError, "sending"); }) ==
        "sending: NCCL says: remote error (the cable is out); NCCL_DEBUG=INFO tells more");
}

}  // namespace

int main() {
  one_that_is_missing_is_said_to_be_installed();
  one_that_is_too_old_is_refused();
  what_it_says_is_passed_on();
}
