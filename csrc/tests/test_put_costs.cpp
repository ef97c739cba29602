// Costs of puts: between sizes, beyond them, which mode they make the fastest, as text.
#include <cmath>
#include <cstddef>
#include <string>

#include "asyncdiff/channel.hpp"
#include "asyncdiff/errors.hpp"
#include "asyncdiff/put_costs.hpp"
#include "check.hpp"
#include "commas.hpp"

using asyncdiff::InvalidArgument;
using asyncdiff::Mode;
using asyncdiff::PutCosts;

namespace {

bool near(double a, double b) { return std::abs(a - b) < 1e-9; }

void check_read(const PutCosts& read, const PutCosts& costs) {
  CHECK(read.rows.size() == 3 && read.rows[1].nbytes == 3000);
  for (const Mode mode : {Mode::kKernel, Mode::kCopy}) {
    CHECK(near(read.at(mode, 12345), costs.at(mode, 12345)));
  }
}

}  // namespace

int main() {
  PutCosts costs;
  CHECK_THROWS(costs.at(Mode::kCopy, 1), InvalidArgument);
  // Inline was not measured for the largest.
  costs.rows = {{1000, 2, 3, 6}, {3000, 4, 4, 7}, {1000000, 0, 10, 10.5}};
  costs.copy_node_us = 2;
  CHECK_THROWS(costs.at(Mode::kAuto, 1), InvalidArgument);

  CHECK(near(costs.at(Mode::kInline, 0), 2));
  CHECK(near(costs.at(Mode::kInline, 2000), 3));
  CHECK(near(costs.at(Mode::kKernel, 3000), 4));
  CHECK(near(costs.at(Mode::kCopy, 501500), 8.75));
  CHECK(near(costs.at(Mode::kCopy, 2000000), 21));
  CHECK(std::isinf(costs.at(Mode::kInline, 3001)));

  CHECK(costs.fastest(1000, 1, 1) == Mode::kInline);
  CHECK(costs.fastest(3000, 1, 1) == Mode::kKernel);
  CHECK(costs.fastest(1000000, 1, 1) == Mode::kCopy);
  CHECK(costs.fastest(1000000, 2, 1) == Mode::kKernel);  // a second copy costs
  CHECK(costs.fastest(500000, 1, 2) == Mode::kKernel);   // and so does a second receiver's

  const std::string text = costs.to_text();
  check_read(PutCosts::from_text(text), costs);
  for (const char* wrong :
       {"", "asyncdiff put costs 0\n2 1\n1 1 1 1\n", "asyncdiff put costs 3\n2 2\n1 1 1 1\n",
        "asyncdiff put costs 3\n2 1\n1 1 0 1\n", "asyncdiff put costs 3\n2 2\n5 1 1 1\n5 1 1 1\n",
        "asyncdiff put costs 3\n2 1\n-1 1 1 1\n", "asyncdiff put costs 3\n2 1\n0 1 1 1\n",
        "asyncdiff put costs 3\n-2 1\n1 1 1 1\n",
        "asyncdiff put costs 3\n2 -18446744073709551615\n1 1 1 1\n",
        "asyncdiff put costs 3\nnan 1\n1 1 1 1\n", "asyncdiff put costs 3\n2 1\n1 nan 1 1\n",
        "asyncdiff put costs 3\n2 1\n1 1 1e999 1\n", "asyncdiff put costs 3\n2 1\n1 1 1 inf\n"}) {
    CHECK_THROWS(PutCosts::from_text(wrong), InvalidArgument);
  }

  // One program's table is another's, whatever their locales.
  use_commas();
  CHECK(costs.to_text() == text);
  check_read(PutCosts::from_text(text), costs);
}
