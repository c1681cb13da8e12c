// How panels store a weight: the one list of formats. An op takes a format by its name; Python's list of the
// same names is flextron_ext/panels.py. The layout of panels is in elastic_gemm.h.
#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include "kernels/elastic_gemm.h"

namespace flextron {

enum class PanelFormat : int64_t { kFloat32, kBFloat16, kFloat16, kInt8 };

struct PanelFacts {
  const char* name;
  torch::headeronly::ScalarType storage;  // dtype of the panels
  GemmDtype element;                      // that dtype as the GEMM reads it
  int64_t together;                       // inputs of a feature side by side: a word of four bytes
  bool scaled;  // each feature has a float32 scale; a format without scales stores weights in the dtype of x
};

// In the order of the enum.
constexpr PanelFacts kPanelFormats[] = {
    {"float32", torch::headeronly::ScalarType::Float, GemmDtype::kFloat, 1, false},
    {"bfloat16", torch::headeronly::ScalarType::BFloat16, GemmDtype::kBf16, 2, false},
    {"float16", torch::headeronly::ScalarType::Half, GemmDtype::kFp16, 2, false},
    {"int8", torch::headeronly::ScalarType::Char, GemmDtype::kInt8, 4, true},
};

// The words that hold so many inputs of a feature.
constexpr int64_t words_of(PanelFormat format, int64_t inputs) {
  const int64_t together = kPanelFormats[static_cast<int64_t>(format)].together;
  return (inputs + together - 1) / together;
}

constexpr const PanelFacts& facts_of(PanelFormat format) {
  return kPanelFormats[static_cast<int64_t>(format)];
}

}  // namespace flextron
