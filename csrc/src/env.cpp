#include "asyncdiff/env.hpp"

#include <cstdlib>
#include <locale>
#include <optional>
#include <sstream>
#include <string>

#include "asyncdiff/errors.hpp"

namespace asyncdiff::env {

namespace {

std::string text_of(const char* name, const char* otherwise) {
  const char* text = std::getenv(name);
  return text == nullptr || *text == '\0' ? otherwise : text;
}

std::string given(const char* name, const char* what) {
  const std::string text = text_of(name, "");
  if (text.empty()) {
    throw InvalidArgument(std::string(name) + " is not set: " + what);
  }
  return text;
}

int number(const char* name, const char* what) {
  const std::string text = given(name, what);
  if (text.size() > 9 || text.find_first_not_of("0123456789") != std::string::npos) {
    throw InvalidArgument(std::string(name) + "='" + text + "' is not " + what);
  }
  return std::stoi(text);
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

std::optional<SimulatedLink> link() {
  const std::string text = text_of("ASYNCDIFF_LINK", "");
  try {
    return simulated_link_from(text);
  } catch (const InvalidArgument& error) {
    throw InvalidArgument(std::string("ASYNCDIFF_LINK: ") + error.what());
  }
}

std::string nccl() { return text_of("ASYNCDIFF_NCCL", ""); }

std::string cache() {
  const std::string folder = text_of("ASYNCDIFF_CACHE", "");
  if (!folder.empty()) return folder == "off" ? "" : folder;
  const std::string shared = text_of("XDG_CACHE_HOME", "");
  if (!shared.empty()) return shared + "/asyncdiff";
  const std::string home = text_of("HOME", "");
  return home.empty() ? "" : home + "/.cache/asyncdiff";
}

std::string host() {
  const std::string name = text_of("ASYNCDIFF_HOST", "");
  if (name.size() > 63) {
    throw InvalidArgument("ASYNCDIFF_HOST='" + name + "' is longer than 63 characters");
  }
  return name;
}

std::string network_interface() { return text_of("ASYNCDIFF_INTERFACE", ""); }

std::string first_machine() { return text_of("MASTER_ADDR", ""); }

World world() {
  World out;
  out.process = number("RANK", "the number of this process, from 0");
  out.processes = number("WORLD_SIZE", "how many processes there are");
  out.address = given("MASTER_ADDR", "the machine of process 0");
  if (!text_of("ASYNCDIFF_PORT", "").empty()) {
    out.port = number("ASYNCDIFF_PORT", "a free port of the machine of process 0");
  } else if (text_of("TORCHELASTIC_USE_AGENT_STORE", "") == "True") {
    throw InvalidArgument(
        "torchrun itself listens at MASTER_PORT: set ASYNCDIFF_PORT to another free port");
  } else {
    out.port = number("MASTER_PORT", "a free port of the machine of process 0");
  }
  out.key = given("ASYNCDIFF_AUTHKEY",
                  "a secret that all processes know and strangers cannot guess, such as what "
                  "openssl rand -hex 32 prints");
  return out;
}

}  // namespace asyncdiff::env
