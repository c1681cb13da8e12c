// The activations of elastic_mlp on vectors, included by each file that is compiled for one instruction set;
// vector.h says why all is anonymous. The formulas are those of elastic_mlp.h.
#pragma once

#include "kernels/elastic_mlp.h"
#include "kernels/vector.h"

namespace flextron {
namespace {

// f(x) of every lane, for what has no vector form.
template <class real, class F>
inline Vec<real> lane_by_lane(Vec<real> x, const F& f) {
  for (i64 i = 0; i < kLanes<real>; ++i) x[i] = f(x[i]);
  return x;
}
inline float erf_lane(float x) { return __builtin_erff(x); }
inline double erf_lane(double x) { return __builtin_erf(x); }

// An activation and its derivative where it is x.
template <class real>
struct Curve {
  Vec<real> value, slope;
};
template <Activation activation, class real>
inline Curve<real> curve(Vec<real> x) {
  const Vec<real> zero = {}, positive = x < zero ? zero : x;  // keeps NaN
  if constexpr (activation == Activation::kRelu) return {positive, x > zero ? zero + real(1) : zero};
  if constexpr (activation == Activation::kRelu2) return {positive * positive, x > zero ? real(2) * x : zero};
  if constexpr (activation == Activation::kGelu) {
    const Vec<real> below = real(0.5) * (real(1) + lane_by_lane<real>(x * real(0.70710678118654752),
                                                                      [](real z) { return erf_lane(z); }));
    const Vec<real> density = real(0.39894228040143268) * vec_exp(real(-0.5) * x * x);
    return {x * below, below + x * density};
  }
  if constexpr (activation == Activation::kGeluTanh) {  // (1 + tanh z) / 2 = 1 / (1 + e^-2z)
    const Vec<real> twice = real(1.5957691216057308) * (x + real(0.044715) * x * x * x);
    const Vec<real> over = real(1) + vec_exp(-twice), s = real(1) / over;
    const Vec<real> steep = real(1.5957691216057308) * (real(1) + real(3 * 0.044715) * x * x);
    return {x / over, s + x * s * (real(1) - s) * steep};
  }
  if constexpr (activation == Activation::kSilu) {
    const Vec<real> over = real(1) + vec_exp(-x), s = real(1) / over;
    return {x / over, s * (real(1) + x * (real(1) - s))};
  }
}

// f(activation) for the one that is asked for, as a constant.
template <Activation activation>
struct Constant {
  static constexpr Activation value = activation;
};
template <class F>
inline auto with_activation(Activation activation, const F& f) {
  switch (activation) {
    case Activation::kRelu:
      return f(Constant<Activation::kRelu>{});
    case Activation::kRelu2:
      return f(Constant<Activation::kRelu2>{});
    case Activation::kGelu:
      return f(Constant<Activation::kGelu>{});
    case Activation::kGeluTanh:
      return f(Constant<Activation::kGeluTanh>{});
    default:
      return f(Constant<Activation::kSilu>{});
  }
}

}  // namespace
}  // namespace flextron
