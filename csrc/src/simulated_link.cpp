#include "asyncdiff/simulated_link.hpp"

#include <cstddef>
#include <locale>
#include <optional>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "asyncdiff/errors.hpp"

namespace asyncdiff {

namespace {

using Units = std::vector<std::pair<const char*, double>>;

// Of GB/s, and of a microsecond.
const Units kBandwidths = {
    {"GB/s", 1}, {"MB/s", 1e-3}, {"kB/s", 1e-6}, {"Gb/s", 0.125}, {"Mb/s", 0.125e-3}};
// A microsecond is written with the micro sign, which keyboards have, or with the Greek letter.
const Units kLatencies = {{"ns", 1e-3}, {"us", 1}, {"\u00b5s", 1}, {"\u03bcs", 1}, {"ms", 1e3}};
constexpr double kMostGbPerS = 1e6;
constexpr double kLeastGbPerS = 1e-6;
constexpr double kMostLatencyUs = 10e6;

// "2.5us" in microseconds; none where it is no number with one of these units.
std::optional<double> value_of(const std::string& text, const Units& units) {
  // As in env.cpp: neither strtod nor from_chars.
  std::istringstream in(text);
  in.imbue(std::locale::classic());
  double number = 0;
  std::string unit;
  if (!(in >> number >> unit) || in.peek() != std::istringstream::traits_type::eof()) return {};
  for (const auto& [name, factor] : units) {
    if (unit == name) return number * factor;
  }
  return {};
}

std::string text_of(double number) {
  std::ostringstream out;
  out.imbue(std::locale::classic());
  out << number;
  return out.str();
}

[[noreturn]] void refuse(const std::string& text) {
  throw InvalidArgument(
      "link '" + text +
      "': write BANDWIDTH,LATENCY as in 25GB/s,10us, and after them 'both' where both directions "
      "of a pair share a link, or 'all' where all pairs do; bandwidths in GB/s, MB/s, kB/s, "
      "Gb/s or Mb/s, from 1 kB/s to 10^6 GB/s, latencies in ns, us (\u00b5s) or ms, up to 10 s; "
      "or off");
}

// Whether nothing is to be simulated: nothing at all is said, or "off", in any case.
bool is_off(const std::string& text) {
  const char* const kBlanks = " \t\r\n";
  const std::size_t begin = text.find_first_not_of(kBlanks);
  if (begin == std::string::npos) return true;
  std::string word = text.substr(begin, text.find_last_not_of(kBlanks) + 1 - begin);
  for (char& c : word) {
    if (c >= 'A' && c <= 'Z') c = static_cast<char>(c - 'A' + 'a');
  }
  return word == "off";
}

}  // namespace

std::string SimulatedLink::describe() const {
  std::string out = text_of(gb_per_s) + "GB/s," + text_of(latency_us) + "us";
  if (sharing == Sharing::kBoth) out += ",both";
  if (sharing == Sharing::kAll) out += ",all";
  return out;
}

std::optional<SimulatedLink> simulated_link_from(const std::string& text) {
  if (is_off(text)) return {};
  std::vector<std::string> parts(1);
  for (const char c : text) {
    if (c == ',') {
      parts.emplace_back();
    } else {
      parts.back() += c;
    }
  }
  if (parts.size() < 2 || parts.size() > 3) refuse(text);
  const auto bandwidth = value_of(parts[0], kBandwidths);
  const auto latency = value_of(parts[1], kLatencies);
  if (!bandwidth || !latency) refuse(text);
  SimulatedLink out{*bandwidth, *latency};
  if (!(out.gb_per_s >= kLeastGbPerS && out.gb_per_s <= kMostGbPerS)) refuse(text);
  if (!(out.latency_us >= 0 && out.latency_us <= kMostLatencyUs)) refuse(text);
  if (parts.size() == 3) {
    if (parts[2] != "both" && parts[2] != "all") refuse(text);
    out.sharing = parts[2] == "both" ? SimulatedLink::Sharing::kBoth : SimulatedLink::Sharing::kAll;
  }
  return out;
}

void check_latency(const std::optional<SimulatedLink>& link, double deadline_seconds) {
  if (!link || link->latency_us < deadline_seconds * 1e6) return;
  throw InvalidArgument("the simulated link " + link->describe() + " has a latency of " +
                        text_of(link->latency_us / 1e6) + " s, and the deadline of waits is " +
                        text_of(deadline_seconds) +
                        " s: nothing would arrive in time; take a shorter latency "
                        "(ASYNCDIFF_LINK) or a longer deadline (ASYNCDIFF_DEADLINE)");
}

}  // namespace asyncdiff
