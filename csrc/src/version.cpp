#include "asyncdiff/version.hpp"

namespace asyncdiff {

const char* version() noexcept { return ASYNCDIFF_VERSION; }

}  // namespace asyncdiff
