// How panels store a weight: the one list of formats. An op takes a format by its name; Python's list of the
// same names is flextron_ext/panels.py. The layout of panels is in elastic_gemm.h.
#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include <utility>

#include "kernels/elastic_gemm.h"

namespace flextron {

enum class PanelFormat : int64_t { kFloat32, kBFloat16, kFloat16, kInt8, kW8A8, kInt4 };

enum class PanelScales : int64_t { kNone, kOfFeature, kOfGroup };

struct PanelFacts {
  const char* name;
  torch::headeronly::ScalarType storage;  // dtype of the panels
  GemmDtype element;                      // that dtype as the GEMM reads it
  int64_t together;                       // inputs of a feature side by side: a word of four bytes
  int64_t multiple;                       // inputs of a block are filled up to a multiple of it
  bool quantised;                         // activations are integers too, as elastic_gemm.h says
  // A float32 for each feature; or for each kGroupInputs of its inputs a scale and a least value, float16. A
  // format without scales stores weights in the dtype of x.
  PanelScales scales;

  bool scaled() const { return scales != PanelScales::kNone; }
};

// In the order of the enum.
constexpr PanelFacts kPanelFormats[] = {
    {"float32", torch::headeronly::ScalarType::Float, GemmDtype::kFloat, 1, 1, false, PanelScales::kNone},
    {"bfloat16", torch::headeronly::ScalarType::BFloat16, GemmDtype::kBf16, 2, 2, false, PanelScales::kNone},
    {"float16", torch::headeronly::ScalarType::Half, GemmDtype::kFp16, 2, 2, false, PanelScales::kNone},
    {"int8", torch::headeronly::ScalarType::Char, GemmDtype::kInt8, 4, 4, false, PanelScales::kOfFeature},
    {"w8a8", torch::headeronly::ScalarType::Char, GemmDtype::kInt8, 4, kGroupInputs, true,
     PanelScales::kOfFeature},
    {"int4", torch::headeronly::ScalarType::Byte, GemmDtype::kInt4, 8, kGroupInputs, true,
     PanelScales::kOfGroup},
};

constexpr const PanelFacts& facts_of(PanelFormat format) {
  return kPanelFormats[static_cast<int64_t>(format)];
}

// The words that hold so many inputs of a feature.
constexpr int64_t words_of(PanelFormat format, int64_t inputs) {
  const auto [together, multiple] = std::pair(facts_of(format).together, facts_of(format).multiple);
  return (inputs + multiple - 1) / multiple * (multiple / together);
}

// Elements of the storage in a word.
constexpr int64_t elements_of_word(PanelFormat format) {
  return format == PanelFormat::kInt4 ? 4 : facts_of(format).together;
}

}  // namespace flextron
