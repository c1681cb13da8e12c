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

void pairs_of_rows(bf16* to, const bf16* from, i64 stride, i64 features, i64 K) {
  constexpr i64 kAtOnce = 2 * kPanel;
  for (i64 k = 0; k < K; k += kAtOnce) {
    Words rows[kPanel];
    for (i64 n = 0; n < kPanel; ++n) {
      rows[n] = Words{};
      if (n < features && k + kAtOnce <= K)
        rows[n] = load_loose<uint32_t>(from + n * stride + k);
      else if (n < features)
        __builtin_memcpy(&rows[n], from + n * stride + k, (K - k) * sizeof(bf16));
    }
    transpose_words(rows);
    for (i64 pair = 0; pair < smaller(kPanel, (K - k + 1) / 2); ++pair)
      store_words(to + (k + 2 * pair) * kPanel, rows[pair]);
  }
}

// One input of `features` features, the others 0, as floats whose lower halves are 0 where W is bf16.
template <class W>
inline Vec<float> column_of(const W* from, i64 features) {
  if (features == kPanel) return widened(from);
  float wide[kPanel] = {};
  for (i64 n = 0; n < features; ++n) wide[n] = widen(from[n]);
  return load_loose<float>(wide);
}
template <class W>
void pairs_of_columns(bf16* to, const W* from, i64 stride, i64 features, i64 K) {
  for (i64 k = 0; k < K; k += 2) {
    const Vec<float> odd = k + 1 < K ? column_of(from + (k + 1) * stride, features) : Vec<float>{};
    store_words(to + k * kPanel, pairs_of(column_of(from + k * stride, features), odd));
  }
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
    for (i64 block = 0; block < p.in_blocks; ++block)
      for (i64 k = 0; k < first->inputs; k += kChunk) {
        const i64 inputs = smaller(kChunk, first->inputs - k);
        const bf16* b = filled[0];
        i64 b_panel = kChunk * kPanel;
        if constexpr (kInPairs)
          if (p.layout == GemmLayout::kPanels)
            b = this->panel_of(0, block, k), b_panel = this->panel_stride();
        if (b == filled[0])
          for (i64 i = 0; i < count; ++i) fill(filled[i], i, block, k, inputs);
        typename Unit::Chunk chunk{b, b_panel, count};
        for (const GemmGroup* g = first; g < last && this->uses(*g, k); ++g) {
          chunk.multiply(*g, smaller(kChunk, g->inputs - k), rows_of(*g, block, k), sums_of(*g), c_panel,
                         block == 0 && k == 0);
          if (block + 1 == p.in_blocks && k + kChunk >= g->inputs) finish(*g, affine, sums_of(*g));
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
void tile_of_columns(bf16* to, const float* a, i64 a_input, i64 rows, i64 inputs) {
  Words words[kTileRows];
  for (i64 pair = 0; pair < kTileInputs / 2; ++pair) {
    const i64 k = 2 * pair;
    const Vec<float> even = k < inputs ? column_of(a + k * a_input, rows) : Vec<float>{};
    const Vec<float> odd = k + 1 < inputs ? column_of(a + (k + 1) * a_input, rows) : Vec<float>{};
    words[pair] = pairs_of(even, odd);
  }
  transpose_words(words);
  for (i64 m = 0; m < kTileRows; ++m) store_words(to + m * kTileInputs, words[m]);
}
// Row m has those from x[m] on, which are bfloat16 numbers.
void tile_of_x(bf16* to, const bf16* const* x, i64 rows, i64 inputs) {
  for (i64 m = 0; m < kTileRows; ++m) {
    Words row{};
    if (m < rows) __builtin_memcpy(&row, x[m], inputs * sizeof(bf16));
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
          if (p.x) {
            const bf16* x[kTileRows];
            for (i64 i = 0; i < rows; ++i)
              x[i] =
                  static_cast<const bf16*>(p.x) + (p.x_order ? p.x_order[row + i] : row + i) * p.a_row + at;
            tile_of_x(to, x, rows, inputs);
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
