// The op table: one row per op for its schema, one for its function. torch compares the two when the library loads.
#include "core/build_info.h"
#include "ops/ops.h"

namespace flextron {
namespace {

constexpr const char* kSchemas[] = {
    "elastic_linear(Tensor x, Tensor weight, Tensor? bias, SymInt in_features, SymInt out_features, "
    "Tensor? in_extent=None, Tensor? out_extent=None, SymInt in_blocks=1, SymInt out_blocks=1) -> Tensor",
    "elastic_linear_backward(Tensor dy, Tensor x, Tensor weight, Tensor? bias, SymInt in_features, "
    "SymInt out_features, Tensor? in_extent, Tensor? out_extent, SymInt in_blocks, SymInt out_blocks, "
    "int output_mask) -> (Tensor, Tensor, Tensor)",
};

std::vector<std::string> words(const std::string& text) {
  std::vector<std::string> result;
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = std::min(text.find(' ', begin), text.size());
    if (end > begin) result.push_back(text.substr(begin, end - begin));
    begin = end + 1;
  }
  return result;
}

}  // namespace

BuildInfo build_info() { return {FLEXTRON_VERSION, __VERSION__, words(FLEXTRON_ISAS), words(FLEXTRON_CUDA_ARCHS)}; }

std::vector<std::string> op_schemas() { return {std::begin(kSchemas), std::end(kSchemas)}; }

}  // namespace flextron

STABLE_TORCH_LIBRARY(flextron, m) {
  for (const char* schema : flextron::kSchemas) m.def(schema);
}

STABLE_TORCH_LIBRARY_IMPL(flextron, CPU, m) {
  m.impl("elastic_linear", TORCH_BOX(&flextron::elastic_linear));
  m.impl("elastic_linear_backward", TORCH_BOX(&flextron::elastic_linear_backward));
}
