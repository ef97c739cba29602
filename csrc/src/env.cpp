#include "asyncdiff/env.hpp"

#include <cstdlib>
#include <locale>
#include <sstream>
#include <string>

#include "asyncdiff/errors.hpp"

namespace asyncdiff::env {

namespace {

std::string text_of(const char* name, const char* otherwise) {
  const char* text = std::getenv(name);
  return text == nullptr || *text == '\0' ? otherwise : text;
}

}  // namespace

double deadline() {
  const char* text = std::getenv("ASYNCDIFF_DEADLINE");
  if (text == nullptr || *text == '\0') return 10.0;
  // Neither strtod, which follows the program's locale, nor from_chars, which compilers lack that
  // CUDA 12 supports.
  std::istringstream in(text);
  in.imbue(std::locale::classic());
  double seconds = 0;
  if (!(in >> seconds) || in.peek() != std::istringstream::traits_type::eof() || seconds <= 0) {
    throw InvalidArgument(std::string("ASYNCDIFF_DEADLINE='") + text +
                          "' is not a positive number of seconds");
  }
  return seconds;
}

std::string transport() { return text_of("ASYNCDIFF_TRANSPORT", "auto"); }

std::string cache() {
  const std::string folder = text_of("ASYNCDIFF_CACHE", "");
  if (!folder.empty()) return folder == "off" ? "" : folder;
  const std::string shared = text_of("XDG_CACHE_HOME", "");
  if (!shared.empty()) return shared + "/asyncdiff";
  const std::string home = text_of("HOME", "");
  return home.empty() ? "" : home + "/.cache/asyncdiff";
}

}  // namespace asyncdiff::env
