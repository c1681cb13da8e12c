// The part of elastic_mlp between its GEMMs: activation, product, soft gate, and their gradients.
//
//   h[r, b] = act(g[r, b]) * u[r, b]        s_b = sum_{c: d_c > b} gate[r, c]        y = (s * h) w_down^T
//   h[r, b] = act(u[r, b])                  where there is no g (plain MLP); s = 1 where there is no gate
//
//   R rows, d neurons of the ld stored in a row, C choices d_1 < ... < d_C <= d
#pragma once

#include <cstdint>

#include "core/dispatch.h"
#include "core/math.h"
#include "core/types.h"

namespace flextron {

enum class Activation : int64_t { kRelu, kRelu2, kGelu, kGeluTanh, kSilu };
using Activations = IntList<0, 1, 2, 3, 4>;

template <class scalar_t>
struct ElasticMlpParams {
  scalar_t* g;   // [R, ld] before the activation; null in a plain MLP. Backward leaves dg here
  scalar_t* u;   // [R, ld]. Forward leaves s * h here, backward du
  scalar_t* dh;  // [R, ld] gradient of s * h, backward only. Leaves s * h here
  const accumulate_t<scalar_t>* gate;  // [R, C], or one row where gate_stride is 0; null: s = 1
  accumulate_t<scalar_t>* dgate;       // [R, C], backward only; null when not wanted
  const int64_t* choices;              // [C]; one, d, where there is no gate
  int64_t R, d, ld, C, gate_stride;
  Activation activation;
};

// act(x) and act'(x), on both devices.
template <Activation activation, class real>
FLEXTRON_HD real activate(real x) {
  const real positive = x < real(0) ? real(0) : x;  // keeps NaN
  if constexpr (activation == Activation::kRelu) return positive;
  if constexpr (activation == Activation::kRelu2) return positive * positive;
  if constexpr (activation == Activation::kGelu)
    return real(0.5) * x * (real(1) + erf_of(x * real(0.70710678118654752)));
  if constexpr (activation == Activation::kGeluTanh) {
    const real inner = real(0.79788456080286536) * (x + real(0.044715) * x * x * x);
    return real(0.5) * x * (real(1) + tanh_of(inner));
  }
  if constexpr (activation == Activation::kSilu) return x * sigmoid_of(x);
}

template <Activation activation, class real>
FLEXTRON_HD real activate_derivative(real x) {
  if constexpr (activation == Activation::kRelu) return x > real(0) ? real(1) : real(0);
  if constexpr (activation == Activation::kRelu2) return x > real(0) ? real(2) * x : real(0);
  if constexpr (activation == Activation::kGelu) {
    const real density = real(0.39894228040143268) * exp_of(real(-0.5) * x * x);
    return real(0.5) * (real(1) + erf_of(x * real(0.70710678118654752))) + x * density;
  }
  if constexpr (activation == Activation::kGeluTanh) {
    const real inner = real(0.79788456080286536) * (x + real(0.044715) * x * x * x);
    const real slope = real(0.79788456080286536) * (real(1) + real(3 * 0.044715) * x * x);
    const real t = tanh_of(inner);
    return real(0.5) * (real(1) + t) + real(0.5) * x * (real(1) - t * t) * slope;
  }
  if constexpr (activation == Activation::kSilu) {
    const real s = sigmoid_of(x);
    return s * (real(1) + x * (real(1) - s));
  }
}

// Rows [begin, end); the caller cuts R into ranges, one per thread.
template <class scalar_t>
void elastic_mlp_cpu(const ElasticMlpParams<scalar_t>& p, int64_t begin, int64_t end);
template <class scalar_t>
void elastic_mlp_backward_cpu(const ElasticMlpParams<scalar_t>& p, int64_t begin, int64_t end);

}  // namespace flextron
