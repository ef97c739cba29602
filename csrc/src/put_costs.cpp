#include "asyncdiff/put_costs.hpp"

#include <cmath>
#include <cstddef>
#include <istream>
#include <limits>
#include <locale>
#include <sstream>
#include <string>

#include "asyncdiff/errors.hpp"

namespace asyncdiff {

namespace {

constexpr const char* kTitle = "asyncdiff put costs 3";

double cost_of(const PutCosts::Row& row, Mode mode) {
  if (mode == Mode::kInline) return row.inline_us;
  return mode == Mode::kKernel ? row.kernel_us : row.copy_us;
}

// A stream reads a negative number as a large one.
bool read_size(std::istream& in, std::size_t& size) {
  return (in >> std::ws).peek() != '-' && in >> size;
}

bool read_cost(std::istream& in, double& cost) {
  return in >> cost && std::isfinite(cost) && cost >= 0;
}

}  // namespace

double PutCosts::at(Mode mode, std::size_t nbytes) const {
  if (mode == Mode::kAuto || rows.empty()) throw InvalidArgument("no costs of this mode");
  const auto size = static_cast<double>(nbytes);
  const Row* before = nullptr;
  for (const Row& row : rows) {
    const double cost = cost_of(row, mode);
    if (cost <= 0) break;
    if (nbytes <= row.nbytes) {
      if (before == nullptr) return cost;
      const auto low = static_cast<double>(before->nbytes);
      const double part = (size - low) / (static_cast<double>(row.nbytes) - low);
      return cost_of(*before, mode) + part * (cost - cost_of(*before, mode));
    }
    before = &row;
  }
  if (before == nullptr || mode == Mode::kInline) return std::numeric_limits<double>::infinity();
  return cost_of(*before, mode) * size / static_cast<double>(before->nbytes);
}

Mode PutCosts::fastest(std::size_t nbytes, std::size_t tensors, std::size_t targets) const {
  // What a kernel stores leaves the sender once for each target, as do copies.
  const std::size_t all = nbytes * targets;
  const double inlined = at(Mode::kInline, all);
  const double kernel = at(Mode::kKernel, all);
  const auto further = static_cast<double>(tensors * targets) - 1;
  const double copy = at(Mode::kCopy, all) + (further > 0 ? further * copy_node_us : 0);
  if (copy <= 1.1 * kernel && copy <= 1.1 * inlined) return Mode::kCopy;
  return inlined < kernel ? Mode::kInline : Mode::kKernel;
}

std::string PutCosts::to_text() const {
  std::ostringstream out;
  out.imbue(std::locale::classic());  // whatever the program's locale: others read it
  out << kTitle << "\n" << copy_node_us << " " << rows.size() << "\n";
  for (const Row& row : rows) {
    out << row.nbytes << " " << row.inline_us << " " << row.kernel_us << " " << row.copy_us << "\n";
  }
  return out.str();
}

PutCosts PutCosts::from_text(const std::string& text) {
  std::istringstream in(text);
  in.imbue(std::locale::classic());
  std::string title;
  std::getline(in, title);
  PutCosts out;
  std::size_t count = 0;
  bool good = title == kTitle && read_cost(in, out.copy_node_us) && read_size(in, count) &&
              count >= 1 && count <= 1000;
  for (std::size_t i = 0; good && i < count; ++i) {
    Row row{};
    good = read_size(in, row.nbytes) && read_cost(in, row.inline_us) &&
           read_cost(in, row.kernel_us) && read_cost(in, row.copy_us) && row.kernel_us > 0 &&
           row.copy_us > 0 && row.nbytes > (out.rows.empty() ? 0 : out.rows.back().nbytes);
    out.rows.push_back(row);
  }
  if (!good) throw InvalidArgument("this is no table of put costs");
  return out;
}

}  // namespace asyncdiff
