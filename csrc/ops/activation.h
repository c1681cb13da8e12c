// An activation's name in a schema.
#pragma once

#include <string>

#include "kernels/elastic_mlp.h"
#include "ops/checks.h"

namespace flextron {

inline Activation activation_of(const char* op, const std::string& name) {
  constexpr const char* kNames[] = {"relu", "relu2", "gelu", "gelu_tanh", "silu"};
  for (int64_t i = 0; i < 5; ++i)
    if (name == kNames[i]) return static_cast<Activation>(i);
  fail(op, ": activation must be one of relu, relu2, gelu, gelu_tanh, silu, got ", name);
}

}  // namespace flextron
