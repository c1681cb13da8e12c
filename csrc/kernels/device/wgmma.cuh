// A warpgroup's tensor cores: D[64, N] += A[64, 16] B[16, N], asynchronously, operands in shared memory (A
// also in registers). PTX ISA, "Asynchronous Warpgroup Level Matrix Multiply-Accumulate Instructions".
// sm_90a.
#pragma once

#include <type_traits>

#include "core/types.h"
#include "kernels/device/instruction.cuh"
#include "kernels/device/tensor_map.h"

namespace flextron {

// No instruction: uses of the accumulators stay on their side of it. The compiler takes wgmma's registers for
// written when it is issued, and may move their zeroing behind the fence, or their uses before the last wait.
template <int N>
__device__ __forceinline__ void hold(Registers<float, N>& d FLEXTRON_AND_SITE) {
#pragma unroll
  for (int i = 0; i < N; ++i)
    FLEXTRON_INSTRUCTION(asm volatile("" : "+f"(d.data[i])::"memory"), emulator::hold(d.data, site));
}

// Before the first wgmma, and again after this thread has touched accumulators or A's registers.
__device__ __forceinline__ void wgmma_fence(FLEXTRON_SITE) {
  FLEXTRON_INSTRUCTION(asm volatile("wgmma.fence.sync.aligned;" :: : "memory"), emulator::wgmma_fence(site));
}
// The wgmmas since the last commit make a group.
__device__ __forceinline__ void wgmma_commit(FLEXTRON_SITE) {
  FLEXTRON_INSTRUCTION(asm volatile("wgmma.commit_group.sync.aligned;" :: : "memory"),
                       emulator::wgmma_commit(site));
}
// Until at most `pending` of the newest groups are under way: only then may accumulators and A's registers be
// touched, and shared operands overwritten.
template <int pending>
__device__ __forceinline__ void wgmma_wait(FLEXTRON_SITE) {
  FLEXTRON_INSTRUCTION(asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory"),
                       emulator::wgmma_wait(pending, site));
}

// Where a tile lies in shared memory and how. K-major (rows of K elements): `stride` bytes from 8 rows to the
// next 8, `leading` only without swizzle, from 8 elements of K to the next. MN-major (rows of M or N
// elements): `leading` bytes from one swizzle width of M or N to the next, `stride` from 8 rows of K to the
// next 8; the two change places without swizzle. Multiples of 16.
__device__ __forceinline__ uint64_t wgmma_descriptor(const void* tile, Swizzle swizzle, uint32_t leading,
                                                     uint32_t stride FLEXTRON_AND_SITE) {
  const uint32_t address = FLEXTRON_INSTRUCTION(shared_address(tile), emulator::shared_address(tile, site));
  return uint64_t{(address & 0x3ffff) >> 4} | uint64_t{(leading & 0x3ffff) >> 4} << 16 |
         uint64_t{(stride & 0x3ffff) >> 4} << 32 | uint64_t{static_cast<uint32_t>(swizzle)} << 62;
}

// A descriptor of what begins `bytes` further: the next 16 of K within a swizzled tile's rows.
__device__ __forceinline__ uint64_t wgmma_advance(uint64_t descriptor, uint32_t bytes) {
  return descriptor + (bytes >> 4);
}

enum class Major : int { kK = 0, kMN = 1 };

// The operands' text: registers are numbered from the first of D, so the inputs begin at N / 2.
#define FLEXTRON_D_TEXT_8 "%0, %1, %2, %3"
#define FLEXTRON_D_8 "+f"(d.data[0]), "+f"(d.data[1]), "+f"(d.data[2]), "+f"(d.data[3])
#define FLEXTRON_TEXT_0 "%0, %1, %2, %3, %4, %5, %6, %7"
#define FLEXTRON_TEXT_8 "%8, %9, %10, %11, %12, %13, %14, %15"
#define FLEXTRON_TEXT_16 "%16, %17, %18, %19, %20, %21, %22, %23"
#define FLEXTRON_TEXT_24 "%24, %25, %26, %27, %28, %29, %30, %31"
#define FLEXTRON_TEXT_32 "%32, %33, %34, %35, %36, %37, %38, %39"
#define FLEXTRON_TEXT_40 "%40, %41, %42, %43, %44, %45, %46, %47"
#define FLEXTRON_TEXT_48 "%48, %49, %50, %51, %52, %53, %54, %55"
#define FLEXTRON_TEXT_56 "%56, %57, %58, %59, %60, %61, %62, %63"
#define FLEXTRON_TEXT_64 "%64, %65, %66, %67, %68, %69, %70, %71"
#define FLEXTRON_TEXT_72 "%72, %73, %74, %75, %76, %77, %78, %79"
#define FLEXTRON_TEXT_80 "%80, %81, %82, %83, %84, %85, %86, %87"
#define FLEXTRON_TEXT_88 "%88, %89, %90, %91, %92, %93, %94, %95"
#define FLEXTRON_TEXT_96 "%96, %97, %98, %99, %100, %101, %102, %103"
#define FLEXTRON_TEXT_104 "%104, %105, %106, %107, %108, %109, %110, %111"
#define FLEXTRON_TEXT_112 "%112, %113, %114, %115, %116, %117, %118, %119"
#define FLEXTRON_TEXT_120 "%120, %121, %122, %123, %124, %125, %126, %127"
#define FLEXTRON_OUT(i)                                                                                \
  "+f"(d.data[i]), "+f"(d.data[i + 1]), "+f"(d.data[i + 2]), "+f"(d.data[i + 3]), "+f"(d.data[i + 4]), \
      "+f"(d.data[i + 5]), "+f"(d.data[i + 6]), "+f"(d.data[i + 7])
#define FLEXTRON_D_TEXT_16 FLEXTRON_TEXT_0
#define FLEXTRON_D_16 FLEXTRON_OUT(0)
#define FLEXTRON_D_TEXT_32 FLEXTRON_TEXT_0 ", " FLEXTRON_TEXT_8
#define FLEXTRON_D_32 FLEXTRON_OUT(0), FLEXTRON_OUT(8)
#define FLEXTRON_D_TEXT_64 FLEXTRON_TEXT_0 ", " FLEXTRON_TEXT_8 ", " FLEXTRON_TEXT_16 ", " FLEXTRON_TEXT_24
#define FLEXTRON_D_64 FLEXTRON_OUT(0), FLEXTRON_OUT(8), FLEXTRON_OUT(16), FLEXTRON_OUT(24)
#define FLEXTRON_D_TEXT_96 FLEXTRON_D_TEXT_64 ", " FLEXTRON_TEXT_32 ", " FLEXTRON_TEXT_40
#define FLEXTRON_D_96 FLEXTRON_D_64, FLEXTRON_OUT(32), FLEXTRON_OUT(40)
#define FLEXTRON_D_TEXT_128 \
  FLEXTRON_D_TEXT_64 ", " FLEXTRON_TEXT_32 ", " FLEXTRON_TEXT_40 ", " FLEXTRON_TEXT_48 ", " FLEXTRON_TEXT_56
#define FLEXTRON_D_128 FLEXTRON_D_64, FLEXTRON_OUT(32), FLEXTRON_OUT(40), FLEXTRON_OUT(48), FLEXTRON_OUT(56)
#define FLEXTRON_D_TEXT_256                                                              \
  FLEXTRON_D_TEXT_128 ", " FLEXTRON_TEXT_64 ", " FLEXTRON_TEXT_72 ", " FLEXTRON_TEXT_80  \
                      ", " FLEXTRON_TEXT_88 ", " FLEXTRON_TEXT_96 ", " FLEXTRON_TEXT_104 \
                      ", " FLEXTRON_TEXT_112 ", " FLEXTRON_TEXT_120
#define FLEXTRON_D_256                                                                                      \
  FLEXTRON_D_128, FLEXTRON_OUT(64), FLEXTRON_OUT(72), FLEXTRON_OUT(80), FLEXTRON_OUT(88), FLEXTRON_OUT(96), \
      FLEXTRON_OUT(104), FLEXTRON_OUT(112), FLEXTRON_OUT(120)

// Both operands by descriptor, or A in registers; the strings are the inputs' numbers.
#define FLEXTRON_WGMMA_SS(type, N, a, b, keep, major_a_, major_b_)                                     \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " keep ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N   \
               "k16.f32." type "." type " {" FLEXTRON_D_TEXT_##N "}, " a ", " b ", p, 1, 1, " major_a_ \
                                                                 ", " major_b_ ";\n}"                  \
               : FLEXTRON_D_##N                                                                        \
               : "l"(a_), "l"(b_), "r"(accumulate), "n"(int(major_a)), "n"(int(major_b))               \
               : "memory")
#define FLEXTRON_WGMMA_RS(type, N, a0, a1, a2, a3, b, keep, major_b_)                                      \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " keep ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N       \
               "k16.f32." type "." type " {" FLEXTRON_D_TEXT_##N "}, {" a0 ", " a1 ", " a2 ", " a3 "}, " b \
                                                                 ", p, 1, 1, " major_b_ ";\n}"             \
               : FLEXTRON_D_##N                                                                            \
               : "r"(a_.data[0]), "r"(a_.data[1]), "r"(a_.data[2]), "r"(a_.data[3]), "l"(b_),              \
                 "r"(accumulate), "n"(int(major_b))                                                        \
               : "memory")
#define FLEXTRON_WGMMA_SS_OF(type)                                                         \
  if constexpr (N == 8) FLEXTRON_WGMMA_SS(type, 8, "%4", "%5", "%6", "%7", "%8");          \
  if constexpr (N == 16) FLEXTRON_WGMMA_SS(type, 16, "%8", "%9", "%10", "%11", "%12");     \
  if constexpr (N == 32) FLEXTRON_WGMMA_SS(type, 32, "%16", "%17", "%18", "%19", "%20");   \
  if constexpr (N == 64) FLEXTRON_WGMMA_SS(type, 64, "%32", "%33", "%34", "%35", "%36");   \
  if constexpr (N == 128) FLEXTRON_WGMMA_SS(type, 128, "%64", "%65", "%66", "%67", "%68"); \
  if constexpr (N == 256) FLEXTRON_WGMMA_SS(type, 256, "%128", "%129", "%130", "%131", "%132");
#define FLEXTRON_WGMMA_RS_OF(type)                                                                       \
  if constexpr (N == 64) FLEXTRON_WGMMA_RS(type, 64, "%32", "%33", "%34", "%35", "%36", "%37", "%38");   \
  if constexpr (N == 96) FLEXTRON_WGMMA_RS(type, 96, "%48", "%49", "%50", "%51", "%52", "%53", "%54");   \
  if constexpr (N == 128) FLEXTRON_WGMMA_RS(type, 128, "%64", "%65", "%66", "%67", "%68", "%69", "%70"); \
  if constexpr (N == 256)                                                                                \
    FLEXTRON_WGMMA_RS(type, 256, "%128", "%129", "%130", "%131", "%132", "%133", "%134");

// d = a b + d, or a b where `accumulate` is 0. Thread t of the warpgroup holds rows 16 (t / 32) + (t % 32) /
// 4 and 8 more, of columns 8 i + 2 (t % 4) and the next in d[4 i .. 4 i + 3]: (row, column), (row, column +
// 1), (row + 8, ..).
template <class scalar_t, int N, Major major_a = Major::kK, Major major_b = Major::kK>
__device__ __forceinline__ void wgmma(Registers<float, N / 2>& d, uint64_t a_, uint64_t b_,
                                      int accumulate FLEXTRON_AND_SITE) {
  constexpr bool is_bf16 = std::is_same_v<scalar_t, bf16>;
  static_assert((is_bf16 || std::is_same_v<scalar_t, fp16>) &&
                (N == 8 || N == 16 || N == 32 || N == 64 || N == 128 || N == 256));
  FLEXTRON_INSTRUCTION(
      if constexpr (is_bf16) { FLEXTRON_WGMMA_SS_OF("bf16") } else {FLEXTRON_WGMMA_SS_OF("f16")},
      emulator::wgmma(is_bf16, N, d.data, nullptr, a_, major_a == Major::kMN, b_, major_b == Major::kMN,
                      accumulate, site));
}

// A in registers, laid out as mma_m16n8k16's in each warp.
template <class scalar_t, int N, Major major_b = Major::kK>
__device__ __forceinline__ void wgmma(Registers<float, N / 2>& d, const Registers<uint32_t, 4>& a_,
                                      uint64_t b_, int accumulate FLEXTRON_AND_SITE) {
  constexpr bool is_bf16 = std::is_same_v<scalar_t, bf16>;
  static_assert((is_bf16 || std::is_same_v<scalar_t, fp16>) && (N == 64 || N == 96 || N == 128 || N == 256));
  FLEXTRON_INSTRUCTION(
      if constexpr (is_bf16) { FLEXTRON_WGMMA_RS_OF("bf16") } else {FLEXTRON_WGMMA_RS_OF("f16")},
      emulator::wgmma(is_bf16, N, d.data, a_.data, 0, false, b_, major_b == Major::kMN, accumulate, site));
}

}  // namespace flextron
