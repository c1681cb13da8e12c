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

}  // namespace flextron
