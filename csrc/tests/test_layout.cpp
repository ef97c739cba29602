// Specs and layouts: sizes, dense strides, refusals.
#include <cstddef>
#include <cstdint>
#include <vector>

#include "asyncdiff/errors.hpp"
#include "asyncdiff/layout.hpp"
#include "check.hpp"

using asyncdiff::InvalidArgument;
using asyncdiff::Layout;
using asyncdiff::TensorSpec;

int main() {
  const TensorSpec rows("bfloat16", {2, 3, 4});
  CHECK(rows.nbytes == 48);
  CHECK((rows.strides == std::vector<std::int64_t>{12, 4, 1}));

  const TensorSpec channels_last("float32", {2, 3, 4, 5}, {60, 1, 15, 3});
  CHECK(channels_last.nbytes == 480);
  CHECK(channels_last.same_strides({60, 1, 15, 3}));
  CHECK(!channels_last.same_strides({60, 20, 5, 1}));
  CHECK(TensorSpec("float32", {1, 7}, {99, 1}).same_strides({7, 1}));

  CHECK(!channels_last.same_strides({}));
  CHECK(!channels_last.same_strides({60, 1, 15, 3, 1}));

  CHECK(TensorSpec("float64", {}).nbytes == 8);
  CHECK(TensorSpec("float64", {3, 0}).nbytes == 0);
  CHECK_THROWS(TensorSpec("float33", {1}), InvalidArgument);
  CHECK_THROWS(TensorSpec("float32", {-1}), InvalidArgument);
  CHECK_THROWS(TensorSpec("float32", {4, 4}, {8, 1}), InvalidArgument);
  CHECK_THROWS(TensorSpec("uint8", {std::int64_t{1} << 40, std::int64_t{1} << 40}),
               InvalidArgument);

  const Layout layout({TensorSpec("uint8", {1}), TensorSpec("uint8", {0}),
                       TensorSpec("uint8", {257}), TensorSpec("uint8", {1})});
  CHECK((layout.offsets == std::vector<std::size_t>{0, 256, 256, 768}));
  CHECK(layout.nbytes == 1024);
  CHECK(Layout({}).nbytes == 0);
  const TensorSpec huge("uint8", {std::int64_t{1} << 62});
  CHECK(Layout({huge}).nbytes == std::size_t{1} << 62);
  CHECK_THROWS(Layout({huge, huge}), InvalidArgument);
  CHECK_THROWS(Layout({huge, huge, huge, huge}), InvalidArgument);
}
