// pybind11 module _C: what was built, the schemas, and the host-side schedulers for tests. Importing it
// registers the ops.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "core/build_info.h"
#include "core/staircase.h"

namespace py = pybind11;

namespace {

py::dict info() {
  const flextron::BuildInfo build = flextron::build_info();
  py::dict result;
  result["version"] = build.version;
  result["compiler"] = build.compiler;
  result["isas"] = build.isas;
  result["cuda"] = !build.cuda_archs.empty();
  result["cuda_archs"] = build.cuda_archs;
  return result;
}

py::dict staircase(const std::vector<int64_t>& extents, int64_t maximum) {
  for (const int64_t extent : extents)
    if (extent < 0 || extent > maximum)
      throw py::value_error("staircase: extents must lie in [0, " + std::to_string(maximum) + "], got " +
                            std::to_string(extent));
  const auto stairs = flextron::make_staircase(extents.data(), static_cast<int64_t>(extents.size()), maximum);
  py::list steps, blocks;
  for (const auto& s : stairs.steps) steps.append(py::make_tuple(s.extent, s.begin, s.end));
  for (const auto& b : flextron::column_blocks(stairs)) blocks.append(py::make_tuple(b.begin, b.end, b.rows));
  py::dict result;
  result["order"] = stairs.order;
  result["steps"] = steps;
  result["column_blocks"] = blocks;
  return result;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Registers torch.ops.flextron.* on import.";
  m.def("build_info", &info, "Version, compiler, instruction sets and GPU architectures of this build.");
  m.def("schemas", &flextron::op_schemas, "The schemas of every op, without the namespace.");
  m.def("staircase", &staircase, py::arg("extents"), py::arg("maximum"),
        "Stable descending order of the extents, its steps (extent, begin, end) and its column blocks "
        "(begin, end, rows).");
}
