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

// act(x) and act'(x) for results of 16 bits: exp and division to a few units in the last place of a float32
// (CUDA C++ Programming Guide, "Intrinsic Functions"), which leaves nothing to see in theirs. Elsewhere
// exact.
template <class scalar_t, Activation activation>
__device__ __forceinline__ accumulate_t<scalar_t> activate_as(accumulate_t<scalar_t> x) {
  if constexpr (sizeof(scalar_t) == 2 && activation == Activation::kSilu)
    return __fdividef(low_enough(x), 1 + __expf(-x));
  else if constexpr (sizeof(scalar_t) == 2 && activation == Activation::kGeluTanh)  // (1 + tanh z) / 2
    return __fdividef(low_enough(x), 1 + __expf(-1.5957691216057308f * (x + 0.044715f * x * x * x)));
  else
    return activate<activation>(x);
}
template <class scalar_t, Activation activation>
__device__ __forceinline__ accumulate_t<scalar_t> activate_derivative_as(accumulate_t<scalar_t> x) {
  if constexpr (sizeof(scalar_t) == 2 && activation == Activation::kSilu) {
    x = near_enough(x);
    const float s = __fdividef(1, 1 + __expf(-x));
    return s * (1 + x * (1 - s));
  } else if constexpr (sizeof(scalar_t) == 2 && activation == Activation::kGeluTanh) {
    x = near_enough(x);
    const float s = __fdividef(1, 1 + __expf(-1.5957691216057308f * (x + 0.044715f * x * x * x)));
    return s + x * s * (1 - s) * 1.5957691216057308f * (1 + 3 * 0.044715f * x * x);
  } else {
    return activate_derivative<activation>(x);
  }
}

// f.operator()<activation>(): one branch for all that it does.
template <class F>
__device__ __forceinline__ void with_activation(Activation activation, const F& f) {
  switch (activation) {
    case Activation::kRelu:
      return f.template operator()<Activation::kRelu>();
    case Activation::kRelu2:
      return f.template operator()<Activation::kRelu2>();
    case Activation::kGelu:
      return f.template operator()<Activation::kGelu>();
    case Activation::kGeluTanh:
      return f.template operator()<Activation::kGeluTanh>();
    default:
      return f.template operator()<Activation::kSilu>();
  }
}

// values = act(values), of which 16 bits will be kept.
template <class scalar_t, class Values>
__device__ __forceinline__ void activate_all(Activation activation, Values& values) {
  with_activation(activation, [&]<Activation one>() {
#pragma unroll
    for (int v = 0; v < Values::kCount; ++v) values[v] = activate_as<scalar_t, one>(values[v]);
  });
}

}  // namespace flextron
