// elastic_gemm over activations of eight bits, with a matrix unit (Intel AMX), chosen at run time: tiles of
// up to 16 rows by a panel. A group of inputs is one product of tiles, whose integers become floats in
// vectors; fewer rows are dot products. The sums are the same, bit for bit.
//
// 32 inputs share a scale, so that a product fills half of its tiles. Cycles on paper (Sapphire Rapids) of 16
// rows by 16 features by 32 inputs, int8 and int4: the unit 16; loads, of tiles, of their integers and of
// scales, 32 and 40; vectors 16 and 32; side by side, so some 32 and 40. Dot products: 128 of them at 2 a
// cycle and the same vectors, 80 and 96, 5 or 6 a row. Not measured.
#define FLEXTRON_VNNI  // also where the instruction is emulated
#include "kernels/amx.h"
#include "kernels/elastic_gemm_quantised.h"

namespace flextron {
namespace {

static_assert(kVecs == 1 && kTileRows == kPanel && kQuantisedGroupRows == kTileRows);

constexpr i64 kUnitRows = 8;                       // so many of a group go to the unit
constexpr i64 kGroupTile = kGroupInputs * kPanel;  // bytes

// Sums, activations and weights, two of each: a product begins while the one before becomes floats.
constexpr TileShape kOfSums{}, kOfInputs{kTileRows, kGroupInputs}, kOfWeights{kWords, kTileRowBytes};
constexpr TileShape kShapes[8] = {kOfSums, kOfSums, kOfInputs, kOfInputs, kOfWeights, kOfWeights};

// Up to kMostSliceGroups of a panel's groups as tiles.
template <class W>
class GroupTiles {
 public:
  GroupTiles(const W* b, const fp16* scales, i64 groups) {
    if constexpr (std::is_same_v<W, int8>) {
      tiles_ = reinterpret_cast<const int8_t*>(b);  // as they lie
    } else {
      for (i64 g = 0; g < groups; ++g) {
        Words w[kWords];
        words_of_group(b + g * kGroupBytes<W>, 0, w);
        for (i64 i = 0; i < kWords; ++i)
          store_words(signed_ + g * kGroupTile + i * kTileRowBytes,
                      (Words)((Bytes)w[i] - int8_t(FoursOf<W>::kZero)));
        const Vec<float> scale = scales_at(scales + 2 * g * kPanel);
        store_loose(scale_[g], scale);
        store_loose(middle_[g], scales_at(scales + (2 * g + 1) * kPanel) + 8.0f * scale);
      }
    }
  }

  const int8_t* tile(i64 g) const { return tiles_ + g * kGroupTile; }
  Vec<float> scale(i64 g) const { return load_loose<float>(scale_[g]); }
  Vec<float> middle(i64 g) const { return load_loose<float>(middle_[g]); }

 private:
  typedef int8_t Bytes __attribute__((vector_size(kTileRowBytes)));
  static constexpr i64 kMade = std::is_same_v<W, int8> ? 1 : kMostSliceGroups;

  alignas(kLine) int8_t signed_[kMade * kGroupTile];
  float scale_[kMade][kPanel], middle_[kMade][kPanel];
  const int8_t* tiles_ = signed_;
};

// c[rows][kPanel] += of `groups` groups. a: [group][rows].
template <class W>
void multiply(const QuantisedInputs* a, i64 rows, i64 groups, const GroupTiles<W>& b, float* c) {
  constexpr bool is_int4 = std::is_same_v<W, int4>;
  alignas(kLine) int32_t totals[2][kTileRows][kPanel];
  Vec<float> sum[kTileRows];
#pragma GCC unroll 16
  for (int i = 0; i < kTileRows; ++i) sum[i] = i < rows ? load_loose<float>(c + i * kPanel) : Vec<float>{};
  // Behind a group's last row come the next group's, or memory: sums of those are nobody's.
  const auto begin = [&]<int t>(std::integral_constant<int, t>, i64 g) __attribute__((always_inline)) {
    tile_zero<t>();
    tile_load<2 + t>(a + g * rows, sizeof(QuantisedInputs));
    tile_load<4 + t>(b.tile(g), kTileRowBytes);
    tile_dot_int8<t, 2 + t, 4 + t>();
  };
  const auto end = [&]<int t>(std::integral_constant<int, t>, i64 g) __attribute__((always_inline)) {
    tile_store<t>(totals[t], sizeof(totals[t][0]));
    Vec<float> scale{}, middle{};
    if constexpr (is_int4) scale = b.scale(g), middle = b.middle(g);
#pragma GCC unroll 16
    for (int i = 0; i < kTileRows; ++i)
      sum[i] = with_group<W>(sum[i], load_loose<int32_t>(totals[t][i]), a[g * rows + i], scale, middle);
  };
  constexpr std::integral_constant<int, 0> kEven;
  constexpr std::integral_constant<int, 1> kOdd;
  begin(kEven, 0);
  for (i64 g = 0; g < groups; g += 2) {
    if (g + 1 < groups) begin(kOdd, g + 1);
    end(kEven, g);
    if (g + 1 == groups) break;
    if (g + 2 < groups) begin(kEven, g + 2);
    end(kOdd, g + 1);
  }
#pragma GCC unroll 16
  for (int i = 0; i < kTileRows; ++i)
    if (i < rows) store_loose(c + i * kPanel, sum[i]);
}

bool on_unit(const GemmGroup& g) { return g.rows >= kUnitRows; }

struct Unit {
  template <class W>
  static void multiply(const QuantisedPanel<W>& panel) {
    i64 most = 0;
    for (const GemmGroup* g = panel.first; g < panel.last && panel.used(*g) > 0; ++g)
      if (on_unit(*g))
        most = larger(most, panel.used(*g));
      else
        panel.template multiply<kUnitRows - 1>(*g);
    if (most == 0) return;
    if (on_unit(*panel.first)) panel.ahead.ask(panel.run.count);
    const GroupTiles<W> b(panel.weights, panel.scales, most);
    for (const GemmGroup* g = panel.first; g < panel.last && panel.used(*g) > 0; ++g)
      if (on_unit(*g)) flextron::multiply(panel.inputs_of(*g), g->rows, panel.used(*g), b, panel.sums_of(*g));
  }
};

}  // namespace

void elastic_gemm_quantised_amx(const ElasticGemmParams& p, int64_t begin, int64_t end) {
  const GemmGroup* const last = p.groups + p.row_blocks[p.row_block_count];
  const GemmGroup* g = p.groups;
  while (g < last && !on_unit(*g)) ++g;
  if (g == last) return elastic_gemm_quantised_avx512_vnni(p, begin, end);
  const Tiles tiles(kShapes);
  run_quantised<Unit>(p, begin, end);
}

void elastic_gemm_quantise_amx(const ElasticGemmParams& p, int64_t begin, int64_t end) {
  quantise_rows(p, begin, end);
}

}  // namespace flextron
