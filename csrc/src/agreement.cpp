#include "agreement.hpp"

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace asyncdiff {

namespace {

std::string text_of(const std::vector<int>& numbers) {
  std::string out;
  for (int number : numbers) out += (out.empty() ? "" : " ") + std::to_string(number);
  return "(" + out + ")";
}

// Strides that mean nothing may differ.
std::string text_of(TensorSpec spec) {
  for (std::size_t i = 0; i < spec.shape.size(); ++i) {
    if (spec.nbytes == 0 || spec.shape[i] == 1) spec.strides[i] = 0;
  }
  return spec.describe();
}

}  // namespace

void agree_on_fabric(const Processes& processes, const std::string& kind,
                     const std::string& transport, const std::string& link) {
  processes.everybody().agree("make a fabric", [&] {
    return Party::Values{{"the call", "make a fabric"},
                         {"its kind", kind},
                         {"the list of its ranks' processes", text_of(processes.owners())},
                         {"its transport", transport},
                         {"its simulated link", link}};
  });
}

void agree_on_channel(const Party& ends, int sender, const std::vector<int>& receivers,
                      const Layout& layout, int slots, const std::string& name, Mode mode) {
  ends.agree("make a channel", [&] {
    Party::Values out = {{"the call", "make a channel"},
                         {"the channel's name", "'" + name + "'"},
                         {"its sender", std::to_string(sender)},
                         {"the list of its receivers", text_of(receivers)},
                         {"the number of its slots", std::to_string(slots)},
                         {"its mode", name_of(mode)},
                         {"the number of tensors", std::to_string(layout.specs.size())}};
    for (std::size_t i = 0; i < layout.specs.size(); ++i) {
      out.emplace_back("tensor " + std::to_string(i), text_of(layout.specs[i]));
    }
    return out;
  });
}

void agree_on_close(const Party& party, const std::string& channel) {
  const std::string what = channel.empty() ? "close the fabric" : "close a channel";
  party.agree(what, [&] {
    return Party::Values{{"the call", what}, {"the channel's name", "'" + channel + "'"}};
  });
}

void agree_on_reset(const Processes& processes, std::uint64_t first_bundle,
                    const std::function<void()>& check) {
  processes.everybody().agree("reset", [&] {
    check();
    return Party::Values{{"the call", "reset"}, {"its first bundle", std::to_string(first_bundle)}};
  });
}

}  // namespace asyncdiff
