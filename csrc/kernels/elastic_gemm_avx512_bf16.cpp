// elastic_gemm with dot products of bfloat16 pairs (AVX512-BF16), chosen at run time: some rows by some
// panels, their sums in registers. Each sum is made pair after pair, whoever makes it.
#include "kernels/elastic_gemm_pairs.h"

namespace flextron {
namespace {

// Panels of few rows whose sums fit the registers and are enough to hide the latency of a dot product.
constexpr int few_panels(int rows) { return rows <= 3 ? 8 : rows <= 6 ? 4 : 2; }

// c[panels][rows] += products of K inputs: tiles of a a_step apart, panels b_panel and c_panel apart.
template <int rows, int panels, bool streamed, class W>
void multiply(i64 K, const bf16* a, i64 a_step, const W* b, i64 b_panel, float* c, i64 c_panel,
              bool from_zero, Stream stream) {
  Vec<float> sum[panels][rows];
#pragma GCC unroll 8
  for (int p = 0; p < panels; ++p)
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i)
      sum[p][i] = from_zero ? Vec<float>{} : load_loose<float>(c + p * c_panel + i * kPanel);
  // The `count` inputs from k on, of a word of W; x[i * kTileInputs] are row i's.
  const auto word = [&](const bf16* x, i64 k, i64 count) __attribute__((always_inline)) {
    Words w[panels];
#pragma GCC unroll 8
    for (int p = 0; p < panels; ++p) w[p] = load_loose<uint32_t>(b + p * b_panel + k * kPanel);
#pragma GCC unroll 2
    for (i64 pair = 0; pair < count; pair += 2) {
      const uint32_t used = pair + 1 < count ? 0xFFFFFFFFu : 0xFFFFu;
      Words v[panels];
#pragma GCC unroll 8
      for (int p = 0; p < panels; ++p) v[p] = pair_of<W>(w[p], pair) & used;
#pragma GCC unroll 16
      for (int i = 0; i < rows; ++i) {
        uint32_t both;
        __builtin_memcpy(&both, x + i * kTileInputs + pair, sizeof(both));
        const Words from = Words{} + (both & used);
#pragma GCC unroll 8
        for (int p = 0; p < panels; ++p) sum[p][i] = dot_of_pairs(sum[p][i], from, v[p]);
      }
    }
  };
  const auto whole_words = [&](i64 k, i64 end) __attribute__((always_inline)) {
    for (i64 at = 0; k + at + kTogether<W> <= end; at += kTogether<W>) {
      if constexpr (streamed) {
        const i64 next = (k + at) * kPanel + kAhead<W> / i64(sizeof(W));
#pragma GCC unroll 8
        for (int p = 0; p < panels; ++p)
          __builtin_prefetch(b + p * b_panel + (next < stream.left * kPanel ? next : next + stream.jump));
      }
      word(a + at, k + at, kTogether<W>);
    }
  };
  i64 k = 0;
  for (; k + kTileInputs <= K; k += kTileInputs, a += a_step) whole_words(k, k + kTileInputs);
  whole_words(k, K);
  if (const i64 rest = K % kTogether<W>; rest > 0) word(a + (K - rest - k), K - rest, rest);
#pragma GCC unroll 8
  for (int p = 0; p < panels; ++p)
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i) store_loose(c + p * c_panel + i * kPanel, sum[p][i]);
}

// The same for `count` rows, at most `rows`, which only the caller of the caller knows, and all panels.
template <bool streamed, int rows, class W>
void multiply_rows(i64 count, i64 panels, i64 K, const bf16* a, i64 a_step, const W* b, i64 b_panel, float* c,
                   i64 c_panel, bool from_zero, Stream stream) {
  if constexpr (rows > 1)
    if (count < rows)
      return multiply_rows<streamed, rows - 1>(count, panels, K, a, a_step, b, b_panel, c, c_panel, from_zero,
                                               stream);
  constexpr int together = streamed ? few_panels(rows) : 2;
  i64 p = 0;
  for (; p + together <= panels; p += together)
    multiply<rows, together, streamed>(K, a, a_step, b + p * b_panel, b_panel, c + p * c_panel, c_panel,
                                       from_zero, stream);
  for (; p < panels; ++p)
    multiply<rows, 1, streamed>(K, a, a_step, b + p * b_panel, b_panel, c + p * c_panel, c_panel, from_zero,
                                stream);
}

// One panel of `count` rows, at most `rows`: as many sums as two panels of half the rows have.
template <int rows>
void multiply_one(i64 count, i64 K, const bf16* a, i64 a_step, const bf16* b, float* c, bool from_zero) {
  if constexpr (rows > 1)
    if (count < rows) return multiply_one<rows - 1>(count, K, a, a_step, b, c, from_zero);
  multiply<rows, 1, false>(K, a, a_step, b, 0, c, 0, from_zero, {});
}

struct Dots {
  static constexpr i64 kChunk = 288;  // 18 KiB of panels, beside the activations of as many rows
  template <class W>
  static constexpr i64 kFewRows = 4;
  static constexpr i64 kFewPanels = few_panels(1);
  static constexpr i64 kRows = 8;  // of two panels: 16 sums hide the latency of a dot product

  struct Chunk {
    const bf16* b;
    i64 b_panel, count;

    void multiply(const GemmGroup& g, i64 K, const bf16* a, float* c, i64 c_panel, bool from_zero) const {
      const i64 a_step = row_tiles(g) * kTileElements;
      if (count == 1)
        for (i64 row = 0; row < g.rows; row += kTileRows)
          multiply_one<kTileRows>(smaller(kTileRows, g.rows - row), K, a + row * kTileInputs, a_step, b,
                                  c + row * kPanel, from_zero);
      else
        for (i64 row = 0; row < g.rows; row += kRows)
          multiply_rows<false, kRows>(smaller(kRows, g.rows - row), count, K, a + row * kTileInputs, a_step,
                                      b, b_panel, c + row * kPanel, c_panel, from_zero, {});
    }
  };

  template <class W>
  static void few(i64 rows, i64 panels, i64 K, const bf16* tiles, const W* b, i64 b_panel, float* c,
                  i64 c_panel, bool from_zero, Stream stream) {
    multiply_rows<true, kFewRows<W>>(rows, panels, K, tiles, kTileElements, b, b_panel, c, c_panel, from_zero,
                                     stream);
  }
};

}  // namespace

void elastic_gemm_avx512_bf16(const ElasticGemmParams& p, int64_t begin, int64_t end) {
  run_pairs<Dots>(p, begin, end);
}

void elastic_gemm_tiles_avx512_bf16(const ElasticGemmParams& p, int64_t begin, int64_t end) {
  put_tiles(p, begin, end);
}

}  // namespace flextron
