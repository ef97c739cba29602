#include "nccl_library.hpp"

#include <dlfcn.h>

#include <memory>
#include <mutex>
#include <string>

#include "asyncdiff/env.hpp"
#include "asyncdiff/errors.hpp"

namespace asyncdiff {

namespace {

constexpr char kName[] = "libnccl.so.2";
// The first one whose configuration is the one above. Torch 2.6 came with 2.21.
constexpr int kOldest = 21800;

constexpr char kInstall[] =
    "; it comes with torch for CUDA, or install nvidia-nccl-cu13 (for CUDA 12: nvidia-nccl-cu12), "
    "or set ASYNCDIFF_NCCL to the path of a libnccl.so.2";

std::mutex mutex;  // guards both
std::string wheel;
std::unique_ptr<const NcclLibrary> loaded;

std::string text_of(int version) {
  return std::to_string(version / 10000) + "." + std::to_string(version / 100 % 100) + "." +
         std::to_string(version % 100);
}

std::string why() {
  const char* text = dlerror();
  return text == nullptr ? "unknown reason" : text;
}

void* open(const std::string& path) {
  void* const library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) throw NcclError("NCCL cannot be loaded: " + why() + kInstall);
  return library;
}

// Of all places where it may be, unless the environment names one.
void* find() {
  if (void* const there = dlopen(kName, RTLD_NOW | RTLD_NOLOAD); there != nullptr) return there;
  if (void* const found = dlopen(kName, RTLD_NOW | RTLD_LOCAL); found != nullptr) return found;
  const std::string reason = why();
  if (!wheel.empty()) return open(wheel);
  throw NcclError("ranks on GPUs of several hosts need NCCL " + text_of(kOldest) +
                  " or newer, which was not found (" + reason + ")" + kInstall);
}

template <class Function>
void look_up(void* library, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(library, name));
  if (function == nullptr) {
    throw NcclError(std::string("this NCCL has no ") + name + ": " + text_of(kOldest) +
                    " or newer is needed" + kInstall);
  }
}

}  // namespace

const NcclLibrary& NcclLibrary::get() {
  const std::lock_guard lock(mutex);
  if (!loaded) {
    const std::string named = env::nccl();
    loaded.reset(new NcclLibrary(named.empty() ? find() : open(named)));
  }
  return *loaded;
}

NcclLibrary::NcclLibrary(const std::string& path) : NcclLibrary(open(path)) {}

// Never unloaded: its threads outlive communicators.
NcclLibrary::NcclLibrary(void* library) {
  int (*get_version)(int*) = nullptr;
  look_up(library, "ncclGetVersion", get_version);
  if (get_version(&version_) != kNcclSuccess) throw NcclError("NCCL does not tell its version");
  if (version_ < kOldest) {
    // Numbers were made in another way before 2.9.
    throw NcclError("NCCL " + (version_ < 10000 ? std::to_string(version_) : version()) +
                    " is too old: " + text_of(kOldest) + " or newer is needed" + kInstall);
  }
  look_up(library, "ncclGetUniqueId", get_unique_id);
  look_up(library, "ncclCommInitRankConfig", make);
  look_up(library, "ncclCommFinalize", finalize);
  look_up(library, "ncclCommDestroy", destroy);
  look_up(library, "ncclCommAbort", abort);
  look_up(library, "ncclCommGetAsyncError", async_error);
  look_up(library, "ncclSend", send);
  look_up(library, "ncclRecv", receive);
  look_up(library, "ncclGetErrorString", error_string_);
  look_up(library, "ncclGetLastError", last_error_);
}

std::string NcclLibrary::version() const { return text_of(version_); }

void NcclLibrary::check(int result, const std::string& what, NcclHandle* communicator) const {
  if (result == kNcclSuccess || result == kNcclInProgress) return;
  const char* const last = last_error_(communicator);
  throw NcclError(what + ": NCCL says: " + error_string_(result) +
                  (last == nullptr || *last == '\0' ? "" : std::string(" (") + last + ")") +
                  "; NCCL_DEBUG=INFO tells more");
}

void set_nccl_path(const std::string& path) {
  const std::lock_guard lock(mutex);
  wheel = path;
}

}  // namespace asyncdiff
