// The loops of elastic_gemm over activations of eight bits, included once for each instruction set; vector.h
// says why all is anonymous.
//
// A tile is up to kTileOfRows rows by a panel: a group of its inputs is turned into words of bytes once,
// multiplied by each row's, and the sums are scaled. A slice of a panel stays in the L1 cache while the rows
// of a block pass by it; a slice of all panels that a thread has comes before the next slice, as memory has
// them.
#pragma once

#include <utility>

#include "kernels/elastic_gemm_block.h"
#include "kernels/fours.h"

namespace flextron {
namespace {

// Rows whose products are added in turn, to hide the latency of a dot product: as many as find registers.
template <class W>
constexpr int kSideBySide = kVectorBytes == 64 && !std::is_same_v<W, int4> ? 4 : 2;
#ifdef __ARM_FEATURE_DOTPROD
constexpr i64 kTileOfRows = 4;  // 16 registers of sums, 8 of weights, 3 for each row side by side
#else
constexpr i64 kTileOfRows = kVectorBytes == 64 ? 16 : kVectorBytes == 32 ? 4 : 2;
#endif
static_assert(kQuantisedGroupRows % kTileOfRows == 0);
// Panels side by side where there is one row, whose chains of dot products would be waited for.
constexpr int kOneRowPanels = kVecs == 1 ? 4 : 1;

template <class W>
constexpr i64 kInputsOfWord = std::is_same_v<W, int4> ? 8 : 4;
template <class W>
constexpr i64 kGroupBytes = kGroupInputs / kInputsOfWord<W> * 4 * kPanel;  // of a panel

// The words of four inputs each of vector v of a panel's features, of a group.
template <class W>
inline void words_of_group(const W* from, int v, Words (&to)[kWords]) {
  const char* const at = reinterpret_cast<const char*>(from) + v * kWide * 4;
  if constexpr (std::is_same_v<W, int4>) {
#pragma GCC unroll 4
    for (int i = 0; i < kWords / 2; ++i) {
      const Words w = load_loose<uint32_t>(at + i * kPanel * 4);
      to[2 * i] = w & 0x0F0F0F0Fu;
      to[2 * i + 1] = (w >> 4) & 0x0F0F0F0Fu;
    }
  } else {
#pragma GCC unroll 8
    for (int i = 0; i < kWords; ++i) to[i] = FoursOf<W>::weights(load_loose<uint32_t>(at + i * kPanel * 4));
  }
}

// Groups that lie side by side in each panel of a batch: of an input block the first `count` from `first` on.
struct GroupRun {
  i64 block, first, count;
  i64 place, apart;  // of the first panel's among all groups, and how many behind them the next one's are
};

// The panels of some strips of one block of rows and of outputs, and the order in which their memory is read:
// run by run, of each all panels.
template <class W>
struct QuantisedBatch {
  const ElasticGemmParams& p;
  const GemmGroup *first, *last;  // of the block of rows
  i64 begin, count;               // panels, of all output blocks', and how many
  i64 out_block;
  i64 together;  // panels that are multiplied side by side, as long as there are so many
  i64 most = input_groups(first->inputs);  // groups of an input block that a row uses

  GroupRun run_at(i64 block, i64 group) const {
    const i64 of_block = p.in_stride / kGroupInputs, groups = p.in_blocks * of_block;
    const i64 at = block * of_block + group, slice = slice_groups(groups), before = out_block * p.out_stride;
    const auto place = [&](i64 panel) { return group_place(panel - before, at, p.out_stride, groups); };
    return {block, group, smaller(slice - at % slice, most - group), before * groups + place(begin),
            place(begin + 1) - place(begin)};
  }
  // Behind a run; past the last one the block is p.in_blocks.
  GroupRun run_behind(const GroupRun& run) const {
    const i64 next = run.first + run.count;
    if (next < most) return run_at(run.block, next);
    return run.block + 1 < p.in_blocks ? run_at(run.block + 1, 0) : GroupRun{p.in_blocks, 0, 0, 0, 0};
  }
  const W* weights(i64 place) const { return static_cast<const W*>(p.weight[0]) + place * kGroupBytes<W>; }
  const fp16* scales(i64 place) const {  // of int4
    if constexpr (!std::is_same_v<W, int4>) return nullptr;
    return static_cast<const fp16*>(p.group_scales) + 2 * place * kPanel;
  }
};

// Asks memory for the groups of a batch, in the order in which they are multiplied, some time before they
// are: memory takes as long to answer as 4 KiB take to be multiplied, and what a processor asks for by itself
// loses its way where inputs are left out.
template <class W>
class Ahead {
 public:
  explicit Ahead(const QuantisedBatch<W>& batch) : batch_(batch), run_(batch.run_at(0, 0)) {
    go();
    ask(4096 / kGroupBytes<W>);
  }

  // For as many groups more.
  void ask(i64 groups) {
    for (wanted_ += groups; wanted_ > 0 && left_ > 0; wanted_ -= panels_) {
      for (i64 panel = 0; panel < panels_; ++panel) {
        const char* const weights =
            reinterpret_cast<const char*>(weights_ + panel * run_.apart * kGroupBytes<W>);
#pragma GCC unroll 8
        for (i64 line = 0; line < kGroupBytes<W>; line += kLine) __builtin_prefetch(weights + line);
        if constexpr (std::is_same_v<W, int4>) __builtin_prefetch(scales_ + 2 * panel * run_.apart * kPanel);
      }
      weights_ += kGroupBytes<W>;
      if constexpr (std::is_same_v<W, int4>) scales_ += 2 * kPanel;
      if (--left_ == 0) next();
    }
  }

 private:
  void next() {
    slot_ += panels_;
    if (slot_ == batch_.count) {
      slot_ = 0;
      run_ = batch_.run_behind(run_);
    }
    if (run_.block < batch_.p.in_blocks) go();
  }
  void go() {
    left_ = run_.count;
    panels_ = batch_.count - slot_ < batch_.together ? 1 : batch_.together;
    const i64 place = run_.place + slot_ * run_.apart;
    weights_ = batch_.weights(place);
    scales_ = batch_.scales(place);
  }

  const QuantisedBatch<W>& batch_;
  GroupRun run_;
  i64 slot_ = 0, wanted_ = 0;
  i64 panels_, left_;  // side by side, and groups of each that were not asked for
  const W* weights_;
  const fp16* scales_;
};

// A sum to which a row's products of a group are added, whose integers are `total`.
template <class W>
inline Vec<float> with_group(Vec<float> sum, Integers total, const QuantisedInputs& a, Vec<float> scale,
                             Vec<float> middle) {
  const Vec<float> products = __builtin_convertvector(total, Vec<float>);
  if constexpr (std::is_same_v<W, int4>) return sum + products * (scale * a.scale) + middle * a.scaled_sum;
  return sum + products * a.scale;
}

// sum[rows][v] += the products of a group, of vector v of a panel's features.
template <class W, int rows>
inline void add_group(const QuantisedInputs* a, const Words (&w)[kWords], Vec<float> scale, Vec<float> middle,
                      Vec<float> (*sum)[kVecs], int v) {
  constexpr int count = smaller(kSideBySide<W>, rows);
  [&]<int... i, int... j>(std::integer_sequence<int, i...>, std::integer_sequence<int, j...>)
      __attribute__((always_inline)) {
        FoursOf<W> four[] = {FoursOf<W>(a[i])...};
        const auto add = [&]<int word>(std::integral_constant<int, word>) __attribute__((always_inline)) {
          (four[i].template add<word>(w[word], a[i]), ...);
        };
        (add(std::integral_constant<int, j>{}), ...);
        ((sum[i][v] = with_group<W>(sum[i][v], four[i].total(), a[i], scale, middle)), ...);
      }(std::make_integer_sequence<int, count>{}, std::make_integer_sequence<int, kWords>{});
  if constexpr (rows > count) add_group<W, rows - count>(a + count, w, scale, middle, sum + count, v);
}

// c[rows][kPanel] += of a run of one panel. a: [group][a_rows]. `ahead`: null where the run was read before.
template <class W, int rows>
void quantised_tile(const QuantisedInputs* a, i64 a_rows, i64 groups, const W* b, const fp16* scales,
                    float* c, Ahead<W>* ahead) {
  constexpr bool is_int4 = std::is_same_v<W, int4>;
  const char* panel = reinterpret_cast<const char*>(b);
  Vec<float> sum[rows][kVecs];
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) sum[i][v] = load_loose<float>(c + i * kPanel + v * kWide);
  for (i64 g = 0; g < groups; ++g, a += a_rows, panel += kGroupBytes<W>) {
    if (ahead) ahead->ask(1);
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) {
      Words w[kWords];
      words_of_group(reinterpret_cast<const W*>(panel), v, w);
      Vec<float> scale{}, middle{};
      if constexpr (is_int4) {
        scale = scales_at(scales + 2 * g * kPanel + v * kWide);
        middle = scales_at(scales + (2 * g + 1) * kPanel + v * kWide) + 8.0f * scale;
      }
      add_group<W, rows>(a, w, scale, middle, sum, v);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) store_loose(c + i * kPanel + v * kWide, sum[i][v]);
}

// The same for `count` rows, which only the caller of the caller knows.
template <class W, int rows = kTileOfRows>
inline void quantised_tiles(i64 count, const QuantisedInputs* a, i64 a_rows, i64 groups, const W* b,
                            const fp16* scales, float* c, Ahead<W>* ahead) {
  if constexpr (rows > 1)
    if (count < rows) return quantised_tiles<W, rows - 1>(count, a, a_rows, groups, b, scales, c, ahead);
  quantised_tile<W, rows>(a, a_rows, groups, b, scales, c, ahead);
}

// The same of one row and some panels, their groups `apart` and sums kPanel.
template <class W, int panels>
void one_row_tile(const QuantisedInputs* a, i64 groups, const W* b, const fp16* scales, i64 apart, float* c,
                  Ahead<W>& ahead) {
  constexpr bool is_int4 = std::is_same_v<W, int4>;
  Vec<float> sum[panels];
#pragma GCC unroll 4
  for (int p = 0; p < panels; ++p) sum[p] = load_loose<float>(c + p * kPanel);
  for (i64 g = 0; g < groups; ++g, ++a) {
    ahead.ask(panels);
    [&]<int... p, int... j>(std::integer_sequence<int, p...>, std::integer_sequence<int, j...>)
        __attribute__((always_inline)) {
          Words w[panels][kWords];
          (words_of_group(b + (p * apart + g) * kGroupBytes<W>, 0, w[p]), ...);
          FoursOf<W> four[] = {((void)p, FoursOf<W>(*a))...};
          const auto add = [&]<int word>(std::integral_constant<int, word>) __attribute__((always_inline)) {
            (four[p].template add<word>(w[p][word], *a), ...);
          };
          (add(std::integral_constant<int, j>{}), ...);
          const auto end = [&](int panel, Integers total) __attribute__((always_inline)) {
            Vec<float> scale{}, middle{};
            if constexpr (is_int4) {
              const fp16* const at = scales + 2 * (panel * apart + g) * kPanel;
              scale = scales_at(at);
              middle = scales_at(at + kPanel) + 8.0f * scale;
            }
            sum[panel] = with_group<W>(sum[panel], total, *a, scale, middle);
          };
          (end(p, four[p].total()), ...);
        }(std::make_integer_sequence<int, panels>{}, std::make_integer_sequence<int, kWords>{});
  }
#pragma GCC unroll 4
  for (int p = 0; p < panels; ++p) store_loose(c + p * kPanel, sum[p]);
}

// A run of one panel, and the sums of a block of rows, [row][kPanel].
template <class W>
struct QuantisedPanel {
  const ElasticGemmParams& p;
  const GemmGroup *first, *last;  // of the block of rows, as far as they have features of the panel
  GroupRun run;
  const W* weights;
  const fp16* scales;
  float* sums;
  Ahead<W>& ahead;

  // The groups of the run that rows use, and their inputs.
  i64 used(const GemmGroup& g) const { return smaller(run.count, input_groups(g.inputs) - run.first); }
  const QuantisedInputs* inputs_of(const GemmGroup& g) const {
    const i64 before = run.block * input_groups(g.inputs) + run.first;
    return static_cast<const QuantisedInputs*>(p.tiles) + g.tile + before * g.rows;
  }
  float* sums_of(const GemmGroup& g) const { return sums + (g.row - first->row) * kPanel; }

  // Of one group of rows, `most` at a time.
  template <int most>
  void multiply(const GemmGroup& g) const {
    for (i64 row = 0; row < g.rows; row += most)
      quantised_tiles<W, most>(smaller(i64(most), g.rows - row), inputs_of(g) + row, g.rows, used(g), weights,
                               scales, sums_of(g) + row * kPanel, &g == first && row == 0 ? &ahead : nullptr);
  }
};

// In dot products, all of it.
struct QuantisedDots {
  template <class W>
  static void multiply(const QuantisedPanel<W>& panel) {
    for (const GemmGroup* g = panel.first; g < panel.last && panel.used(*g) > 0; ++g)
      panel.template multiply<kTileOfRows>(*g);
  }
};

template <class Unit, class W>
void run_quantised_items(const ElasticGemmParams& p, i64 begin, i64 end) {
  constexpr i64 kSums = 2 * kBlockRows * kPanel;
  const i64 panels = p.gated ? 2 : 1, strips = (p.features + kPanel - 1) / kPanel;
  alignas(kLine) float sums[kSums];
  while (begin < end) {
    const i64 block = begin / strips;
    const Place at{block / p.out_blocks, block % p.out_blocks, begin % strips};
    const GemmGroup* const first = p.groups + p.row_blocks[at.row_block];
    const GemmGroup* const last = p.groups + p.row_blocks[at.row_block + 1];
    const i64 c_panel = (last[-1].row + last[-1].rows - first->row) * kPanel;
    const i64 count = smaller(smaller(kSums / (panels * c_panel), end - begin), strips - at.strip);
    const i64 together = c_panel == kPanel ? kOneRowPanels : 1;
    const QuantisedBatch<W> batch{
        p,       first, last, at.out_block * p.out_stride + at.strip * panels, count * panels, at.out_block,
        together};
    for (i64 i = 0; i < batch.count * c_panel; ++i) sums[i] = 0.0f;
    if (p.scales)  // a line of each panel, for which finish() would wait
      for (i64 i = 0; i < batch.count; ++i) __builtin_prefetch(p.scales + (batch.begin + i) * kPanel);
    if (first->inputs > 0) {
      Ahead<W> ahead(batch);
      for (GroupRun run = batch.run_at(0, 0); run.block < p.in_blocks; run = batch.run_behind(run)) {
        i64 slot = 0;
        if constexpr (kOneRowPanels > 1)
          for (; together > 1 && slot + together <= batch.count && first->features > 0; slot += together) {
            const i64 place = run.place + slot * run.apart;
            const i64 before = run.block * batch.most + run.first;
            one_row_tile<W, kOneRowPanels>(
                static_cast<const QuantisedInputs*>(p.tiles) + first->tile + before, run.count,
                batch.weights(place), batch.scales(place), run.apart, sums + slot * kPanel, ahead);
          }
        for (; slot < batch.count; ++slot) {
          const GemmGroup* used = last;
          while (used > first && used[-1].features <= (at.strip + slot / panels) * kPanel) --used;
          const i64 place = run.place + slot * run.apart;
          Unit::template multiply<W>(
              {p, first, used, run, batch.weights(place), batch.scales(place), sums + slot * c_panel, ahead});
        }
      }
    }
    for (i64 i = 0; i < count; ++i)
      finish(p, {at.row_block, at.out_block, at.strip + i}, sums + i * panels * c_panel, c_panel);
    begin += count;
  }
}

template <class Unit>
void run_quantised(const ElasticGemmParams& p, i64 begin, i64 end) {
  if (p.weight_dtype == GemmDtype::kInt4) return run_quantised_items<Unit, int4>(p, begin, end);
  run_quantised_items<Unit, int8>(p, begin, end);
}

// -- activations --

// The largest of a vector's lanes and their sum: by shuffles, which compilers do not make of loops.
inline uint32_t largest_of(Words w) {
#if defined(__AVX512F__) && FLEXTRON_VECTOR_BYTES == 64
  return _mm512_reduce_max_epu32((__m512i)w);
#else
  uint32_t largest = 0;
  for (i64 i = 0; i < kWide; ++i) largest = larger(largest, uint32_t(w[i]));
  return largest;
#endif
}
inline int32_t total_of(Integers x) {
#if defined(__AVX512F__) && FLEXTRON_VECTOR_BYTES == 64
  return _mm512_reduce_add_epi32((__m512i)x);
#else
  int32_t total = 0;
  for (i64 i = 0; i < kWide; ++i) total += x[i];
  return total;
#endif
}

// [0, inputs) of a row's group, at most kGroupInputs; the rest is 0. `zero`: FoursOf's, of the weights.
inline void quantise_group(const float* from, i64 inputs, int32_t zero, QuantisedInputs& to) {
  float x[kGroupInputs];
  if (inputs == kGroupInputs) {
    __builtin_memcpy(x, from, sizeof(x));
  } else {
    __builtin_memset(x, 0, sizeof(x));
    __builtin_memcpy(x, from, inputs * sizeof(float));
  }
  // As integers: a NaN is larger than all numbers, and comes through.
  Words largest{};
#pragma GCC unroll 8
  for (i64 i = 0; i < kGroupInputs; i += kWide) {
    const Words size = load_loose<uint32_t>(x + i) & 0x7FFFFFFFu;
    largest = size > largest ? size : largest;
  }
  const float most = __builtin_bit_cast(float, largest_of(largest));
  const float factor = most < kLeastScaled ? 0.0f : 127.0f / most;
  to.scale = most < kLeastScaled ? 0.0f : most / 127.0f;
#pragma GCC unroll 8
  for (i64 i = 0; i < kGroupInputs; i += kWide) store_loose(x + i, load_loose<float>(x + i) * factor);
  asm("" ::"r"(x) : "memory");  // or product and sum would be one operation, of another rounding
  Integers sum{};
  typedef int8_t Bytes __attribute__((vector_size(kWide), aligned(1), may_alias));
#pragma GCC unroll 8
  for (i64 i = 0; i < kGroupInputs; i += kWide) {
    const Vec<float> shift = Vec<float>{} + 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    const Words q = (Words)(load_loose<float>(x + i) + shift) - (Words)shift;
    const Integers byte =
        (Integers)(q << 24) >> 24;  // of what is no number some byte: its scale is none either
    *reinterpret_cast<Bytes*>(to.q + i) = __builtin_convertvector(byte, Bytes);
    sum += byte;
  }
  const int32_t whole = total_of(sum);
  to.scaled_sum = to.scale * float(whole);
  to.start = -zero * whole;
}

// Of groups of rows [begin, end).
void quantise_rows(const ElasticGemmParams& p, i64 begin, i64 end) {
  const int32_t zero = p.weight_dtype == GemmDtype::kInt4 ? FoursOf<int4>::kZero : FoursOf<int8>::kZero;
  for (const GemmGroup* g = p.groups + begin; g < p.groups + end; ++g) {
    QuantisedInputs* to = static_cast<QuantisedInputs*>(p.tiles) + g->tile;
    for (i64 block = 0; block < p.in_blocks; ++block)
      for (i64 k = 0; k < g->inputs; k += kGroupInputs)
        for (i64 row = g->row; row < g->row + g->rows; ++row) {
          const float* const from = p.a + row * p.a_row + block * p.a_block + k;
          quantise_group(from, smaller(kGroupInputs, g->inputs - k), zero, *to++);
        }
  }
}

}  // namespace
}  // namespace flextron

#define FLEXTRON_DEFINE_ELASTIC_GEMM_QUANTISED(isa)                                           \
  void elastic_gemm_quantised_##isa(const ElasticGemmParams& p, int64_t begin, int64_t end) { \
    run_quantised<QuantisedDots>(p, begin, end);                                              \
  }                                                                                           \
  void elastic_gemm_quantise_##isa(const ElasticGemmParams& p, int64_t begin, int64_t end) {  \
    quantise_rows(p, begin, end);                                                             \
  }
