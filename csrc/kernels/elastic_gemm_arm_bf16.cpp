// elastic_gemm with ARM's dot products of bfloat16 pairs (BFDOT), chosen at run time: some rows by a panel,
// their sums in registers. Each sum is made pair after pair, whoever makes it.
//
// A vector of 64 bytes, which the loops beside these have, is four registers here; the sums are written out
// in those.
#include "kernels/elastic_gemm_pairs.h"

namespace flextron {
namespace {

constexpr i64 kQuads = kPanel / 4;  // registers of a panel's sums

inline bfloat16x8_t load_pairs(const bf16* x) {
  return vreinterpretq_bf16_u16(vld1q_u16(reinterpret_cast<const uint16_t*>(x)));
}

// c[rows] += products of K inputs and a panel: tiles of a a_step apart.
template <int rows>
void multiply(i64 K, const bf16* a, i64 a_step, const bf16* b, float* c, bool from_zero) {
  float32x4_t sum[rows][kQuads];
#pragma GCC unroll 4
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 4
    for (int q = 0; q < kQuads; ++q)
      sum[i][q] = from_zero ? vdupq_n_f32(0) : vld1q_f32(c + i * kPanel + 4 * q);
  // A pair of inputs: lane `pair` of x, and the panel's words from `at` on.
  const auto step = [&]<int pair>(std::integral_constant<int, pair>, const bfloat16x8_t(&x)[rows],
                                  const bf16* at) __attribute__((always_inline)) {
    bfloat16x8_t w[kQuads];
#pragma GCC unroll 4
    for (int q = 0; q < kQuads; ++q) w[q] = load_pairs(at + 8 * q);
#pragma GCC unroll 4
    for (int i = 0; i < rows; ++i)
#pragma GCC unroll 4
      for (int q = 0; q < kQuads; ++q) sum[i][q] = vbfdotq_laneq_f32(sum[i][q], w[q], x[i], pair);
  };
  i64 k = 0;
  const auto eight = [&]() __attribute__((always_inline)) {
    bfloat16x8_t x[rows];
#pragma GCC unroll 4
    for (int i = 0; i < rows; ++i)
      x[i] = load_pairs(a + k / kTileInputs * a_step + i * kTileInputs + k % kTileInputs);
    const bf16* const at = b + k * kPanel;
    step(std::integral_constant<int, 0>{}, x, at);
    step(std::integral_constant<int, 1>{}, x, at + 2 * kPanel);
    step(std::integral_constant<int, 2>{}, x, at + 4 * kPanel);
    step(std::integral_constant<int, 3>{}, x, at + 6 * kPanel);
  };
  for (; k + 8 <= K; k += 8) eight();
  for (; k < K; k += 2) {  // an input beyond the last is 0, on both sides
    const uint32_t used = k + 1 < K ? 0xFFFFFFFFu : 0xFFFFu;
    bfloat16x8_t w[kQuads];
#pragma GCC unroll 4
    for (int q = 0; q < kQuads; ++q)
      w[q] = vreinterpretq_bf16_u32(
          vandq_u32(vld1q_u32(reinterpret_cast<const uint32_t*>(b + k * kPanel) + 4 * q), vdupq_n_u32(used)));
#pragma GCC unroll 4
    for (int i = 0; i < rows; ++i) {
      uint32_t both;
      __builtin_memcpy(&both, a + k / kTileInputs * a_step + i * kTileInputs + k % kTileInputs, sizeof(both));
      const bfloat16x8_t x = vreinterpretq_bf16_u32(vdupq_n_u32(both & used));
#pragma GCC unroll 4
      for (int q = 0; q < kQuads; ++q) sum[i][q] = vbfdotq_f32(sum[i][q], w[q], x);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 4
    for (int q = 0; q < kQuads; ++q) vst1q_f32(c + i * kPanel + 4 * q, sum[i][q]);
}

constexpr int kRows = 4;  // 16 registers of sums, 4 of weights and 4 of activations, of 32

template <int rows = kRows>
inline void multiply_rows(i64 count, i64 K, const bf16* a, i64 a_step, const bf16* b, float* c,
                          bool from_zero) {
  if constexpr (rows > 1)
    if (count < rows) return multiply_rows<rows - 1>(count, K, a, a_step, b, c, from_zero);
  multiply<rows>(K, a, a_step, b, c, from_zero);
}

struct Dots {
  static constexpr i64 kChunk = 256;  // 16 KiB of panels, beside the activations of as many rows
  // Up to so many rows panels are walked from end to end; those of integers are turned into pairs first.
  template <class W>
  static constexpr i64 kFewRows = std::is_same_v<W, bf16> ? kRows : 0;
  static constexpr i64 kFewPanels = 2;

  struct Chunk {
    const bf16* b;
    i64 b_panel, count;

    void multiply(const GemmGroup& g, i64 K, const bf16* a, float* c, i64 c_panel, bool from_zero) const {
      for (i64 i = 0; i < count; ++i)
        for (i64 row = 0; row < g.rows; row += kRows)
          multiply_rows(smaller(i64(kRows), g.rows - row), K,
                        a + row / kTileRows * kTileElements + row % kTileRows * kTileInputs,
                        row_tiles(g) * kTileElements, b + i * b_panel, c + i * c_panel + row * kPanel,
                        from_zero);
    }
  };

  template <class W>
  static void few(i64 rows, i64 panels, i64 K, const bf16* tiles, const W* b, i64 b_panel, float* c,
                  i64 c_panel, bool from_zero, Stream) {
    if constexpr (std::is_same_v<W, bf16>)
      for (i64 i = 0; i < panels; ++i)
        multiply_rows(rows, K, tiles, kTileElements, b + i * b_panel, c + i * c_panel, from_zero);
  }
};

}  // namespace

void elastic_gemm_arm_bf16(const ElasticGemmParams& p, int64_t begin, int64_t end) {
  if (p.weight_dtype == GemmDtype::kBf16) return run_pairs_items<Dots, bf16>(p, begin, end);
  run_pairs_items<Dots, int8>(p, begin, end);
}

void elastic_gemm_tiles_arm_bf16(const ElasticGemmParams& p, int64_t begin, int64_t end) {
  put_tiles(p, begin, end);
}

}  // namespace flextron
