// The loops of elastic_gemm on a CPU, included once for each instruction set; vector.h says why all is
// anonymous.
//
// A tile is up to kGroupRows rows by some panels, its sums in registers. Few rows take the panels as they are
// stored and widen them in registers, several panels at a time; more rows take them widened to float,
// kChainInputs inputs at a time, from the L1 cache. Either way each sum is made of the same operations in the
// same order.
#pragma once

#include <type_traits>

#include "kernels/elastic_gemm.h"
#include "kernels/vector_activation.h"

namespace flextron {
namespace {

struct int8 {
  int8_t bits;
};

constexpr i64 kWide = kLanes<float>;   // floats of a vector
constexpr i64 kVecs = kPanel / kWide;  // vectors of a panel
constexpr i64 kGroupRows = gemm_group_rows(kVectorBytes);
constexpr i64 kSums = gemm_sum_registers(kVectorBytes);    // vectors of sums
constexpr i64 kTilePanels = kSums / (kGroupRows * kVecs);  // of a tile of all rows
constexpr i64 kBatch = 8 / kVecs;                          // panels streamed side by side for few rows
static_assert(kTilePanels == 1 || kTilePanels == 2);

// Panels of a tile of few rows: enough sums to hide the latency of a multiply-add. With NEON a panel's words
// and one of their inputs take eight registers beside them.
constexpr i64 tile_panels(i64 rows) {
  const i64 fit = (kIsArm ? 16 : kSums) / (rows * kVecs);
  return fit >= 8 && kBatch >= 8 ? 8 : fit >= 4 && kBatch >= 4 ? 4 : fit >= 2 && kBatch >= 2 ? 2 : 1;
}

// -- what vector.h's vectors at any address lack --

inline void store_loose(float* x, Vec<float> v) { *reinterpret_cast<Loose<float>::type*>(x) = v; }

using Integers = Loose<int32_t>::type;

// Inputs of a panel that lie side by side, in a word of four bytes for each feature.
template <class W>
constexpr i64 kTogether = 4 / i64(sizeof(W));

// Input `part` of the kTogether<W> that a word of each feature holds, as floats.
template <class W>
inline Vec<float> part_of(Words word, i64 part) {
  if constexpr (std::is_same_v<W, float>) return (Vec<float>)word;
  if constexpr (std::is_same_v<W, bf16>) return (Vec<float>)(part == 0 ? word << 16 : word & 0xFFFF0000u);
  if constexpr (std::is_same_v<W, fp16>) return from_high_half(part == 0 ? word << 16 : word & 0xFFFF0000u);
  if constexpr (std::is_same_v<W, int8>)
    return __builtin_convertvector((Integers)(word << (24 - 8 * part)) >> 24, Vec<float>);
}

template <class W>
inline void widen_all(float* __restrict to, const W* __restrict from, i64 n) {
  i64 i = 0;
  for (; i + kWide <= n; i += kWide) store_loose(to + i, widened(from + i));
  for (; i < n; ++i) to[i] = widen(from[i]);
}

// f(typed null pointer) for the dtype's type.
template <class F>
inline void with_io(GemmDtype dtype, const F& f) {
  if (dtype == GemmDtype::kFloat) return f(static_cast<float*>(nullptr));
  if (dtype == GemmDtype::kBf16) return f(static_cast<bf16*>(nullptr));
  f(static_cast<fp16*>(nullptr));
}

// -- tiles --

// A stream of panels is asked for this many bytes ahead of its use, of floats fewer (1 row on 2 cores of an
// AMD EPYC, Zen 3: floats at 256 bytes 1.02-1.25 of the rate at 1024, 1.02-1.14 at 512; bfloat16 0.90-1.01 at
// 256, int8 0.97-1.01). The stream has `left` inputs from where a tile begins, and `jump` elements behind the
// last of them it goes on: another panel's beginning would otherwise be waited for, line by line, which takes
// as long as the rest of a short panel.
template <class W>
constexpr i64 kAhead = std::is_same_v<W, float> ? 256 : 1024;
struct Stream {
  i64 left, jump;
};

// c[p][i] += sum over K inputs of a[i] * b[p]: panels c_panel and b_panel apart, rows of c kPanel apart.
template <int rows, int panels, bool by_input, bool streamed, class W>
void tile(i64 K, const float* a, i64 a_row, i64 a_input, const W* b, i64 b_panel, float* c, i64 c_panel,
          Stream stream) {
  Vec<float> sum[panels][rows][kVecs];
#pragma GCC unroll 8
  for (int p = 0; p < panels; ++p)
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) sum[p][i][v] = Vec<float>{};
  // The inputs of a line of a panel, from k on, of which `count` are used.
  const auto multiply = [&](i64 k, i64 count) __attribute__((always_inline)) {
#pragma GCC unroll 8
    for (int p = 0; p < panels; ++p) {
      Words words[kVecs];
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v)
        words[v] = load_loose<uint32_t>(b + p * b_panel + k * kPanel + v * kWide * kTogether<W>);
#pragma GCC unroll 4
      for (i64 part = 0; part < count; ++part) {
        Vec<float> w[kVecs];
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v) w[v] = part_of<W>(words[v], part);
#pragma GCC unroll 16
        for (int i = 0; i < rows; ++i) {
          const float x = by_input ? a[(k + part) * a_input + i] : a[i * a_row + k + part];
#pragma GCC unroll 4
          for (int v = 0; v < kVecs; ++v) sum[p][i][v] += x * w[v];
        }
      }
    }
  };
  i64 k = 0;
  for (; k + kTogether<W> <= K; k += kTogether<W>) {
    if constexpr (streamed) {
      const i64 at = k * kPanel + kAhead<W> / i64(sizeof(W));
      const i64 ahead = at < stream.left * kPanel ? at : at + stream.jump;
#pragma GCC unroll 8
      for (int p = 0; p < panels; ++p) __builtin_prefetch(b + p * b_panel + ahead);
    }
    multiply(k, kTogether<W>);
  }
  if (k < K) multiply(k, K - k);
#pragma GCC unroll 8
  for (int p = 0; p < panels; ++p)
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) {
        float* const at = c + p * c_panel + i * kPanel + v * kWide;
        store_loose(at, load_loose<float>(at) + sum[p][i][v]);
      }
}

// The tile of `rows` rows, which only the caller of the caller knows.
template <int panels_of, bool by_input, class W, int rows = kGroupRows>
inline void tiles(i64 count, i64 panels, i64 K, const float* a, i64 a_row, i64 a_input, const W* b,
                  i64 b_panel, float* c, i64 c_panel, Stream stream) {
  if constexpr (rows > 1)
    if (count < rows)
      return tiles<panels_of, by_input, W, rows - 1>(count, panels, K, a, a_row, a_input, b, b_panel, c,
                                                     c_panel, stream);
  constexpr int together = panels_of == 0 ? tile_panels(rows) : panels_of;
  i64 p = 0;
  for (; p + together <= panels; p += together)
    tile<rows, together, by_input, panels_of == 0>(K, a, a_row, a_input, b + p * b_panel, b_panel,
                                                   c + p * c_panel, c_panel, stream);
  if constexpr (together > 1)
    for (; p < panels; ++p)
      tile<rows, 1, by_input, panels_of == 0>(K, a, a_row, a_input, b + p * b_panel, b_panel, c + p * c_panel,
                                              c_panel, stream);
}

// -- a panel's inputs [k, k + K) as floats, [K][kPanel] --

template <class W>
void fill_panel(float* to, const W* from, i64 K) {
  for (i64 k = 0; k < K; k += kTogether<W>)
    for (i64 v = 0; v < kPanel; v += kWide) {
      const Words words = load_loose<uint32_t>(from + k * kPanel + v * kTogether<W>);
      for (i64 part = 0; part < smaller(kTogether<W>, K - k); ++part)
        store_loose(to + (k + part) * kPanel + v, part_of<W>(words, part));
    }
}

#if FLEXTRON_VECTOR_BYTES == 64
template <class W>
void fill_rows(float* to, const W* from, i64 stride, i64 features, i64 K) {
  constexpr i64 kAtOnce = kPanel * kTogether<W>;
  for (i64 k = 0; k < K; k += kAtOnce) {
    const i64 inputs = smaller(kAtOnce, K - k);
    Words rows[kPanel] = {};
    for (i64 n = 0; n < features; ++n)
      if (inputs == kAtOnce)
        rows[n] = load_loose<uint32_t>(from + n * stride + k);
      else
        __builtin_memcpy(&rows[n], from + n * stride + k, inputs * sizeof(W));
    transpose_words(rows);
    for (i64 i = 0; i < inputs; ++i)
      store_loose(to + (k + i) * kPanel, part_of<W>(rows[i / kTogether<W>], i % kTogether<W>));
  }
}
#else
template <class W>
void fill_rows(float* to, const W* from, i64 stride, i64 features, i64 K) {
  typedef float Four __attribute__((vector_size(16), aligned(4), may_alias));
  typedef int32_t Pick __attribute__((vector_size(16)));
  if (features < kPanel)
    for (i64 i = 0; i < K * kPanel; ++i) to[i] = 0.0f;
  float quad[4][4];
  for (i64 n = 0; n < features; n += 4) {
    i64 k = 0;
    if (n + 4 <= features)
      for (; k + 4 <= K; k += 4) {
        Four r[4];
        for (int j = 0; j < 4; ++j) {
          for (int e = 0; e < 4; ++e) quad[j][e] = widen(from[(n + j) * stride + k + e]);
          r[j] = *reinterpret_cast<const Four*>(quad[j]);
        }
        const Four a = __builtin_shuffle(r[0], r[1], Pick{0, 4, 1, 5});
        const Four b = __builtin_shuffle(r[2], r[3], Pick{0, 4, 1, 5});
        const Four c = __builtin_shuffle(r[0], r[1], Pick{2, 6, 3, 7});
        const Four d = __builtin_shuffle(r[2], r[3], Pick{2, 6, 3, 7});
        float* const at = to + k * kPanel + n;
        *reinterpret_cast<Four*>(at) = __builtin_shuffle(a, b, Pick{0, 1, 4, 5});
        *reinterpret_cast<Four*>(at + kPanel) = __builtin_shuffle(a, b, Pick{2, 3, 6, 7});
        *reinterpret_cast<Four*>(at + 2 * kPanel) = __builtin_shuffle(c, d, Pick{0, 1, 4, 5});
        *reinterpret_cast<Four*>(at + 3 * kPanel) = __builtin_shuffle(c, d, Pick{2, 3, 6, 7});
      }
    for (; k < K; ++k)
      for (i64 j = n; j < smaller(n + 4, features); ++j) to[k * kPanel + j] = widen(from[j * stride + k]);
  }
}
#endif

template <class W>
void fill_columns(float* to, const W* from, i64 stride, i64 features, i64 K) {
  for (i64 k = 0; k < K; ++k) {
    widen_all(to + k * kPanel, from + k * stride, features);
    for (i64 n = features; n < kPanel; ++n) to[k * kPanel + n] = 0.0f;
  }
}

// -- dot products: a plain weight's rows as they lie --

inline float sum_of(Vec<float> v) {
  float lane[kWide];
  store_loose(lane, v);
  for (i64 half = kWide / 2; half > 0; half /= 2)
    for (i64 i = 0; i < half; ++i) lane[i] += lane[i + half];
  return lane[0];
}

// c[i][j] += dot product of row i of a and row j of w.
template <int rows, int features, class W>
void dot_tile(i64 K, const float* a, i64 a_row, const W* w, i64 stride, float* c) {
  Vec<float> sum[features][rows];
#pragma GCC unroll 8
  for (int j = 0; j < features; ++j)
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i) sum[j][i] = Vec<float>{};
  i64 k = 0;
  for (; k + kWide <= K; k += kWide)
#pragma GCC unroll 8
    for (int j = 0; j < features; ++j) {
      const Vec<float> weight = widened(w + j * stride + k);
#pragma GCC unroll 16
      for (int i = 0; i < rows; ++i) sum[j][i] += load_loose<float>(a + i * a_row + k) * weight;
    }
  if (k < K) {  // the rest of a vector, filled up with zeros
    float x[kWide], y[kWide];
    for (int j = 0; j < features; ++j) {
      for (i64 e = 0; e < kWide; ++e) y[e] = k + e < K ? widen(w[j * stride + k + e]) : 0.0f;
      for (int i = 0; i < rows; ++i) {
        for (i64 e = 0; e < kWide; ++e) x[e] = k + e < K ? a[i * a_row + k + e] : 0.0f;
        sum[j][i] += load_loose<float>(x) * load_loose<float>(y);
      }
    }
  }
#pragma GCC unroll 8
  for (int j = 0; j < features; ++j)
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i) c[i * kPanel + j] += sum_of(sum[j][i]);
}

constexpr int kDotGroup = kGroupRows < kDotRows ? kGroupRows : kDotRows;

template <class W, int rows = kDotGroup>
inline void dots(i64 count, i64 features, i64 K, const float* a, i64 a_row, const W* w, i64 stride,
                 float* c) {
  if constexpr (rows > 1)
    if (count < rows) return dots<W, rows - 1>(count, features, K, a, a_row, w, stride, c);
  constexpr int together = kSums / rows >= 4 ? 4 : kSums / rows >= 2 ? 2 : 1;
  i64 n = 0;
  for (; n + together <= features; n += together)
    dot_tile<rows, together>(K, a, a_row, w + n * stride, stride, c + n);
  for (; n < features; ++n) dot_tile<rows, 1>(K, a, a_row, w + n * stride, stride, c + n);
}

// -- what becomes of the sums --

// What turns a panel's sums into values: one factor and one summand for each feature.
struct Affine {
  float scale[kPanel], bias[kPanel];
};
inline void read_affine(const ElasticGemmParams& p, i64 panel, int which, i64 at, i64 n, Affine& to) {
  for (i64 i = 0; i < kPanel; ++i)
    to.scale[i] = p.scales ? p.scales[panel * kPanel + i] : 1.0f, to.bias[i] = 0.0f;
  if (p.bias[which] == nullptr) return;
  with_io(p.io, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* const bias = static_cast<const T*>(p.bias[which]) + at;
    for (i64 i = 0; i < n; ++i) to.bias[i] = widen(bias[i]);
  });
}

struct Place {
  i64 row_block, out_block, strip;
};

// A strip's values, from its one or two panels of sums.
void finish(const ElasticGemmParams& p, const Place& at, const float* sums, i64 c_panel) {
  const i64 first = at.strip * kPanel, feature = at.out_block * p.bias_block + first;
  const i64 most = smaller(kPanel, p.features - first), panels = p.gated ? 2 : 1;
  const i64 panel = at.out_block * p.out_stride + at.strip * panels;
  Affine affine[2];
  for (int q = 0; q < panels; ++q) read_affine(p, panel + q, q, feature, most, affine[q]);
  const GemmGroup* group = p.groups + p.row_blocks[at.row_block];
  const GemmGroup* const last = p.groups + p.row_blocks[at.row_block + 1];
  const i64 row0 = group->row;
  float out[kPanel];
  for (; group < last && group->features > first; ++group) {
    const i64 n = smaller(kPanel, group->features - first);
    for (i64 row = group->row; row < group->row + group->rows; ++row) {
      const float* const c = sums + (row - row0) * kPanel;
      for (i64 v = 0; v < kPanel; v += kWide) {
        const auto value = [&](int q) {
          return load_loose<float>(c + q * c_panel + v) * load_loose<float>(affine[q].scale + v) +
                 load_loose<float>(affine[q].bias + v);
        };
        Vec<float> x = value(0);
        if (p.hidden)
          x = with_activation(p.activation,
                              [&](auto a) { return curve<decltype(a)::value, float>(x).value; });
        if (p.gated) x *= value(1);
        store_loose(out + v, x);
      }
      const i64 to = (p.order ? p.order[row] : row) * p.y_row + at.out_block * p.y_block + first;
      if (p.hidden)
        narrow_some<kPanel>(out, static_cast<float*>(p.y) + to, n);
      else
        with_io(p.io,
                [&](auto* type) { narrow_some<kPanel>(out, static_cast<decltype(type)>(p.y) + to, n); });
    }
  }
}

// -- a batch of strips of one block of rows and of outputs --

template <class W>
struct Batch {
  static constexpr bool kPlain = !std::is_same_v<W, int8>;  // whether there are plain weights of the type

  const ElasticGemmParams& p;
  const GemmGroup *first, *last;
  i64 out_block, strip, strips, panels;  // `panels` of a strip
  float* sums;                           // [strips * panels][rows][kPanel]
  i64 c_panel;

  float* sums_of(const GemmGroup& g) const { return sums + (g.row - first->row) * kPanel; }
  const float* rows_of(const GemmGroup& g, i64 block, i64 k) const {
    return p.a + g.row * p.a_row + block * p.a_block + k * p.a_input;
  }
  bool uses(const GemmGroup& g, i64 k) const { return g.features > strip * kPanel && g.inputs > k; }

  const W* panel_of(i64 slot, i64 block, i64 k) const {  // of panels
    const i64 panel = out_block * p.out_stride + strip * panels + slot;
    return static_cast<const W*>(p.weight[0]) + ((panel * p.in_blocks + block) * p.in_stride + k) * kPanel;
  }
  i64 panel_stride() const { return p.in_blocks * p.in_stride * kPanel; }

  i64 feature_of(i64 slot) const { return (strip + slot / panels) * kPanel; }
  i64 features_of(i64 slot) const { return smaller(kPanel, p.features - feature_of(slot)); }
  const W* plain(i64 which) const { return static_cast<const W*>(p.weight[which]); }

  // Few rows, panels as they are stored. Behind a block's inputs come the next block's, or the next batch's.
  void stream() const {
    const i64 next_batch = strips * panels * panel_stride() - (p.in_blocks - 1) * p.in_stride * kPanel;
    for (i64 block = 0; block < p.in_blocks; ++block) {
      const i64 next = block + 1 < p.in_blocks ? p.in_stride * kPanel : next_batch;
      for (i64 k = 0; k < first->inputs; k += kChainInputs)
        for (const GemmGroup* g = first; g < last && uses(*g, k); ++g)
          tiles<0, false>(g->rows, strips * panels, smaller(kChainInputs, g->inputs - k),
                          rows_of(*g, block, k), p.a_row, 1, panel_of(0, block, k), panel_stride(),
                          sums_of(*g), c_panel, {first->inputs - k, next - first->inputs * kPanel});
    }
  }

  // Few rows, a plain weight.
  void dot() const {
    for (i64 slot = 0; slot < strips * panels; ++slot) {
      const W* const weight =
          plain(slot % panels) + (out_block * p.out_stride + feature_of(slot)) * p.weight_stride;
      for (const GemmGroup* g = first; g < last && uses(*g, 0); ++g)
        for (i64 block = 0; block < p.in_blocks; ++block)
          dots(g->rows, smaller(features_of(slot), g->features - feature_of(slot)), g->inputs,
               rows_of(*g, block, 0), p.a_row, weight + block * p.in_stride, p.weight_stride,
               sums_of(*g) + slot * c_panel);
    }
  }

  void fill(float* to, i64 slot, i64 block, i64 k, i64 K) const {
    if (p.layout == GemmLayout::kPanels) return fill_panel(to, panel_of(slot, block, k), K);
    const i64 feature = out_block * p.out_stride + feature_of(slot), input = block * p.in_stride + k;
    if constexpr (kPlain) {
      if (p.layout == GemmLayout::kRows)
        fill_rows(to, plain(slot % panels) + feature * p.weight_stride + input, p.weight_stride,
                  features_of(slot), K);
      else
        fill_columns(to, plain(p.weight[1] ? block : 0) + input * p.weight_stride + feature, p.weight_stride,
                     features_of(slot), K);
    }
  }

  template <bool by_input>
  void multiply(i64 slot, i64 count, i64 block, i64 k, const float* b, i64 b_panel) const {
    for (const GemmGroup* g = first; g < last && uses(*g, k); ++g)
      tiles<kTilePanels, by_input>(g->rows, count, smaller(kChainInputs, g->inputs - k),
                                   rows_of(*g, block, k), p.a_row, p.a_input, b, b_panel,
                                   sums_of(*g) + slot * c_panel, c_panel, {});
  }

  // Many rows, panels widened to floats on the way to the L1 cache.
  void by_cache() const {
    alignas(kLine) float chunk[kTilePanels][kChainInputs * kPanel];
    for (i64 slot = 0; slot < strips * panels; slot += kTilePanels) {
      const i64 count = smaller(kTilePanels, strips * panels - slot);
      for (i64 block = 0; block < p.in_blocks; ++block)
        for (i64 k = 0; k < first->inputs; k += kChainInputs) {
          const float* b = chunk[0];
          i64 b_panel = kChainInputs * kPanel;
          if constexpr (std::is_same_v<W, float>)
            if (p.layout == GemmLayout::kPanels) b = panel_of(slot, block, k), b_panel = panel_stride();
          if (b == chunk[0])
            for (i64 i = 0; i < count; ++i)
              fill(chunk[i], slot + i, block, k, smaller(kChainInputs, first->inputs - k));
          p.a_input == 1 ? multiply<false>(slot, count, block, k, b, b_panel)
                         : multiply<true>(slot, count, block, k, b, b_panel);
        }
    }
  }
};

template <class W>
void run_items(const ElasticGemmParams& p, i64 begin, i64 end) {
  const i64 panels = p.gated ? 2 : 1, strips = (p.features + kPanel - 1) / kPanel;
  alignas(kLine) float sums[larger(kBatch * kGroupRows, 2 * kBlockRows) * kPanel];
  while (begin < end) {
    const i64 block = begin / strips;
    const Place at{block / p.out_blocks, block % p.out_blocks, begin % strips};
    const GemmGroup* const first = p.groups + p.row_blocks[at.row_block];
    const GemmGroup* const last = p.groups + p.row_blocks[at.row_block + 1];
    const i64 rows = last[-1].row + last[-1].rows - first->row;
    const bool is_stream = p.layout == GemmLayout::kPanels && rows <= kGroupRows && p.a_input == 1;
    const i64 most = is_stream ? kBatch / panels : kTilePanels / panels;
    const i64 count = smaller(smaller(larger(most, i64(1)), end - begin), strips - at.strip);
    const i64 c_panel = rows * kPanel;
    for (i64 i = 0; i < count * panels * c_panel; ++i) sums[i] = 0.0f;
    if (p.scales) {  // a line of each panel, for which finish() would wait
      const float* const scales = p.scales + (at.out_block * p.out_stride + at.strip * panels) * kPanel;
      for (i64 i = 0; i < count * panels; ++i) __builtin_prefetch(scales + i * kPanel);
    }
    const Batch<W> batch{p, first, last, at.out_block, at.strip, count, panels, sums, c_panel};
    if (is_stream)
      batch.stream();
    else if (!p.dots)
      batch.by_cache();
    else if constexpr (Batch<W>::kPlain)
      batch.dot();
    for (i64 i = 0; i < count; ++i)
      finish(p, {at.row_block, at.out_block, at.strip + i}, sums + i * panels * c_panel, c_panel);
    begin += count;
  }
}

inline void run_rows(const GemmRowsParams& p, i64 begin, i64 end) {
  with_io(p.dtype, [&](auto* type) {
    const auto* const x = static_cast<decltype(type)>(const_cast<void*>(p.x));
    for (i64 row = begin; row < end; ++row)
      widen_all(p.to + row * p.to_stride, x + (p.order ? p.order[row] : row) * p.x_stride, p.columns);
  });
}

}  // namespace
}  // namespace flextron

// The launchers of elastic_gemm.h for the instruction set this file is compiled for, in two files.
#define FLEXTRON_DEFINE_ELASTIC_GEMM(isa)                                             \
  void elastic_gemm_##isa(const ElasticGemmParams& p, int64_t begin, int64_t end) {   \
    if (p.weight_dtype == GemmDtype::kFloat) return run_items<float>(p, begin, end);  \
    if (p.weight_dtype == GemmDtype::kInt8) return run_items<int8>(p, begin, end);    \
    elastic_gemm_16bit_##isa(p, begin, end);                                          \
  }                                                                                   \
  void elastic_gemm_rows_##isa(const GemmRowsParams& p, int64_t begin, int64_t end) { \
    run_rows(p, begin, end);                                                          \
  }
#define FLEXTRON_DEFINE_ELASTIC_GEMM_16BIT(isa)                                                           \
  void elastic_gemm_16bit_##isa(const ElasticGemmParams& p, int64_t begin, int64_t end) {                 \
    p.weight_dtype == GemmDtype::kBf16 ? run_items<bf16>(p, begin, end) : run_items<fp16>(p, begin, end); \
  }
