// What the kernels of elastic_mlp share: their operands' alignment, and the activation of a thread's neurons.
#pragma once

#include "kernels/device/instruction.cuh"
#include "kernels/elastic_linear_views.cuh"
#include "kernels/elastic_mlp.h"

namespace flextron {

// Whether every row of x and of the weights starts at a multiple of 16 bytes.
template <class scalar_t>
bool rows_aligned(const ElasticMlpHiddenParams<scalar_t>& p) {
  return whole_pieces(p.x, p.x_stride) && whole_pieces(p.w_up, p.w_up_stride) &&
         (!p.w_gate || whole_pieces(p.w_gate, p.w_gate_stride));
}

// values = act(values): one branch for all of them, not one for each.
template <class Values>
__device__ __forceinline__ void activate_all(Activation activation, Values& values) {
  const auto all = [&](auto one) {
#pragma unroll
    for (int v = 0; v < Values::kCount; ++v) values[v] = one(values[v]);
  };
  switch (activation) {
    case Activation::kRelu:
      return all([](float x) { return activate<Activation::kRelu>(x); });
    case Activation::kRelu2:
      return all([](float x) { return activate<Activation::kRelu2>(x); });
    case Activation::kGelu:
      return all([](float x) { return activate<Activation::kGelu>(x); });
    case Activation::kGeluTanh:
      return all([](float x) { return activate<Activation::kGeluTanh>(x); });
    default:
      return all([](float x) { return activate<Activation::kSilu>(x); });
  }
}

}  // namespace flextron
