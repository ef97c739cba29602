#include "asyncdiff/layout.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <map>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "asyncdiff/errors.hpp"

namespace asyncdiff {

namespace {

std::string tuple_text(const std::vector<std::int64_t>& values) {
  std::string out = "(";
  for (std::size_t i = 0; i < values.size(); ++i) {
    if (i > 0) out += ", ";
    out += std::to_string(values[i]);
  }
  return out + ")";
}

std::vector<std::int64_t> row_major(const std::vector<std::int64_t>& shape) {
  constexpr std::int64_t kMost = std::numeric_limits<std::int64_t>::max();
  std::vector<std::int64_t> strides(shape.size());
  std::int64_t step = 1;
  for (std::size_t i = shape.size(); i-- > 0;) {
    strides[i] = step;
    const std::int64_t size = std::max<std::int64_t>(shape[i], 1);
    // Sizes of an empty tensor may be any; its strides mean nothing.
    step = step > kMost / size ? kMost : step * size;
  }
  return strides;
}

bool dense(const std::vector<std::int64_t>& shape, const std::vector<std::int64_t>& strides) {
  std::vector<std::size_t> order;
  for (std::size_t i = 0; i < shape.size(); ++i) {
    if (shape[i] == 0) return true;
    if (shape[i] != 1) order.push_back(i);
  }
  std::sort(order.begin(), order.end(),
            [&](std::size_t a, std::size_t b) { return strides[a] < strides[b]; });
  std::int64_t step = 1;
  for (std::size_t i : order) {
    if (strides[i] != step) return false;
    step *= shape[i];
  }
  return true;
}

}  // namespace

std::size_t element_size(const std::string& dtype) {
  static const std::map<std::string, std::size_t> sizes = {
      {"bool", 1},
      {"uint8", 1},
      {"int8", 1},
      {"float8_e4m3fn", 1},
      {"float8_e5m2", 1},
      {"float8_e4m3fnuz", 1},
      {"float8_e5m2fnuz", 1},
      {"float8_e8m0fnu", 1},
      {"uint16", 2},
      {"int16", 2},
      {"float16", 2},
      {"bfloat16", 2},
      {"uint32", 4},
      {"int32", 4},
      {"float32", 4},
      {"complex32", 4},
      {"uint64", 8},
      {"int64", 8},
      {"float64", 8},
      {"complex64", 8},
      {"complex128", 16},
  };
  const auto found = sizes.find(dtype);
  if (found == sizes.end()) {
    throw InvalidArgument("'" + dtype + "' is no element type that can be exchanged");
  }
  return found->second;
}

TensorSpec::TensorSpec(std::string dtype_, std::vector<std::int64_t> shape_,
                       std::vector<std::int64_t> strides_)
    : dtype(std::move(dtype_)), shape(std::move(shape_)), strides(std::move(strides_)) {
  std::size_t count = element_size(dtype);
  bool empty = false;
  for (std::int64_t size : shape) {
    if (size < 0) throw InvalidArgument("shape " + tuple_text(shape) + " has a negative size");
    empty = empty || size == 0;
  }
  for (std::int64_t size : shape) {
    if (empty) break;
    if (count > kMostBytes / static_cast<std::size_t>(size)) {
      throw InvalidArgument("shape " + tuple_text(shape) + " is too large to address");
    }
    count *= static_cast<std::size_t>(size);
  }
  nbytes = empty ? 0 : count;
  if (strides.empty()) strides = row_major(shape);
  if (strides.size() != shape.size()) {
    throw InvalidArgument("strides " + tuple_text(strides) + " and shape " + tuple_text(shape) +
                          " differ in length");
  }
  if (!dense(shape, strides)) {
    throw InvalidArgument("strides " + tuple_text(strides) + " of shape " + tuple_text(shape) +
                          " leave gaps or overlap: send a dense copy");
  }
}

bool TensorSpec::same_strides(const std::vector<std::int64_t>& other) const {
  if (other.size() != strides.size()) return false;
  if (nbytes == 0) return true;
  for (std::size_t i = 0; i < shape.size(); ++i) {
    if (shape[i] != 1 && strides[i] != other[i]) return false;
  }
  return true;
}

std::string TensorSpec::describe() const {
  return dtype + tuple_text(shape) + " with strides " + tuple_text(strides);
}

Layout::Layout(std::vector<TensorSpec> specs_) : specs(std::move(specs_)) {
  for (const TensorSpec& spec : specs) {
    offsets.push_back(nbytes);
    const std::size_t padded = (spec.nbytes + kAlignment - 1) / kAlignment * kAlignment;
    if (padded > kMostBytes - nbytes) {
      throw InvalidArgument("a bundle of " + std::to_string(specs.size()) +
                            " tensors is too large to address: see the shape of " +
                            spec.describe());
    }
    nbytes += padded;
  }
}

}  // namespace asyncdiff
