// Elementary functions of the CUDA kernels; those of the CPU's loops are in csrc/kernels/vector.h.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/types.h"

namespace flextron {

// e^x to about 1 unit in the last place: x = n ln 2 + r, e^r by a polynomial on |r| <= ln 2 / 2, 2^n by its
// bits.
FLEXTRON_HD float exp_of(float x) {
  const float clamped = x > -87.33654f ? (x < 88.72283f ? x : 88.72283f) : -87.33654f;  // NaN: the low end
  const float shifted = clamped * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const float n = shifted - 12582912.0f;
  const float r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  // 2^n in two factors: n reaches 128, one more than a float's exponent holds.
  const int32_t whole = static_cast<int32_t>(n);
  const int32_t half = whole >> 1;
  const float low = bits_as<float>((half + 127) << 23), high = bits_as<float>((whole - half + 127) << 23);
  const float finite = p * low * high;
  return x < -87.33654f ? 0.0f : (x > 88.72283f ? INFINITY : (x != x ? x : finite));
}
FLEXTRON_HD double exp_of(double x) { return exp(x); }

FLEXTRON_HD float tanh_of(float x) { return tanhf(x); }
FLEXTRON_HD double tanh_of(double x) { return tanh(x); }

FLEXTRON_HD float erf_of(float x) { return erff(x); }
FLEXTRON_HD double erf_of(double x) { return erf(x); }

template <class real>
FLEXTRON_HD real sigmoid_of(real x) {
  return real(1) / (real(1) + exp_of(-x));
}

}  // namespace flextron
