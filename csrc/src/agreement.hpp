// What the processes of a fabric have to say alike, whatever kind of fabric it is.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "asyncdiff/channel.hpp"
#include "asyncdiff/export.hpp"
#include "asyncdiff/processes.hpp"

namespace asyncdiff {

// Collective, as Processes::agree(). check() may throw where this process cannot make the call.

ASYNCDIFF_EXPORT void agree_on_fabric(const Processes& processes, const std::string& kind,
                                      const std::string& transport);
ASYNCDIFF_EXPORT void agree_on_channel(const Processes& processes, int sender,
                                       const std::vector<int>& receivers, const Layout& layout,
                                       int slots, const std::string& name, Mode mode,
                                       const std::function<void()>& check);
ASYNCDIFF_EXPORT void agree_on_reset(const Processes& processes, std::uint64_t first_bundle,
                                     const std::function<void()>& check);

}  // namespace asyncdiff
