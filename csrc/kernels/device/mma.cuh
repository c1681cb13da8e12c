// A warp's tensor cores: 8x8 blocks of 16-bit elements between shared memory and registers, and D += A B.
// PTX ISA, "Warp Level Matrix Multiply-Accumulate Instructions".
#pragma once

#include <type_traits>

#include "core/types.h"
#include "kernels/device/instruction.cuh"

namespace flextron {

// Four 8x8 blocks. Lane l gives the address of row l % 8 of block l / 8 (16 bytes, a multiple of 16) and gets
// elements (l / 4, 2 (l % 4)) and the next of each block in r[block]; of its transpose with
// ldmatrix_x4_trans.
__device__ __forceinline__ void ldmatrix_x4(Registers<uint32_t, 4>& r, const void* row FLEXTRON_AND_SITE) {
  FLEXTRON_INSTRUCTION(
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(r.data[0]),
                   "=r"(r.data[1]), "=r"(r.data[2]), "=r"(r.data[3]) : "r"(shared_address(row)) : "memory"),
      emulator::ldmatrix_x4(r.data, row, false, site));
}
__device__ __forceinline__ void ldmatrix_x4_trans(Registers<uint32_t, 4>& r,
                                                  const void* row FLEXTRON_AND_SITE) {
  FLEXTRON_INSTRUCTION(
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(r.data[0]),
                   "=r"(r.data[1]), "=r"(r.data[2]), "=r"(r.data[3]) : "r"(shared_address(row)) : "memory"),
      emulator::ldmatrix_x4(r.data, row, true, site));
}

// ldmatrix_x4 the other way. sm_90.
__device__ __forceinline__ void stmatrix_x4(void* row, const Registers<uint32_t, 4>& r FLEXTRON_AND_SITE) {
  FLEXTRON_INSTRUCTION(
      asm volatile(
          "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
          "r"(r.data[0]), "r"(r.data[1]), "r"(r.data[2]), "r"(r.data[3]) : "memory"),
      emulator::stmatrix_x4(row, r.data, site));
}

// d[16, 8] += a[16, 16] b[16, 8] in float32; scalar_t is bf16 or fp16, two to a register, low half first.
//   a: rows l/4 and l/4 + 8 in turn, columns 2(l%4) of the first 8, then of the last 8
//   b: rows 2(l%4) of the first 8, then of the last 8; column l/4      d: rows l/4, l/4 + 8; columns 2(l%4),
//   + 1
template <class scalar_t>
__device__ __forceinline__ void mma_m16n8k16(Registers<float, 4>& d, const Registers<uint32_t, 4>& a,
                                             uint32_t b0, uint32_t b1 FLEXTRON_AND_SITE) {
  constexpr bool is_bf16 = std::is_same_v<scalar_t, bf16>;
  static_assert(is_bf16 || std::is_same_v<scalar_t, fp16>);
#define FLEXTRON_MMA(type)                                                            \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                 \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : "+f"(d.data[0]), "+f"(d.data[1]), "+f"(d.data[2]), "+f"(d.data[3])   \
               : "r"(a.data[0]), "r"(a.data[1]), "r"(a.data[2]), "r"(a.data[3]), "r"(b0), "r"(b1))
  FLEXTRON_INSTRUCTION(if constexpr (is_bf16) FLEXTRON_MMA("bf16");
                       else FLEXTRON_MMA("f16"),
                       emulator::mma_m16n8k16(is_bf16, d.data, a.data, b0, b1, site));
#undef FLEXTRON_MMA
}

// Two floats rounded to nearest even into one register, `low` in its low half. NaN becomes 0x7fff.
template <class scalar_t>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  constexpr bool is_bf16 = std::is_same_v<scalar_t, bf16>;
  uint32_t both;
  FLEXTRON_INSTRUCTION(
      if constexpr (is_bf16) asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
      else asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low)),
      both = emulator::pack(is_bf16, low, high));
  return both;
}

}  // namespace flextron
