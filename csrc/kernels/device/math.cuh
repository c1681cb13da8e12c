// What a thread computes by the special function unit.
#pragma once

#include <cmath>

#include "kernels/device/instruction.cuh"

namespace flextron {

// 2^x to 2 units in the last place; 0 at -inf, subnormal results are zeros. PTX ISA, "ex2".
__device__ __forceinline__ float exp2_approx(float x) {
  float result;
  FLEXTRON_INSTRUCTION(asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x)), result = std::exp2(x));
  return result;
}

// tanh to 2^-22 by the same unit.
__device__ __forceinline__ float tanh_approx(float x) {
  return 1 - __fdividef(2, exp2_approx(x * 2.8853900817779268f) + 1);  // 2 log2(e)
}

// Adds a sink, one more logit, to a row's largest one and to the sum of f(logit - largest); returns what the
// row's other sums are to be multiplied with.
template <class real, class F>
__device__ __forceinline__ real add_sink(real sink, real& largest, real& sum, const F& f) {
  const real now = fmax(largest, sink), base = now == -static_cast<real>(INFINITY) ? real(0) : now;
  const real share = f(largest - base);
  sum = sum * share + f(sink - base);
  largest = now;
  return share;
}

}  // namespace flextron
