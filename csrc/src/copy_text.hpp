// Text for memory that processes share, which has room for so much only.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <string>

namespace asyncdiff {

// What does not fit is cut away by whole characters: half of one is no text in Python.
template <std::size_t N>
void copy_text(char (&to)[N], const std::string& from) {
  std::size_t length = std::min(from.size(), N - 1);
  const auto inside = [&from](std::size_t at) {
    return at < from.size() && (static_cast<unsigned char>(from[at]) & 0xc0u) == 0x80u;
  };
  while (length > 0 && inside(length)) --length;
  std::memcpy(to, from.data(), length);
  to[length] = '\0';
}

}  // namespace asyncdiff
