#include "nvtx.hpp"

#include <string>

#if __has_include(<nvtx3/nvToolsExt.h>)
#include <nvtx3/nvToolsExt.h>
#define ASYNCDIFF_WITH_NVTX
#endif

namespace asyncdiff::nvtx {

#ifdef ASYNCDIFF_WITH_NVTX

namespace {

// Null where no tool was injected when it was made. Never destroyed: ranges may close at exit.
nvtxDomainHandle_t domain() {
  static nvtxDomainHandle_t handle = nvtxDomainCreateA("asyncdiff");
  return handle;
}

}  // namespace

bool listening() { return domain() != nullptr; }

void push(const char* message) {
  nvtxEventAttributes_t attributes{};
  attributes.version = NVTX_VERSION;
  attributes.size = NVTX_EVENT_ATTRIB_STRUCT_SIZE;
  attributes.messageType = NVTX_MESSAGE_TYPE_ASCII;
  attributes.message.ascii = message;
  nvtxDomainRangePushEx(domain(), &attributes);
}

void pop() { nvtxDomainRangePop(domain()); }

#else

bool listening() { return false; }
void push(const char*) {}
void pop() {}

#endif

void Range::open(const char* operation, const Channel& channel, int rank, int slot) {
  const std::string message = std::string(operation) + " '" + channel.name() + "' rank " +
                              std::to_string(rank) + " slot " + std::to_string(slot) + " " +
                              std::to_string(channel.layout().nbytes) + " bytes";
  push(message.c_str());
}

}  // namespace asyncdiff::nvtx
