// The deadline and the simulated link as text: numbers, what is none, and a program whose locale
// writes them otherwise.
#include <cstdlib>
#include <string>

#include "asyncdiff/env.hpp"
#include "asyncdiff/errors.hpp"
#include "check.hpp"
#include "commas.hpp"

using asyncdiff::InvalidArgument;

namespace {

double deadline_of(const char* text) {
  setenv("ASYNCDIFF_DEADLINE", text, 1);
  return asyncdiff::env::deadline();
}

void check_all() {
  CHECK(deadline_of("") == 10);
  CHECK(deadline_of("7") == 7);
  CHECK(deadline_of("2.5") == 2.5);
  CHECK(deadline_of("1e3") == 1000);
  for (const char* wrong : {"2,5", "1.000,5", "2.5s", "soon", "0", "-1", "nan", "inf", "1e999"}) {
    CHECK_THROWS(deadline_of(wrong), InvalidArgument);
  }
}

std::string link_of(const char* text) {
  setenv("ASYNCDIFF_LINK", text, 1);
  const auto link = asyncdiff::env::link();
  return link ? link->describe() : "none";
}

void check_links() {
  CHECK(link_of("") == "none" && link_of("off") == "none");
  CHECK(link_of("25GB/s,10us") == "25GB/s,10us");
  CHECK(link_of("6.5 GB/s,0.5ms,both") == "6.5GB/s,500us,both");
  CHECK(link_of("10Gb/s,200ns,all") == "1.25GB/s,0.2us,all");
  CHECK(link_of("800MB/s,0us") == "0.8GB/s,0us");
  CHECK(link_of("100Mb/s,1us") == "0.0125GB/s,1us");
  for (const char* wrong :
       {"25GB/s", "25,10", "25GB/s,10", "25gb/s,10us", "0GB/s,10us", "-1GB/s,10us", "nan,1us",
        "25GB/s,-1us", "25GB/s,11s", "25GB/s,60000ms", "25GB/s,10us,", "25GB/s,10us,some",
        "25GB/s,10us,all,all", "2,5GB/s,10us", "1e9GB/s,1us", "fast", ","}) {
    CHECK_THROWS(link_of(wrong), InvalidArgument);
  }
}

}  // namespace

int main() {
  check_all();
  check_links();
  use_commas();
  check_all();
  check_links();
}
