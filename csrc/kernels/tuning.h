// Shape and dtype to kernel and tile: pure functions, host only. No number of a GPU's has been measured on
// one yet: each says what it was reasoned from.
#pragma once

#include <cstdint>

#include "kernels/elastic_linear.h"
#include "kernels/elastic_linear_tiles.h"

namespace flextron {

// What computes a GEMM on a GPU: weights streamed past at most kDecodeTokens tokens, tiles, or the vendor's
// GEMM on views, which extents that the host does not know rule out.
enum class Gemm { kDecode, kTile, kVendor };

// Ours for every shape: our results are equal bit for bit whatever the strides and the tokens beside them,
// which a vendor's choice of kernel by shape and stride does not promise.
inline Gemm preferred_gemm(int64_t T, int64_t element_size) {
  return element_size == 2 && T <= kDecodeTokens ? Gemm::kDecode : Gemm::kTile;
}

// Of at most kDecodeTokens tokens on sm_90, how many take the Hopper kernel where its copy engine can read
// the operands; the others stream the weights as on any GPU.
inline bool prefers_hopper_decode(int64_t T) { return T <= kDecodeTokens; }

// Rows of a tile of the portable kernel, 128 or 64. A mix of four extents wastes 6.8 % of 128-row tiles at
// 1024 rows and 31 % at 256 (computed); with fewer rows large tiles leave multiprocessors idle besides.
inline int elastic_linear_tile_rows(int64_t T) { return T <= 1024 ? 64 : 128; }

// A tile of the Hopper kernels: 128 x 256, 128 x 128 or 64 x 128, whichever lets the slowest multiprocessor
// pass over the smallest part of the result; the larger where equal, as it reads the fewest bytes for each
// product. 64 rows only as above: beyond, what larger tiles save in reading is worth more than an even share.
struct TileSides {
  int rows, columns;
};
inline TileSides hopper_tile_sides(int64_t T, int64_t columns, int64_t blocks, int multiprocessors) {
  constexpr TileSides kLargestFirst[] = {{128, 256}, {128, 128}, {64, 128}};
  TileSides best{};
  int64_t least = INT64_MAX;
  for (const TileSides& sides : kLargestFirst) {
    if (sides.rows < elastic_linear_tile_rows(T)) continue;
    const int64_t tiles = blocks * tiles_over(T, sides.rows) * tiles_over(columns, sides.columns);
    const int64_t passed = (tiles + multiprocessors - 1) / multiprocessors * sides.rows * sides.columns;
    if (passed < least) {
      least = passed;
      best = sides;
    }
  }
  return best;
}

// Whether a forward or a backward with plain weights on a CPU is ours or the vendor's GEMM on views. Measured
// on 2 cores of an AMD EPYC (Zen 3, AVX2), torch 2.13's time over ours. Forward, weights 1536 x 576 and
// 2048 x 2048, at 1, 8, 64 and 256 tokens: float32 1.2-1.5, 1.3-2.1, 1.1-1.2, 0.90-0.95; bfloat16 0.8-1.2,
// 3.3-4.0, 5.4-6.7, 7.1-7.5. Forward and backward of a gated MLP 576 x 1536, at 64 and 256 tokens: float32
// with the vendor's GEMM for ours 1.20, 0.99; bfloat16 17, 24.
inline bool cpu_prefers_own_gemm(int64_t T, int64_t element_size) { return element_size == 2 || T < 128; }

}  // namespace flextron
