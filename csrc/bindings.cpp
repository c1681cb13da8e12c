// pybind11 module _C: what was built, the schemas, and the host-side schedulers for tests. Importing it
// registers the ops.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "core/build_info.h"
#include "core/executor.h"
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

std::string executor(bool on_gpu, int64_t tokens, int64_t element_size, bool extents_on_device,
                     bool fits_panels, const std::string& asked, bool weight_gradient) {
  const flextron::GemmCall call{.on_gpu = on_gpu,
                                .extents_on_device = extents_on_device,
                                .fits_panels = fits_panels,
                                .tokens = tokens,
                                .element_size = element_size,
                                .asked = asked};
  switch (weight_gradient ? flextron::executor_of_weight_gradient(call) : flextron::executor_of(call)) {
    case flextron::Executor::kViews:
      return "views";
    case flextron::Executor::kPanels:
      return "panels";
    case flextron::Executor::kTile:
      return "tile";
    case flextron::Executor::kStream:
      return "stream";
  }
  throw std::logic_error("executor: must be one of views, panels, tile, stream");
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Registers torch.ops.flextron.* on import.";
  m.def("build_info", &info, "Version, compiler, instruction sets and GPU architectures of this build.");
  m.def("schemas", &flextron::op_schemas, "The schemas of every op, without the namespace.");
  m.def("staircase", &staircase, py::arg("extents"), py::arg("maximum"),
        "Stable descending order of the extents, its steps (extent, begin, end) and its column blocks "
        "(begin, end, rows).");
  m.def("executor", &executor, py::arg("on_gpu"), py::arg("tokens"), py::arg("element_size"),
        py::arg("extents_on_device") = false, py::arg("fits_panels") = true, py::arg("asked") = "",
        py::arg("weight_gradient") = false,
        "What computes the GEMMs of elastic_linear and elastic_mlp: views, panels, tile or stream.");
}
