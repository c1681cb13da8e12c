// pybind11 module _C: what was built, the schemas, and the host-side schedulers for tests. Importing it
// registers the ops.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "core/build_info.h"
#include "core/executor.h"
#include "core/gemm_times.h"
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

py::dict machine() {
  const flextron::MachineReport report = flextron::machine_report();
  py::list gemms;
  for (const auto& row : report.rows) {
    py::dict gemm;
    gemm["dtype"] = row.dtype;
    gemm["most"] = row.most > 0 ? py::object(py::int_(row.most)) : py::none();
    gemm["own"] = row.time ? py::object(py::float_(row.time->own)) : py::none();
    gemm["vendor"] = row.time ? py::object(py::float_(row.time->vendor)) : py::none();
    gemm["chosen"] = row.own ? "own" : "vendor";
    gemms.append(gemm);
  }
  py::dict result;
  result["processor"] = report.processor;
  result["isa"] = report.isa;
  result["why"] = report.why;
  result["threads"] = report.threads;
  result["files"] = report.files;
  result["gemms"] = gemms;
  return result;
}

py::object gemm_times(const std::string& machine, const std::string& text) {
  const auto times = flextron::times_of(machine, text);
  if (!times) return py::none();
  py::list result;
  for (const auto& time : *times)
    result.append(time ? py::object(py::make_tuple(time->own, time->vendor)) : py::none());
  return result;
}

bool prefers_own(bool assumed, double own, double vendor, bool trains) {
  return flextron::prefers_own(assumed, flextron::GemmTime{own, vendor}, trains);
}

std::string executor(bool on_gpu, int64_t tokens, int64_t element_size, bool extents_on_device,
                     bool fits_panels, const std::string& asked, bool weight_gradient, bool own_preferred) {
  const flextron::GemmCall call{.on_gpu = on_gpu,
                                .extents_on_device = extents_on_device,
                                .fits_panels = fits_panels,
                                .own_preferred = own_preferred,
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
  m.def("machine", &machine,
        "This machine's processor, instruction set, threads, and GEMMs of plain weights: seconds of ours and "
        "of the "
        "vendor's, and which is chosen. Measures what is not known yet, in less than a second.");
  m.def("prefers_own", &prefers_own, py::arg("assumed"), py::arg("own"), py::arg("vendor"),
        py::arg("trains") = false,
        "Whether our GEMM is chosen, by what would be assumed and what was measured, in a forward or in what "
        "trains.");
  m.def(
      "gemm_times", &gemm_times, py::arg("machine"), py::arg("text"),
      "The times in a file's text, of each class of rows, or None where it is another machine's or damaged.");
  m.def("executor", &executor, py::arg("on_gpu"), py::arg("tokens"), py::arg("element_size"),
        py::arg("extents_on_device") = false, py::arg("fits_panels") = true, py::arg("asked") = "",
        py::arg("weight_gradient") = false, py::arg("own_preferred") = false,
        "What computes the GEMMs of elastic_linear and elastic_mlp: views, panels, tile or stream.");
}
