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

// x, at least `low`; and within +-limit. NaN stays NaN.
template <class real>
inline Vec<real> at_least(Vec<real> x, real low) {
  const Vec<real> least = Vec<real>{} + low;
  return x < least ? least : x;
}
template <class real>
inline Vec<real> within(Vec<real> x, real limit) {
  const Vec<real> most = Vec<real>{} + limit;
  x = at_least(x, -limit);
  return x > most ? most : x;
}

// 1 + e^-x. vec_exp ends at a finite number: what it stands for is infinite.
template <class real>
inline Vec<real> one_and_exp_of_minus(Vec<real> x) {
  const Vec<real> sum = real(1) + vec_exp(-x);
  if constexpr (sizeof(real) == sizeof(double)) return sum;
  return x < Vec<real>{} - real(88.3) ? Vec<real>{} + real(__builtin_inf()) : sum;
}

// An activation and its derivative where it is x; those of what lies beyond kFlatActivation as elastic_mlp.h
// says.
template <class real>
struct Curve {
  Vec<real> value, slope;
};
template <Activation activation, class real>
inline Curve<real> curve(Vec<real> x) {
  const Vec<real> zero = {}, positive = at_least(x, real(0));
  if constexpr (activation == Activation::kRelu) return {positive, x <= zero ? zero : zero + real(1)};
  if constexpr (activation == Activation::kRelu2) return {positive * positive, real(2) * positive};
  const Vec<real> low = at_least(x, real(-kFlatActivation)), near = within(x, real(kFlatActivation));
  if constexpr (activation == Activation::kGelu) {
    const Vec<real> below = real(0.5) * (real(1) + lane_by_lane<real>(x * real(0.70710678118654752),
                                                                      [](real z) { return erf_lane(z); }));
    const Vec<real> density = real(0.39894228040143268) * vec_exp(real(-0.5) * near * near);
    return {low * below, below + near * density};
  }
  if constexpr (activation == Activation::kGeluTanh) {  // (1 + tanh z) / 2 = 1 / (1 + e^-2z)
    const Vec<real> twice = real(1.5957691216057308) * (near + real(0.044715) * near * near * near);
    const Vec<real> over = one_and_exp_of_minus<real>(twice), s = real(1) / over;
    const Vec<real> steep = real(1.5957691216057308) * (real(1) + real(3 * 0.044715) * near * near);
    return {low / over, s + near * s * (real(1) - s) * steep};
  }
  if constexpr (activation == Activation::kSilu) {
    const Vec<real> over = one_and_exp_of_minus<real>(x), s = real(1) / over;
    return {low / over, s * (real(1) + near * (real(1) - s))};
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
