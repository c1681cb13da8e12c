// The loops of elastic_gemm over pairs of bfloat16 numbers, for what multiplies them: a matrix unit or dot
// products. Included by the file of each.
//
// Weights in panels of bfloat16 are read as they lie. Others are turned into such panels on the way to the L1
// cache, Unit::kChunk inputs at a time. A Unit has
//
//   kChunk           inputs of two panels that stay in the L1 cache
//   kFewRows<W>      rows up to which panels of W are multiplied as they are stored, kFewPanels of them
//   Chunk            the two panels' inputs [0, inputs) in pairs
//     multiply()     sums of a group's rows += products of its first K inputs, of a chunk
//   few()            the same sums for few rows, panels as they are stored
#pragma once

#include "kernels/elastic_gemm_block.h"
#include "kernels/pairs.h"

namespace flextron {
namespace {

static_assert(kWide == kPanel && kTileRows == kPanel);

constexpr i64 kPanelTile = kTileInputs * kPanel;  // elements
static_assert(kPanelTile == kTileElements);

// -- a panel's inputs [0, K) in pairs, [K / 2][kPanel][2]; what fills up the last pair is 0 --

// Inputs `part` and the next of a word of each feature.
template <class W>
inline Words pair_of(Words word, i64 part) {
  if constexpr (std::is_same_v<W, bf16>) return word;
  if constexpr (std::is_same_v<W, int8>)  // small integers are bfloat16 numbers as they are
    return (Words)part_of<int8>(word, part) >> 16 | (Words)part_of<int8>(word, part + 1);
}

void pairs_of_panel(bf16* to, const int8* from, i64 K) {
  for (i64 k = 0; k < K; k += kTogether<int8>) {
    const Words words = load_loose<uint32_t>(from + k * kPanel);
    store_words(to + k * kPanel, pair_of<int8>(words, 0));
    store_words(to + (k + 2) * kPanel, pair_of<int8>(words, 2));
  }
}

// Of whole panels, `kAtOnce` inputs at a time; then what is left over.
void pairs_of_rows(bf16* to, const bf16* from, i64 stride, i64 features, i64 K) {
  constexpr i64 kAtOnce = 2 * kPanel;
  i64 k = 0;
  if (features == kPanel)
    for (; k + kAtOnce <= K; k += kAtOnce) {
      Words rows[kPanel];
#pragma GCC unroll 16
      for (i64 n = 0; n < kPanel; ++n) rows[n] = load_loose<uint32_t>(from + n * stride + k);
      transpose_words(rows);
#pragma GCC unroll 16
      for (i64 pair = 0; pair < kPanel; ++pair) store_words(to + (k + 2 * pair) * kPanel, rows[pair]);
    }
  for (; k < K; k += kAtOnce) {
    Words rows[kPanel] = {};
    const i64 inputs = smaller(kAtOnce, K - k);
    for (i64 n = 0; n < features; ++n)
      __builtin_memcpy(&rows[n], from + n * stride + k, inputs * sizeof(bf16));
    transpose_words(rows);
    for (i64 pair = 0; pair < (inputs + 1) / 2; ++pair) store_words(to + (k + 2 * pair) * kPanel, rows[pair]);
  }
}

// One input and the next, of `features` features side by side, in pairs; the others are 0, as the next one is
// where `odd` is null.
template <class W>
inline Words pair_of_columns(const W* even, const W* odd, i64 features) {
  W some[2][kPanel] = {};
  if (features < kPanel) {
    __builtin_memcpy(some[0], even, features * sizeof(W));
    if (odd) __builtin_memcpy(some[1], odd, features * sizeof(W));
    even = some[0];
  }
  if (features < kPanel || !odd) odd = some[1];
  if constexpr (std::is_same_v<W, bf16>) return extended(&even->bits) | extended(&odd->bits) << 16;
  if constexpr (!std::is_same_v<W, bf16>) return pairs_of(widened(even), widened(odd));
}
template <class W>
void pairs_of_columns(bf16* to, const W* from, i64 stride, i64 features, i64 K) {
  for (i64 k = 0; k < K; k += 2, from += 2 * stride)
    store_words(to + k * kPanel, pair_of_columns(from, k + 1 < K ? from + stride : nullptr, features));
}

// -- dot products: a plain weight's rows as they lie, for few rows --

// Inputs [k, K) of a row, at most 32 of them, in pairs; 0 behind them.
inline Words pairs_at(const bf16* row, i64 k, i64 K) {
  Words pairs{};
  if (k + kTileInputs <= K) return load_loose<uint32_t>(row + k);
  __builtin_memcpy(&pairs, row + k, (K - k) * sizeof(bf16));
  return pairs;
}

// c[i] += sum of the lanes of v[i].
inline void add_sums_of(const Vec<float> (&v)[4], float* c) {
  typedef int32_t Pick __attribute__((vector_size(64)));
  typedef float Four __attribute__((vector_size(16), aligned(4), may_alias));
  constexpr Pick kLow = {0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29};
  constexpr Pick kHigh = {2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31};
  constexpr Pick kLowTwo = {0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29};
  constexpr Pick kHighTwo = {2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31};
  const Vec<float> a = __builtin_shuffle(v[0], v[1], kLow) + __builtin_shuffle(v[0], v[1], kHigh);
  const Vec<float> b = __builtin_shuffle(v[2], v[3], kLow) + __builtin_shuffle(v[2], v[3], kHigh);
  float lanes[kPanel];
  store_loose(lanes, __builtin_shuffle(a, b, kLowTwo) + __builtin_shuffle(a, b, kHighTwo));
  const auto four = [&](i64 i) { return *reinterpret_cast<const Four*>(lanes + 4 * i); };
  *reinterpret_cast<Four*>(c) += (four(0) + four(2)) + (four(1) + four(3));
}

// c[row][feature] += dot products of rows of tiles, a_step apart, and the first K inputs of `features` rows
// w.
template <int rows, int features>
void dot_pairs(i64 K, const bf16* a, i64 a_step, const bf16* const* w, float* c) {
  Vec<float> sum[rows][features];
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < features; ++j) sum[i][j] = Vec<float>{};
  const auto step = [&](const auto& weight) __attribute__((always_inline)) {
    Words v[features];
#pragma GCC unroll 8
    for (int j = 0; j < features; ++j) v[j] = weight(j);
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
      const Words x = load_loose<uint32_t>(a + i * kTileInputs);
#pragma GCC unroll 8
      for (int j = 0; j < features; ++j) sum[i][j] = dot_of_pairs(sum[i][j], x, v[j]);
    }
    a += a_step;
  };
  i64 k = 0;
  for (; k + kTileInputs <= K; k += kTileInputs) step([&](int j) { return load_loose<uint32_t>(w[j] + k); });
  if (k < K) step([&](int j) { return pairs_at(w[j], k, K); });
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < features; j += 4)
      add_sums_of({sum[i][j], sum[i][j + 1], sum[i][j + 2], sum[i][j + 3]}, c + i * kPanel + j);
}

// Features of a tile of dot products, of which the latency and the registers want more for fewer rows.
constexpr i64 kDotFeatures = 8;
constexpr int kDotTileRows = 6;

template <int rows = kDotTileRows>
inline void dot_rows(i64 count, i64 K, const bf16* a, i64 a_step, const bf16* const* w, float* c) {
  if constexpr (rows > 1)
    if (count < rows) return dot_rows<rows - 1>(count, K, a, a_step, w, c);
  constexpr int features = rows <= 3 ? 8 : 4;
  for (i64 j = 0; j < kDotFeatures; j += features) dot_pairs<rows, features>(K, a, a_step, w + j, c + j);
}

// -- what becomes of the sums: finish() for a group's rows --

// Where the 16 features from `first` on of row m of a group go.
template <class T>
struct ToRows {
  T* y;
  i64 y_row;
  const i64* order;
  i64 row;

  void put(i64 m, Vec<float> v, i64 n) const {
    T* const to = y + (order ? order[row + m] : row + m) * y_row;
    if (n < kPanel) {
      float some[kPanel];
      store_loose(some, v);
      for (i64 i = 0; i < n; ++i) narrow(some[i], to + i);
    } else if constexpr (std::is_same_v<T, float>) {
      store_loose(to, v);
    } else if constexpr (std::is_same_v<T, bf16>) {
      store_bf16(to, v);
    } else {
      for (i64 i = 0; i < kPanel; ++i) narrow(v[i], to + i);
    }
  }
};

// Activations of the next GEMM: rows of its tiles, whose other half another strip writes. What is no feature
// is 0.
struct ToTiles {
  bf16* y;
  i64 row_tiles;
  bool alone;  // no strip writes the other half

  void put(i64 m, Vec<float> v, i64 n) const {
    bf16* const to = y + m / kTileRows * kTileElements + m % kTileRows * kTileInputs;
    if (n < kPanel)
      for (i64 i = n; i < kPanel; ++i) v[i] = 0;
    store_bf16(to, v);
    if (alone) store_bf16(to + kPanel, Vec<float>{});
  }
};

template <class To>
void finish_rows(const ElasticGemmParams& p, i64 rows, i64 n, const Affine (&affine)[2], const float* sums,
                 i64 c_panel, const To& to) {
  const auto value = [&](i64 m, int q) {
    return load_loose<float>(sums + q * c_panel + m * kPanel) * load_loose<float>(affine[q].scale) +
           load_loose<float>(affine[q].bias);
  };
  if (!p.hidden) {
    for (i64 m = 0; m < rows; ++m) to.put(m, value(m, 0), n);
    return;
  }
  with_activation(p.activation, [&](auto a) {
    for (i64 m = 0; m < rows; ++m) {
      const Vec<float> x = curve<decltype(a)::value, float>(value(m, 0)).value;
      to.put(m, p.gated ? x * value(m, 1) : x, n);
    }
  });
}

void finish_group(const ElasticGemmParams& p, i64 out_block, i64 strip, const GemmGroup& g,
                  const Affine (&affine)[2], const float* sums, i64 c_panel) {
  const i64 first = strip * kPanel, n = smaller(kPanel, g.features - first);
  if (n <= 0) return;
  if (p.y_groups) {
    const GemmGroup& next = p.y_groups[&g - p.groups];
    const i64 tile = next.tile + first / kTileInputs * row_tiles(next);
    bf16* const to = static_cast<bf16*>(p.y) + tile * kTileElements + first % kTileInputs;
    const bool alone = first % kTileInputs == 0 && first + kPanel >= g.features;
    return finish_rows(p, g.rows, n, affine, sums, c_panel, ToTiles{to, row_tiles(next), alone});
  }
  const i64 at = out_block * p.y_block + first;
  const auto rows = [&](auto* y) {
    finish_rows(p, g.rows, n, affine, sums, c_panel,
                ToRows<std::remove_pointer_t<decltype(y)>>{y + at, p.y_row, p.order, g.row});
  };
  if (p.hidden) return rows(static_cast<float*>(p.y));
  with_io(p.io, [&](auto* type) { rows(static_cast<decltype(type)>(p.y)); });
}

// -- a batch of strips of one block of rows and of outputs --

template <class Unit, class W>
struct PairsBatch : Batch<W> {
  using Batch<W>::p, Batch<W>::first, Batch<W>::last, Batch<W>::strips, Batch<W>::panels, Batch<W>::sums,
      Batch<W>::c_panel, Batch<W>::strip, Batch<W>::out_block;
  const bool is_few;
  static constexpr bool kInPairs = std::is_same_v<W, bf16>;  // panels of W are read as they lie
  static constexpr i64 kChunk = Unit::kChunk;
  static_assert(kChunk % kTileInputs == 0);

  float* sums_of(const GemmGroup& g) const {
    return sums + (is_few ? g.row - first->row : g.row_tile * kTileRows) * kPanel;
  }
  const bf16* rows_of(const GemmGroup& g, i64 block, i64 k) const {
    const i64 before = block * input_tiles(g.inputs) + k / kTileInputs;
    return static_cast<const bf16*>(p.tiles) + (g.tile + before * row_tiles(g)) * kTileElements;
  }

  void fill(bf16* to, i64 slot, i64 block, i64 k, i64 K) const {
    if constexpr (std::is_same_v<W, int8>) {
      pairs_of_panel(to, this->panel_of(slot, block, k), K);
    } else {
      const i64 feature = out_block * p.out_stride + this->feature_of(slot);
      const i64 input = block * p.in_stride + k, features = this->features_of(slot);
      if constexpr (kInPairs)
        if (p.layout == GemmLayout::kRows)
          return pairs_of_rows(to, this->plain(slot % panels) + feature * p.weight_stride + input,
                               p.weight_stride, features, K);
      pairs_of_columns(to, this->plain(p.weight[1] ? block : 0) + input * p.weight_stride + feature,
                       p.weight_stride, features, K);
    }
  }

  using Affines = Affine[Unit::kFewPanels][2];

  // Of few rows, with panels as they are stored; behind a block's inputs come the next block's, or the next
  // batch's.
  void run_few(const Affines& affine) const {
    const i64 batch_end = strips * panels * this->panel_stride() - (p.in_blocks - 1) * p.in_stride * kPanel;
    for (i64 block = 0; block < p.in_blocks; ++block) {
      const i64 next = block + 1 < p.in_blocks ? p.in_stride * kPanel : batch_end;
      for (i64 k = 0; k < first->inputs; k += kChunk)
        for (const GemmGroup* g = first; g < last && this->uses(*g, k); ++g)
          Unit::template few<W>(g->rows, strips * panels, smaller(kChunk, g->inputs - k),
                                rows_of(*g, block, k), this->panel_of(0, block, k), this->panel_stride(),
                                sums_of(*g), c_panel, block == 0 && k == 0,
                                {first->inputs - k, next - first->inputs * kPanel});
    }
    for (const GemmGroup* g = first; g < last && g->inputs > 0 && g->features > strip * kPanel; ++g)
      finish(*g, affine, sums_of(*g));
  }

  // c += dot products of a group's rows and the features [j, j + kDotFeatures) of a slot; beyond `features`
  // the last one's again.
  void dot(const GemmGroup& g, i64 slot, i64 j, i64 features, float* c) const {
    const i64 row = out_block * p.out_stride + this->feature_of(slot);
    for (i64 block = 0; block < p.in_blocks; ++block) {
      const bf16* w[kDotFeatures];
      for (i64 i = 0; i < kDotFeatures; ++i)
        w[i] = this->plain(slot % panels) + (row + smaller(j + i, features - 1)) * p.weight_stride +
               block * p.in_stride;
      const bf16* a = rows_of(g, block, 0);
      for (i64 tile = 0; tile < g.rows; tile += kTileRows, a += kTileElements) {
        const i64 rows = smaller(kTileRows, g.rows - tile), parts = (rows + kDotTileRows - 1) / kDotTileRows;
        for (i64 part = 0; part < parts; ++part) {
          const i64 m = rows * part / parts, count = rows * (part + 1) / parts - m;
          dot_rows(count, g.inputs, a + m * kTileInputs, row_tiles(g) * kTileElements, w,
                   c + (tile + m) * kPanel);
        }
      }
    }
  }

  // Of few rows, with a plain weight's rows as they lie.
  void run_dots(const Affines& affine) const {
    const i64 slots = strips * panels;
    for (const GemmGroup* g = first; g < last && this->uses(*g, 0); ++g)
      for (i64 slot = 0; slot < slots; ++slot)
        for (i64 i = 0; i < g->rows * kPanel; ++i) sums_of(*g)[slot * c_panel + i] = 0.0f;
    for (i64 slot = 0; slot < slots; ++slot)
      for (i64 j = 0; j < kPanel; j += kDotFeatures)
        for (const GemmGroup* g = first; g < last && this->uses(*g, 0); ++g) {
          const i64 features = smaller(kPanel, g->features - this->feature_of(slot));
          if (j < features) dot(*g, slot, j, features, sums_of(*g) + slot * c_panel + j);
        }
    for (const GemmGroup* g = first; g < last && this->uses(*g, 0); ++g) finish(*g, affine, sums_of(*g));
  }

  void finish(const GemmGroup& g, const Affines& affine, const float* group_sums) const {
    for (i64 i = 0; i < strips; ++i)
      finish_group(p, out_block, strip + i, g, affine[i], group_sums + i * panels * c_panel, c_panel);
  }

  void run() const {
    alignas(kLine) bf16 filled[2][kChunk * kPanel];
    const i64 count = strips * panels;
    Affines affine;
    for (i64 i = 0; i < count; ++i) {
      const i64 feature = this->feature_of(i);
      read_affine(p, out_block * p.out_stride + strip * panels + i, i % panels,
                  out_block * p.bias_block + feature, this->features_of(i), affine[i / panels][i % panels]);
    }
    for (const GemmGroup* g = first; g < last; ++g)
      if (g->inputs == 0) {
        for (i64 i = 0; i < count; ++i)
          for (i64 j = 0; j < g->rows * kPanel; ++j) sums_of(*g)[i * c_panel + j] = 0;
        finish(*g, affine, sums_of(*g));
      }
    if constexpr (!std::is_same_v<W, float>)
      if (is_few) return run_few(affine);
    if constexpr (kInPairs)
      if (p.dots) return run_dots(affine);
    // As equal as can be: a short chunk's products wait for the sums to come and go.
    const i64 chunks = (first->inputs + kChunk - 1) / kChunk;
    const i64 chunk_inputs =
        chunks == 0 ? 0 : (input_tiles(first->inputs) + chunks - 1) / chunks * kTileInputs;
    for (i64 block = 0; block < p.in_blocks; ++block)
      for (i64 k = 0; k < first->inputs; k += chunk_inputs) {
        const i64 inputs = smaller(chunk_inputs, first->inputs - k);
        const bf16* b = filled[0];
        i64 b_panel = kChunk * kPanel;
        if constexpr (kInPairs)
          if (p.layout == GemmLayout::kPanels)
            b = this->panel_of(0, block, k), b_panel = this->panel_stride();
        if (b == filled[0])
          for (i64 i = 0; i < count; ++i) fill(filled[i], i, block, k, inputs);
        typename Unit::Chunk chunk{b, b_panel, count};
        for (const GemmGroup* g = first; g < last && this->uses(*g, k); ++g) {
          chunk.multiply(*g, smaller(chunk_inputs, g->inputs - k), rows_of(*g, block, k), sums_of(*g),
                         c_panel, block == 0 && k == 0);
          if (block + 1 == p.in_blocks && k + chunk_inputs >= g->inputs) finish(*g, affine, sums_of(*g));
        }
      }
  }
};

template <class Unit, class W>
void run_pairs_items(const ElasticGemmParams& p, i64 begin, i64 end) {
  const i64 panels = p.gated ? 2 : 1, strips = (p.features + kPanel - 1) / kPanel;
  constexpr i64 kPanelSums = kPairsBlockTiles * kTileRows * kPanel;
  constexpr i64 kFewRows = Unit::template kFewRows<W>;
  static_assert(kFewRows * Unit::kFewPanels * kPanel <= 2 * kPanelSums);
  alignas(kLine) float sums[2 * kPanelSums];
  while (begin < end) {
    const i64 block = begin / strips;
    const i64 row_block = block / p.out_blocks, strip = begin % strips;
    const GemmGroup* const first = p.groups + p.row_blocks[row_block];
    const GemmGroup* const last = p.groups + p.row_blocks[row_block + 1];
    const bool is_few =
        p.layout == GemmLayout::kPanels && last[-1].row + last[-1].rows - first->row <= kFewRows;
    const i64 most = (is_few ? Unit::kFewPanels : 2) / panels;
    const i64 count = smaller(smaller(most, end - begin), strips - strip);
    const i64 c_panel = is_few ? kFewRows * kPanel : kPanelSums;
    PairsBatch<Unit, W>{{p, first, last, block % p.out_blocks, strip, count, panels, sums, c_panel}, is_few}
        .run();
    begin += count;
  }
}

template <class Unit>
void run_pairs(const ElasticGemmParams& p, i64 begin, i64 end) {
  if (p.weight_dtype == GemmDtype::kBf16) return run_pairs_items<Unit, bf16>(p, begin, end);
  if (p.weight_dtype == GemmDtype::kInt8) return run_pairs_items<Unit, int8>(p, begin, end);
  run_pairs_items<Unit, float>(p, begin, end);
}

// -- activations --

// Row m of a tile has a's elements from m * a_row on, `inputs` of them.
void tile_of_rows(bf16* to, const float* a, i64 a_row, i64 rows, i64 inputs) {
  for (i64 m = 0; m < kTileRows; ++m) {
    float rest[kTileInputs] = {};
    const float* from = rest;
    if (m < rows && inputs == kTileInputs)
      from = a + m * a_row;
    else if (m < rows)
      __builtin_memcpy(rest, a + m * a_row, inputs * sizeof(float));
    narrow_tile_row(from, to + m * kTileInputs);
  }
}
// The same turned over: its elements from m on, a_input apart.
template <class A>
void tile_of_columns(bf16* to, const A* a, i64 a_input, i64 rows, i64 inputs) {
  Words words[kTileRows];
  for (i64 pair = 0; pair < kTileInputs / 2; ++pair, a += 2 * a_input) {
    const i64 left = inputs - 2 * pair;
    words[pair] = left > 0 ? pair_of_columns(a, left > 1 ? a + a_input : nullptr, rows) : Words{};
  }
  transpose_words(words);
  for (i64 m = 0; m < kTileRows; ++m) store_words(to + m * kTileInputs, words[m]);
}
// Row m has those from x[m] on, which are bfloat16 numbers; those `ahead` of them come soon, too.
void tile_of_x(bf16* to, const bf16* const* x, i64 rows, i64 inputs, i64 ahead) {
  for (i64 m = 0; m < kTileRows; ++m) {
    Words row{};
    if (m < rows) __builtin_prefetch(x[m] + ahead, 0, 2);
    if (m < rows && inputs == kTileInputs)
      row = load_loose<uint32_t>(x[m]);
    else if (m < rows)
      __builtin_memcpy(&row, x[m], inputs * sizeof(bf16));
    store_words(to + m * kTileInputs, row);
  }
}

// Of groups [begin, end).
void put_tiles(const ElasticGemmParams& p, i64 begin, i64 end) {
  for (const GemmGroup* g = p.groups + begin; g < p.groups + end; ++g) {
    bf16* to = static_cast<bf16*>(p.tiles) + g->tile * kTileElements;
    for (i64 block = 0; block < p.in_blocks; ++block)
      for (i64 k = 0; k < g->inputs; k += kTileInputs)
        for (i64 m = 0; m < g->rows; m += kTileRows, to += kTileElements) {
          const i64 rows = smaller(kTileRows, g->rows - m), inputs = smaller(kTileInputs, g->inputs - k);
          const i64 row = g->row + m, at = block * p.a_block + k * p.a_input;
          const auto* const all = static_cast<const bf16*>(p.x);
          if (p.x && p.a_input != 1) {
            tile_of_columns(to, all + row * p.a_row + at, p.a_input, rows, inputs);
          } else if (p.x) {
            const bf16* x[kTileRows];
            for (i64 i = 0; i < rows; ++i)
              x[i] = all + (p.x_order ? p.x_order[row + i] : row + i) * p.a_row + at;
            tile_of_x(to, x, rows, inputs, p.x_order ? 0 : kPairsGroupRows * p.a_row);
          } else if (p.a_input == 1) {
            tile_of_rows(to, p.a + row * p.a_row + at, p.a_row, rows, inputs);
          } else {
            tile_of_columns(to, p.a + row * p.a_row + at, p.a_input, rows, inputs);
          }
        }
  }
}

}  // namespace
}  // namespace flextron
