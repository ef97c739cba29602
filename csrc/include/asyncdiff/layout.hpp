// How a bundle of tensors lies in a slot. Fixed when a channel is made.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "asyncdiff/export.hpp"

namespace asyncdiff {

// No tensor, bundle or mailbox is larger: sizes and offsets are also used with a sign.
constexpr std::size_t kMostBytes = std::numeric_limits<std::size_t>::max() / 2;

// The size in bytes of an element type, by its common name ("float16", "bfloat16", "int64", ...).
// Throws InvalidArgument for an unknown one.
ASYNCDIFF_EXPORT std::size_t element_size(const std::string& dtype);

// One tensor: element type, shape, and strides in elements. Strides must be dense: the elements
// fill their memory without gaps or overlaps, in any order of dimensions. Empty strides mean
// row-major order.
struct ASYNCDIFF_EXPORT TensorSpec {
  TensorSpec(std::string dtype, std::vector<std::int64_t> shape,
             std::vector<std::int64_t> strides = {});

  std::string dtype;
  std::vector<std::int64_t> shape;
  std::vector<std::int64_t> strides;
  std::size_t nbytes;

  // Whether a tensor with these strides lies in memory like this spec. The stride of a dimension
  // of size one means nothing, nor do the strides of an empty tensor; but each has one.
  bool same_strides(const std::vector<std::int64_t>& other) const;
  std::string describe() const;
};

// Tensors one after another, each at a multiple of kAlignment bytes.
struct ASYNCDIFF_EXPORT Layout {
  static constexpr std::size_t kAlignment = 256;

  explicit Layout(std::vector<TensorSpec> specs);

  std::vector<TensorSpec> specs;
  std::vector<std::size_t> offsets;
  std::size_t nbytes = 0;
};

}  // namespace asyncdiff
