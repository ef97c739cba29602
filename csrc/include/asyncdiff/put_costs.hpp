// What a put costs by mode and size over one kind of link, and which mode that makes the fastest.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "asyncdiff/channel.hpp"
#include "asyncdiff/export.hpp"

namespace asyncdiff {

struct ASYNCDIFF_EXPORT PutCosts {
  // One way, of one tensor to one receiver, in microseconds. Sizes grow. An inline cost of zero
  // means not measured: too large to be worth it.
  struct Row {
    std::size_t nbytes;
    double inline_us;
    double kernel_us;
    double copy_us;
  };
  std::vector<Row> rows;
  double copy_node_us = 0;  // of each further copy in the same bundle

  // Between measured sizes by interpolation, beyond the last in proportion; infinite for kInline
  // beyond its last measured size. Throws InvalidArgument for kAuto and where there are no rows.
  double at(Mode mode, std::size_t nbytes) const;

  // For a bundle of `tensors` tensors to `targets` receivers. Copy is taken where it is at most a
  // tenth slower: it leaves the multiprocessors to whoever computes.
  Mode fastest(std::size_t nbytes, std::size_t tensors, std::size_t targets) const;

  // Lines of numbers; from_text throws InvalidArgument for anything else.
  std::string to_text() const;
  static PutCosts from_text(const std::string& text);
};

}  // namespace asyncdiff
