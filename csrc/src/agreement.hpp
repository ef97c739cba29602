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

// Collective, as Party::agree(). check() may throw where this process cannot make the call.

ASYNCDIFF_EXPORT void agree_on_fabric(const Processes& processes, const std::string& kind,
                                      const std::string& transport, const std::string& link);
// Among the ends of the channel.
ASYNCDIFF_EXPORT void agree_on_channel(const Party& ends, int sender,
                                       const std::vector<int>& receivers, const Layout& layout,
                                       int slots, const std::string& name, Mode mode);
// Before the memory goes of a channel, or of the fabric: then everybody closes, without a name.
ASYNCDIFF_EXPORT void agree_on_close(const Party& party, const std::string& channel);
ASYNCDIFF_EXPORT void agree_on_reset(const Processes& processes, std::uint64_t first_bundle,
                                     const std::function<void()>& check);

}  // namespace asyncdiff
