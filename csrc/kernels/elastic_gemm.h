// The GEMM of the ops on a CPU, float accumulation: what elastic_linear's and elastic_mlp's layers are made
// of there.
//
//   y[m, ob, n] = bias[ob, n] + scale[ob, n] * sum_{ib, i < inputs_m} a[m, ib, i] * B[ob, n, ib, i]
//   n < features_m. Hidden: y[m, n] = act(gate sum) * (up sum), both of this form; act(sum) without a gate.
//
// Features are made in panels of kPanel. A sum is made of chains of kChainInputs products, each chain added
// from zero in order of i and the chains in order: neither the rows beside a row, nor how many, nor a prefix
// that is cut off, nor the number of threads changes a bit of it. Weights lie in one of three layouts:
//
//   panels   [ob][panel][words of all blocks' inputs][kPanel][4 bytes], contiguous: a word of four bytes
//   holds
//            `together` inputs of a feature (1 float, 2 of 16 bits, 4 int8, 8 int4). The last panel and each
//            block's last word, or group of inputs, are filled up. Prefixes of features and of inputs are
//            both contiguous. The panels of a gate and an up projection alternate, the gate's first. Beside
//            quantised activations a slice of the inputs of all panels comes before the next slice, as
//            group_place() says
//   rows     [ob * out_stride + n][input], rows weight_stride apart: a plain weight. Few rows are dot
//            products, whose chains run through the lanes of a vector: the same promise, but bits of their
//            own
//   columns  [input][ob * out_stride + n], rows weight_stride apart: a plain weight for its input's gradient
#pragma once

#include <cstdint>

#include "kernels/elastic_mlp.h"

namespace flextron {

constexpr int64_t kPanel = 16;
// Shorter chains lose less to rounding; 256 inputs of a panel as floats are 16 KiB, half of an L1 cache.
constexpr int64_t kChainInputs = 256;

// Rows that share each load of a weight: as many as leave room for their sums in the registers, of which
// AVX-512 and NEON have 32, AVX2 and SSE2 16.
#ifdef __aarch64__
constexpr bool kIsArm = true;
#else
constexpr bool kIsArm = false;
#endif
constexpr int64_t gemm_sum_registers(int64_t vector_bytes) { return vector_bytes == 64 || kIsArm ? 24 : 12; }
constexpr int64_t gemm_group_rows(int64_t vector_bytes) {
  const int64_t panel_vectors = kPanel * 4 / vector_bytes,
                fit = gemm_sum_registers(vector_bytes) / panel_vectors;
  return fit > 12 ? 12 : fit;
}

// Up to here a plain weight's rows are read as they lie, by dot products; beyond, they are turned into panels
// on the way to the L1 cache.
constexpr int64_t kDotRows = 8;
// The same of pairs, where dot products multiply them.
constexpr int64_t kPairsDotRows = 32;

// Rows a pass over the panels takes: as many as keep their activations in the L2 cache (384 KiB of it), but
// enough of them to be worth widening a panel for.
constexpr int64_t kBlockRows = 256;
inline int64_t gemm_block_rows(int64_t inputs) {
  const int64_t rows = 98304 / (inputs > 0 ? inputs : 1);
  return rows < 96 ? 96 : rows > kBlockRows ? kBlockRows : rows;
}

// Where activations are integers of 8 bits, so many inputs of a row share a scale. An int4 weight is 0 to 15,
// and as many inputs of a feature share a scale and a least value:
//
//   a[m, i] = s[m, g] q[m, i]    i in group g, s = max |a| / 127, q = round(a * (127 / max |a|))
//   int8: y[m, n] += s[m, g] sum_i q[m, i] w[n, i]; scale[n] as above
//   int4: y[m, n] += s[m, g] scale[n, g] sum_i q[m, i] (w[n, i] - 8)
//                    + (least[n, g] + 8 scale[n, g]) (s[m, g] sum_i q[m, i])
//
// in order of the groups; a sum of integers is exact. Only inputs that a row uses are in its group; one whose
// largest is below kLeastScaled counts as zeros.
constexpr int64_t kGroupInputs = 32;
constexpr float kLeastScaled = 0x1p-100f;

// A slice of the groups of inputs of all panels comes before the next slice, so that a prefix of the inputs
// is read from end to end but for its last slice: behind a panel's inputs, where some are left out, memory
// goes on elsewhere, which costs as much as reading another 2 KiB. Slices have some 16 groups, as equal as
// can be.
constexpr int64_t kMostSliceGroups = 24;
inline int64_t slice_groups(int64_t groups) {  // of a panel with so many
  const int64_t slices = groups < kMostSliceGroups ? 1 : (groups + 8) / 16;
  return (groups + slices - 1) / slices;
}
// Where a group of a panel is among an output block's, of so many panels with so many groups each.
inline int64_t group_place(int64_t panel, int64_t group, int64_t panels, int64_t groups) {
  const int64_t slice = slice_groups(groups), first = group / slice * slice, left = groups - first;
  return first * panels + panel * (left < slice ? left : slice) + group - first;
}

enum class GemmDtype : int64_t { kFloat, kBf16, kFp16, kInt8, kInt4 };
enum class GemmLayout : int64_t { kPanels, kRows, kColumns };

// Rows [row, row + rows), at most gemm_group_rows: `inputs` of each input block, `features` of each output
// block.
struct GemmGroup {
  int64_t row, rows, inputs, features;
  // Of pairs: where its rows begin among the tiles of activations, and among the tiles of rows of its block.
  // Of quantised activations: where they begin among the groups of inputs; nothing.
  int64_t tile, row_tile;
};

// A group of inputs of a row as integers.
struct QuantisedInputs {
  int8_t q[kGroupInputs];
  float scale;
  float scaled_sum;  // of q, times the scale; for int4
  int32_t start;     // of a sum of products: what makes up for the weights' being unsigned
};
constexpr int64_t kQuantisedGroupRows = 16;
inline int64_t input_groups(int64_t inputs) { return (inputs + kGroupInputs - 1) / kGroupInputs; }

// Rows of a group, and tiles of rows of a block of groups, of pairs. A block's activations, 2 bytes each,
// stay in the L2 cache beside the weights (576 KiB of them), but there are enough of them to be worth turning
// a panel into pairs for.
constexpr int64_t kPairsGroupRows = 32;
constexpr int64_t kPairsBlockTiles = 32;
inline int64_t pairs_block_tiles(int64_t inputs) {
  const int64_t tiles = 18432 / (inputs > 0 ? inputs : 1);
  return tiles < 16 ? 16 : tiles > kPairsBlockTiles ? kPairsBlockTiles : tiles;
}
inline int64_t row_tiles(const GemmGroup& group) { return (group.rows + 15) / 16; }
inline int64_t input_tiles(int64_t inputs) { return (inputs + 31) / 32; }

struct ElasticGemmParams {
  const float* a;  // [row][in block][input]: a[row * a_row + block * a_block + input * a_input]
  int64_t a_row, a_block, a_input;
  const GemmGroup* groups;    // in order of rows; inputs and features never rise
  const int64_t* row_blocks;  // [row_block_count + 1]: the groups of a block of rows
  int64_t row_block_count;

  // Whether products are made of pairs of inputs, by a matrix unit or dot products: activations and weights
  // are rounded to bfloat16, and the sums are made as amx.h or pairs.h says, in order of the inputs. `tiles`:
  // the activations as elastic_gemm_tiles puts them, [group][in block][32 inputs][16 rows][16][32].
  bool pairs;
  // Whether activations are integers, weights in panels of int8 or int4. `tiles`: the activations as
  // elastic_gemm_quantise puts them, [group][in block][group of inputs][row] of QuantisedInputs.
  bool quantised;
  void* tiles;
  // Where not null, the activations before that, bfloat16 numbers, in place of `a`; x_order: row -> row of x,
  // or null.
  const void* x;
  const int64_t* x_order;
  // Where not null, hidden neurons become the next GEMM's activations: its groups, of the same rows as these,
  // and y its tiles.
  const GemmGroup* y_groups;

  GemmLayout layout;
  bool dots;               // kRows: the rows of all groups are so few that they are dot products
  GemmDtype weight_dtype;  // int8, int4: panels alone, with scales
  // Panels: one. Rows: the gate and the up projection where there is a gate. Columns: those of the two input
  // blocks where each has its own, in_stride 0.
  const void* weight[2];
  int64_t weight_stride;         // elements; panels: unused
  int64_t in_blocks, in_stride;  // input blocks, and how many inputs apart in the weight
  int64_t out_blocks;
  int64_t out_stride;   // of an output block: in panels (a gate's counted), or in features of a plain weight
  int64_t features;     // of a block, the widest row's
  const float* scales;  // as the panels, [..][kPanel]; null: 1
  const void* group_scales;  // int4: as the panels, [2][kPanel] of fp16 for each group: scales, least values

  bool hidden, gated;
  Activation activation;  // hidden
  const void*
      bias[2];  // [ob * bias_block + n], the dtype of `io`; null: 0. The gate's and the up projection's
  int64_t bias_block;
  GemmDtype io;  // of bias and y; hidden: y is float
  void* y;       // [row][ob][n]: y[row * y_row + ob * y_block + n]
  int64_t y_row, y_block;
  const int64_t* order;  // row -> row of y; null: the same

  int64_t strips() const { return (features + kPanel - 1) / kPanel; }  // of a block: panels, or pairs of them
  int64_t items() const { return row_block_count * out_blocks * strips(); }
};

// Rows of x as floats.
struct GemmRowsParams {
  const void* x;  // rows x_stride apart, innermost contiguous
  GemmDtype dtype;
  const int64_t* order;  // row of `to` -> row of x; null: the same
  float* to;
  int64_t columns, x_stride, to_stride;
};

// Items [begin, end): an item is a panel (of a gated layer: both its panels) of one block of rows. What items
// write does not overlap. Weights of 16 bits are compiled apart.
#define FLEXTRON_DECLARE_ELASTIC_GEMM(isa)                                               \
  void elastic_gemm_##isa(const ElasticGemmParams& p, int64_t begin, int64_t end);       \
  void elastic_gemm_16bit_##isa(const ElasticGemmParams& p, int64_t begin, int64_t end); \
  void elastic_gemm_rows_##isa(const GemmRowsParams& p, int64_t begin, int64_t end);
FLEXTRON_DECLARE_ELASTIC_GEMM(cpu)
FLEXTRON_DECLARE_ELASTIC_GEMM(avx2)
FLEXTRON_DECLARE_ELASTIC_GEMM(avx512)
#undef FLEXTRON_DECLARE_ELASTIC_GEMM

// The same of pairs, with dot products and with a matrix unit; and before it the activations of groups
// [begin, end), put into p.tiles.
#define FLEXTRON_DECLARE_ELASTIC_GEMM_OF_PAIRS(isa)                                \
  void elastic_gemm_##isa(const ElasticGemmParams& p, int64_t begin, int64_t end); \
  void elastic_gemm_tiles_##isa(const ElasticGemmParams& p, int64_t begin, int64_t end);
FLEXTRON_DECLARE_ELASTIC_GEMM_OF_PAIRS(avx512_bf16)
FLEXTRON_DECLARE_ELASTIC_GEMM_OF_PAIRS(amx)
FLEXTRON_DECLARE_ELASTIC_GEMM_OF_PAIRS(arm_bf16)  // panels of bfloat16 and int8 alone
#undef FLEXTRON_DECLARE_ELASTIC_GEMM_OF_PAIRS

// The same of quantised activations.
#define FLEXTRON_DECLARE_ELASTIC_GEMM_QUANTISED(isa)                                         \
  void elastic_gemm_quantised_##isa(const ElasticGemmParams& p, int64_t begin, int64_t end); \
  void elastic_gemm_quantise_##isa(const ElasticGemmParams& p, int64_t begin, int64_t end);
FLEXTRON_DECLARE_ELASTIC_GEMM_QUANTISED(cpu)
FLEXTRON_DECLARE_ELASTIC_GEMM_QUANTISED(avx2)
FLEXTRON_DECLARE_ELASTIC_GEMM_QUANTISED(avx512)
FLEXTRON_DECLARE_ELASTIC_GEMM_QUANTISED(avx512_vnni)
FLEXTRON_DECLARE_ELASTIC_GEMM_QUANTISED(arm_dot)
FLEXTRON_DECLARE_ELASTIC_GEMM_QUANTISED(
    amx)  // reads up to kQuantisedGroupRows - 1 rows behind the last of p.tiles
#undef FLEXTRON_DECLARE_ELASTIC_GEMM_QUANTISED

}  // namespace flextron
