// Costs cross as the text that is kept on the disk.
#include "asyncdiff/put_costs.hpp"

#include <cstddef>
#include <string>

#include "bindings.hpp"
#include "gil.hpp"
#ifdef ASYNCDIFF_WITH_CUDA
#include "asyncdiff/cuda_fabric.hpp"
#endif

namespace py = pybind11;

namespace asyncdiff::bindings {

void register_put_costs(py::module_& m) {
#ifdef ASYNCDIFF_WITH_CUDA
  m.def(
      "put_costs",
      [](int from, int to, const std::string& transport) {
        return put_costs(from, to, transport_from(transport)).to_text();
      },
      py::arg("from_device"), py::arg("to_device"), py::arg("transport"),
      py::call_guard<WithoutGil>());
#endif
  m.def(
      "parse_put_costs",
      [](const std::string& text) {
        const PutCosts costs = PutCosts::from_text(text);
        py::list rows;
        for (const PutCosts::Row& row : costs.rows) {
          rows.append(py::make_tuple(row.nbytes, row.inline_us, row.kernel_us, row.copy_us));
        }
        return py::make_tuple(costs.copy_node_us, rows);
      },
      py::arg("text"));
  m.def(
      "fastest_put",
      [](const std::string& costs, std::size_t nbytes, std::size_t tensors, std::size_t targets) {
        return name_of(PutCosts::from_text(costs).fastest(nbytes, tensors, targets));
      },
      py::arg("costs"), py::arg("nbytes"), py::arg("tensors"), py::arg("targets"));
}

}  // namespace asyncdiff::bindings
