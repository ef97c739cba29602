// NCCL, which ranks on GPUs of several hosts need. It is loaded when they are made.
#pragma once

#include <string>

#include "asyncdiff/export.hpp"

namespace asyncdiff {

// Where a libnccl.so.2 lies that no loader finds, as in a wheel of nvidia-nccl-cu13 or -cu12. It is
// taken where none is loaded already or found. Empty: nowhere.
ASYNCDIFF_EXPORT void set_nccl_path(const std::string& path);

}  // namespace asyncdiff
