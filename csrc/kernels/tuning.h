// Shape and dtype to kernel and tile: pure functions, host only. Each number says what it was measured on or
// reasoned from.
#pragma once

#include <cstdint>

#include "kernels/elastic_linear.h"
#include "kernels/elastic_linear_tiles.h"

namespace flextron {

// Whether a GEMM on a GPU streams the weights past at most kDecodeTokens tokens, or computes tiles. It is
// ours for every shape: our results are equal bit for bit whatever the strides and the tokens beside them,
// which cuBLAS, choosing a kernel by shape and stride, does not promise. Where the extents are the host's,
// tiles overtake the decode kernels: a gated MLP 4096 x 11008 at full width, three quarters, half and a
// quarter takes on an H200, at 32 tokens, 93, 79, 59, 39 us streamed and 105, 73, 53, 41 in tiles; at 64
// tokens 109, 97, 73, 50 and 105, 73, 53, 41. Where each token has its own, tiles want them sorted: at 64
// tokens 115 us streamed, 221 in tiles.
inline bool gpu_prefers_streaming(int64_t T, int64_t element_size, bool extents_on_device) {
  return element_size == 2 && T <= (extents_on_device ? kDecodeTokens : kDecodeTokens / 2);
}

// Whether Hopper's own kernel streams the weights, of which there are so many. It begins later and reads
// faster. The same MLP and its quarter, and a linear layer 4096 x 4096 and its quarter, on an H200, us: at 1
// token 84, 35, 16, 15 with it and 88, 30, 15, 10 without; at 4 tokens 85, 35, 17, 16 and 109, 36, 17, 11; at
// 12 tokens 88, 37, 17, 16 and 156, 44, 22, 14.
inline bool prefers_hopper_decode(int64_t T, int64_t weights) { return T * weights >= int64_t{1} << 27; }

// Rows of a tile of the portable kernel, 128 or 64. A mix of four extents wastes 6.8 % of 128-row tiles at
// 1024 rows and 31 % at 256 (computed); with fewer rows large tiles leave multiprocessors idle besides.
inline int elastic_linear_tile_rows(int64_t T) { return T <= 1024 ? 64 : 128; }

// A tile of the Hopper kernels: whichever lets the multiprocessors be done first, each computing as many as
// falls to it one after the other; the larger where equal. A tile's cost is its time in microseconds on an
// H200, at 4096 inputs and a single round of tiles: smaller ones wait longer for their bytes per product.
struct TileSides {
  int rows, columns;
};
inline TileSides hopper_tile_sides(int64_t T, int64_t columns, int64_t blocks, int multiprocessors) {
  constexpr struct {
    TileSides sides;
    int cost;
  } kLargestFirst[] = {{{128, 256}, 43}, {{128, 128}, 24}, {{64, 128}, 20}};
  TileSides best{};
  int64_t least = INT64_MAX;
  for (const auto& [sides, cost] : kLargestFirst) {
    const int64_t tiles = blocks * tiles_over(T, sides.rows) * tiles_over(columns, sides.columns);
    const int64_t time = (tiles + multiprocessors - 1) / multiprocessors * cost;
    if (time < least) {
      least = time;
      best = sides;
    }
  }
  return best;
}

// Whether a forward or a backward with plain weights on a CPU is our GEMM or MKL's, on views, where this
// machine was not measured (ops/machine.h). On 2 cores of an AMD EPYC (Zen 3, AVX2), torch 2.13's time over
// ours. Forward, weights 1536 x 576 and 2048 x 2048, at 1, 8, 64 and 256 tokens:
// float32 1.2-1.5, 1.3-2.1, 1.1-1.2, 0.90-0.95; bfloat16 0.8-1.2, 3.3-4.0, 5.4-6.7, 7.1-7.5. Forward and
// backward of a gated MLP 576 x 1536, at 64 and 256 tokens: float32 with MKL's GEMM for ours, gradients of
// weights too, 1.20, 0.99; bfloat16 17, 24.
inline bool cpu_prefers_own_gemm(int64_t T, int64_t element_size) { return element_size == 2 || T < 128; }

// Whether the gradient of a weight is ours there too: it has many results and few terms in each. Our time
// over torch's, weight 576 x 576, float32: 4.3 at 1 token, 1.5 at 64.
inline bool cpu_prefers_own_weight_gradient(int64_t element_size) { return element_size == 2; }

}  // namespace flextron
