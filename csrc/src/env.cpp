#include "asyncdiff/env.hpp"

#include <cmath>
#include <cstdlib>
#include <string>

#include "asyncdiff/errors.hpp"

namespace asyncdiff::env {

double deadline() {
  const char* text = std::getenv("ASYNCDIFF_DEADLINE");
  if (text == nullptr || *text == '\0') return 10.0;
  char* end = nullptr;
  const double seconds = std::strtod(text, &end);
  if (*end != '\0' || !std::isfinite(seconds) || seconds <= 0) {
    throw InvalidArgument(std::string("ASYNCDIFF_DEADLINE='") + text +
                          "' is not a positive number of seconds");
  }
  return seconds;
}

std::string transport() {
  const char* text = std::getenv("ASYNCDIFF_TRANSPORT");
  return text == nullptr || *text == '\0' ? "auto" : text;
}

}  // namespace asyncdiff::env
