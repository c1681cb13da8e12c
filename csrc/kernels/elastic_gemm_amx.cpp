// elastic_gemm with a matrix unit (Intel AMX), chosen at run time: tiles of 16 rows by a panel, two of each
// side by side, their sums in the unit.
#include "kernels/amx.h"
#include "kernels/elastic_gemm_pairs.h"

namespace flextron {
namespace {

// c[rows][panels] += `steps` products of tiles, then one with the `last` tiles of b where there are any.
// Tiles of a: [step][row_tiles]; sums: [panels][c_panel].
template <int row_tiles, int panels>
void multiply(i64 steps, const bf16* a, const bf16* b, i64 b_panel, const bf16* last, float* c, i64 c_panel,
              bool from_zero) {
  const auto of_row = [&](i64 r, i64 p) { return c + p * c_panel + r * kTileRows * kPanel; };
  constexpr i64 kSumBytes = kPanel * sizeof(float);
  if (from_zero) {
    tile_zero<0>();
    if constexpr (panels > 1) tile_zero<1>();
    if constexpr (row_tiles > 1) tile_zero<2>();
    if constexpr (row_tiles > 1 && panels > 1) tile_zero<3>();
  } else {
    tile_load<0>(of_row(0, 0), kSumBytes);
    if constexpr (panels > 1) tile_load<1>(of_row(0, 1), kSumBytes);
    if constexpr (row_tiles > 1) tile_load<2>(of_row(1, 0), kSumBytes);
    if constexpr (row_tiles > 1 && panels > 1) tile_load<3>(of_row(1, 1), kSumBytes);
  }
  const auto step = [&](const bf16* b0, const bf16* b1) __attribute__((always_inline)) {
    tile_load<6>(b0, kTileRowBytes);
    tile_load<4>(a, kTileRowBytes);
    tile_dot_bf16<0, 4, 6>();
    if constexpr (panels > 1) {
      tile_load<7>(b1, kTileRowBytes);
      tile_dot_bf16<1, 4, 7>();
    }
    if constexpr (row_tiles > 1) {
      tile_load<5>(a + kTileElements, kTileRowBytes);
      tile_dot_bf16<2, 5, 6>();
      if constexpr (panels > 1) tile_dot_bf16<3, 5, 7>();
    }
    a += row_tiles * kTileElements;
  };
  for (i64 s = 0; s < steps; ++s) step(b + s * kPanelTile, b + b_panel + s * kPanelTile);
  if (last) step(last, last + kPanelTile);
  tile_store<0>(of_row(0, 0), kSumBytes);
  if constexpr (panels > 1) tile_store<1>(of_row(0, 1), kSumBytes);
  if constexpr (row_tiles > 1) tile_store<2>(of_row(1, 0), kSumBytes);
  if constexpr (row_tiles > 1 && panels > 1) tile_store<3>(of_row(1, 1), kSumBytes);
}

// -- few rows: the same sums in vectors --

// What multiply() makes, of `rows` rows and some panels: x[row] are bfloat16 numbers as floats, x_row apart.
template <int rows, int panels, class W>
void multiply_few(i64 K, const float* x, i64 x_row, const W* b, i64 b_panel, float* c, i64 c_panel,
                  bool from_zero, Stream stream) {
  Vec<float> sum[panels][rows];
#pragma GCC unroll 8
  for (int p = 0; p < panels; ++p)
#pragma GCC unroll 4
    for (int i = 0; i < rows; ++i)
      sum[p][i] = from_zero ? Vec<float>{} : load_loose<float>(c + p * c_panel + i * kPanel);
  for (i64 k = 0; k < K; k += kTileInputs) {
    Vec<float> chain[panels][rows][2] = {};  // of even inputs, and of odd ones
    const auto word = [&](i64 at, i64 count) __attribute__((always_inline)) {
#pragma GCC unroll 8
      for (int p = 0; p < panels; ++p) {
        const Words words = load_loose<uint32_t>(b + p * b_panel + at * kPanel);
#pragma GCC unroll 4
        for (i64 part = 0; part < count; ++part) {
          const Vec<float> w = part_of<W>(words, part);
#pragma GCC unroll 4
          for (int i = 0; i < rows; ++i) chain[p][i][part % 2] += x[i * x_row + at + part] * w;
        }
      }
    };
    const i64 end = smaller(k + kTileInputs, K);
    i64 at = k;
    for (; at + kTogether<W> <= end; at += kTogether<W>) {
      const i64 next = at * kPanel + kAhead<W> / i64(sizeof(W));
#pragma GCC unroll 8
      for (int p = 0; p < panels; ++p)
        __builtin_prefetch(b + p * b_panel + (next < stream.left * kPanel ? next : next + stream.jump));
      word(at, kTogether<W>);
    }
    if (at < end) word(at, end - at);
#pragma GCC unroll 8
    for (int p = 0; p < panels; ++p)
#pragma GCC unroll 4
      for (int i = 0; i < rows; ++i) sum[p][i] += chain[p][i][0] + chain[p][i][1];
  }
#pragma GCC unroll 8
  for (int p = 0; p < panels; ++p)
#pragma GCC unroll 4
    for (int i = 0; i < rows; ++i) store_loose(c + p * c_panel + i * kPanel, sum[p][i]);
}

// Panels of so many rows whose sums and chains fit the registers.
constexpr int few_panels(i64 rows) { return rows == 1 ? 8 : rows == 2 ? 4 : 2; }

template <class W, int rows>
void multiply_few(i64 count, i64 panels, i64 K, const float* x, i64 x_row, const W* b, i64 b_panel, float* c,
                  i64 c_panel, bool from_zero, Stream stream) {
  if constexpr (rows > 1)
    if (count < rows)
      return multiply_few<W, rows - 1>(count, panels, K, x, x_row, b, b_panel, c, c_panel, from_zero, stream);
  constexpr int together = few_panels(rows);
  i64 p = 0;
  for (; p + together <= panels; p += together)
    multiply_few<rows, together>(K, x, x_row, b + p * b_panel, b_panel, c + p * c_panel, c_panel, from_zero,
                                 stream);
  for (; p < panels; ++p)
    multiply_few<rows, 1>(K, x, x_row, b + p * b_panel, b_panel, c + p * c_panel, c_panel, from_zero, stream);
}

struct Amx {
  static constexpr i64 kChunk = 512;  // 32 KiB of panels
  // 2048 x 8192, gated, on 2 cores of an Intel Xeon, Emerald Rapids, us in vectors and on the unit: bfloat16
  // 3777, 5700 at 1 row and 6031, 3184 at 4, 8; int8, whose panels have to be widened for the unit, 5838,
  // 6758 at 4, 8.
  template <class W>
  static constexpr i64 kFewRows = std::is_same_v<W, int8> ? 4 : 1;
  static constexpr i64 kFewPanels = few_panels(1);

  class Chunk {
   public:
    Chunk(const bf16* b, i64 b_panel, i64 count) : b_(b), b_panel_(b_panel), count_(count) {}

    void multiply(const GemmGroup& g, i64 K, const bf16* a, float* c, i64 c_panel, bool from_zero) {
      const i64 steps = K / kTileInputs;
      const bf16* const last = K % kTileInputs > 0 ? cut(K) : nullptr;
      const auto some = [&](auto row_tiles, auto panels) {
        flextron::multiply<row_tiles.value, panels.value>(steps, a, b_, b_panel_, last, c, c_panel,
                                                          from_zero);
      };
      using One = std::integral_constant<int, 1>;
      using Two = std::integral_constant<int, 2>;
      const bool wide = count_ > 1, tall = row_tiles(g) > 1;
      wide ? (tall ? some(Two{}, Two{}) : some(One{}, Two{}))
           : (tall ? some(Two{}, One{}) : some(One{}, One{}));
    }

   private:
    // The panels' tiles that end behind input K, 0 from there on: what lies there may be no number.
    const bf16* cut(i64 K) {
      if (cut_at_ == K) return ends_[0];
      cut_at_ = K;
      const i64 whole = K / kTileInputs * kTileInputs;
      for (i64 i = 0; i < count_; ++i)
        for (i64 k = 0; k < kTileInputs; k += 2) {
          Words words{};
          if (whole + k < K) words = load_loose<uint32_t>(b_ + i * b_panel_ + (whole + k) * kPanel);
          if (whole + k + 1 == K) words &= 0xFFFFu;
          store_words(ends_[i] + k * kPanel, words);
        }
      return ends_[0];
    }

    const bf16* b_;
    i64 b_panel_, count_, cut_at_ = 0;
    alignas(kLine) bf16 ends_[2][kPanelTile];
  };

  template <class W>
  static void few(i64 rows, i64 panels, i64 K, const bf16* tiles, const W* b, i64 b_panel, float* c,
                  i64 c_panel, bool from_zero, Stream stream) {
    alignas(kLine) float x[kFewRows<W> * kChunk];
    for (i64 k = 0; k < K; k += kTileInputs)
      for (i64 i = 0; i < rows; ++i)
        widen_all(x + i * kChunk + k, tiles + k * kTileRows + i * kTileInputs, kTileInputs);
    multiply_few<W, kFewRows<W>>(rows, panels, K, x, kChunk, b, b_panel, c, c_panel, from_zero, stream);
  }
};

}  // namespace

void elastic_gemm_amx(const ElasticGemmParams& p, int64_t begin, int64_t end) {
  const Tiles tiles;
  run_pairs<Amx>(p, begin, end);
}

void elastic_gemm_tiles_amx(const ElasticGemmParams& p, int64_t begin, int64_t end) {
  put_tiles(p, begin, end);
}

}  // namespace flextron
