// The deadline as text: numbers, what is none, and a program whose locale writes them otherwise.
#include <cstdlib>

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

}  // namespace

int main() {
  check_all();
  use_commas();
  check_all();
}
