// Attention by a warp's tensor cores: tiles of 16-bit rows in shared memory, a head's D elements in each and
// zeros up to kHead, and the fragments that mma takes from them; any GPU of sm_80 and up.
//
// Scores are fragments too: a warp has 16 rows (queries) by 8 columns (keys) in Registers<float, 4>, and two
// of these, rounded, are 16 x 16 of A for the product that follows.
#pragma once

#include <cmath>

#include "core/dispatch.h"
#include "kernels/device/math.cuh"
#include "kernels/device/tile.cuh"
#include "kernels/head_attention_call.h"

namespace flextron::attention {

// Head sizes that tiles are made for; a smaller one takes the next.
using HeadSizes = IntList<64, 80, 96, 128>;
constexpr int kMostHead = 128;
inline int64_t tile_head(int64_t D) { return D <= 64 ? 64 : D <= 80 ? 80 : D <= 96 ? 96 : 128; }

// A row is an odd number of 16-byte pieces: eight rows' pieces of one column lie in different banks, as do
// eight of one row.
template <int kRows_, int kHead_>
struct Tile {
  static constexpr int kRows = kRows_, kHead = kHead_, kPitch = kHead / 8 + 1;
  static_assert(kPitch % 2 == 1);
  uint4 pieces[kRows * kPitch];

  __device__ __forceinline__ uint4* at(int row, int piece) { return &pieces[row * kPitch + piece]; }
  __device__ __forceinline__ const uint4* at(int row, int piece) const {
    return &pieces[row * kPitch + piece];
  }
};

// Row r of the tile is the D elements at row(r), zeros where that is null. kAligned: rows begin at multiples
// of 16 bytes, and the copies are this thread's cp.async; else they are made when this returns. What is
// left of a row has a copy of its own: the emulator counts the banks of each place in the code.
template <bool kAligned, int kThreads, class Rows, class Tile>
__device__ __forceinline__ void load_rows(Tile& tile, int D, const Rows& row) {
  constexpr int kLines = kThreads / 8, kPieces = Tile::kHead / 8, kRest = kPieces % 8;
  static_assert(Tile::kRows % kLines == 0);
#pragma unroll
  for (int r = threadIdx.x / 8; r < Tile::kRows; r += kLines) {
    const auto* const from = row(r);
    const auto copy = [&](int piece) __attribute__((always_inline)) {
      tiles::copy<kAligned>(tile.at(r, piece), from ? from + 8 * piece : from, from ? D - 8 * piece : 0);
    };
#pragma unroll
    for (int first = 0; first < kPieces - kRest; first += 8) copy(first + threadIdx.x % 8);
    if constexpr (kRest > 0) {
      const int piece = kPieces - kRest + threadIdx.x % 8;
      if (piece >= kPieces) continue;
      copy(piece);
    }
  }
}

// Elements 2 i and 2 i + 1 of a row, of which there are `count` from there on.
template <bool kAligned, class scalar_t>
__device__ __forceinline__ uint32_t pair_of(const scalar_t* from, int count) {
  if (kAligned && count >= 2) return load_global(reinterpret_cast<const uint32_t*>(from));
  const uint32_t low = count > 0 ? load_global(from).bits : 0;
  const uint32_t high = count > 1 ? load_global(from + 1).bits : 0;
  return low | high << 16;
}

// 16 x 16 of mma's A from global memory: rows lane / 4 and 8 more, null where there is none, from column
// 16 * step on.
template <bool kAligned, class scalar_t>
__device__ __forceinline__ void load_a(Registers<uint32_t, 4>& a, const scalar_t* top, const scalar_t* bottom,
                                       int step, int D, int lane) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const scalar_t* const row = i % 2 ? bottom : top;
    const int column = 16 * step + i / 2 * 8 + lane % 4 * 2;
    a[i] = row == nullptr ? 0 : pair_of<kAligned>(row + column, D - column);
  }
}

// 16 x 16 of a tile, from `row` and column 16 * step on:
//   a             as mma's A, rows by columns; a_transposed: columns by rows
//   b             as two of mma's B, depth along columns: b[0], b[1] are for rows 0 .. 7, b[2], b[3] for 8
//   .. 15 b_transposed  depth along rows: b[0], b[1] are for columns 0 .. 7, b[2], b[3] for 8 .. 15
template <class Tile>
__device__ __forceinline__ void fragment_a(Registers<uint32_t, 4>& a, const Tile& tile, int row, int step,
                                           int lane) {
  ldmatrix_x4(a, tile.at(row + lane % 16, 2 * step + lane / 16));
}
template <class Tile>
__device__ __forceinline__ void fragment_a_transposed(Registers<uint32_t, 4>& a, const Tile& tile, int row,
                                                      int step, int lane) {
  ldmatrix_x4_trans(a, tile.at(row + lane / 16 * 8 + lane % 8, 2 * step + lane / 8 % 2));
}
template <class Tile>
__device__ __forceinline__ void fragment_b(Registers<uint32_t, 4>& b, const Tile& tile, int row, int step,
                                           int lane) {
  ldmatrix_x4(b, tile.at(row + lane / 16 * 8 + lane % 8, 2 * step + lane / 8 % 2));
}
template <class Tile>
__device__ __forceinline__ void fragment_b_transposed(Registers<uint32_t, 4>& b, const Tile& tile, int row,
                                                      int step, int lane) {
  ldmatrix_x4_trans(b, tile.at(row + lane / 8 % 2 * 8 + lane % 8, 2 * step + lane / 16));
}

// Two neighbouring 16 x 8 results, rounded, as 16 x 16 of A.
template <class scalar_t>
__device__ __forceinline__ Registers<uint32_t, 4> as_a(const Registers<float, 4>& left,
                                                       const Registers<float, 4>& right) {
  return {{pack<scalar_t>(left[0], left[1]), pack<scalar_t>(left[2], left[3]),
           pack<scalar_t>(right[0], right[1]), pack<scalar_t>(right[2], right[3])}};
}

template <int kEights>
__device__ __forceinline__ void clear(Registers<Registers<float, 4>, kEights>& sums) {
#pragma unroll
  for (int n = 0; n < kEights; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[n][i] = 0;
}

// Over the four lanes that share a row of results.
__device__ __forceinline__ float sum_of_row(float value) {
  value += __shfl_xor_sync(~0u, value, 1);
  return value + __shfl_xor_sync(~0u, value, 2);
}
__device__ __forceinline__ float max_of_row(float value) {
  value = fmaxf(value, __shfl_xor_sync(~0u, value, 1));
  return fmaxf(value, __shfl_xor_sync(~0u, value, 2));
}

// The online softmax of a lane's two rows, lane / 4 and 8 more, in powers of two: the largest score seen and
// the sum of 2^(score - largest) over the lane's own columns. Keys that a row does not see are -inf, and a
// row that sees none of them stays as it was, bit for bit. A NaN that is seen ends up in the sum.
struct Softmax {
  Registers<float, 2> max, sum;

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int half = 0; half < 2; ++half) max[half] = -INFINITY, sum[half] = 0;
  }

  // Turns scores into probabilities of the largest score so far, and what was summed before into the same.
  template <int kKeyEights, int kEights>
  __device__ __forceinline__ void step(Registers<Registers<float, 4>, kKeyEights>& scores,
                                       Registers<Registers<float, 4>, kEights>& sums) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float most = max[half];
#pragma unroll
      for (int n = 0; n < kKeyEights; ++n)
        most = fmaxf(most, fmaxf(scores[n][2 * half], scores[n][2 * half + 1]));
      most = max_of_row(most);
      const float base = most == -INFINITY ? 0 : most;
      const float shrink = exp2_approx(max[half] - base);
      max[half] = most;
      float total = 0;
#pragma unroll
      for (int n = 0; n < kKeyEights; ++n)
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          scores[n][i] = exp2_approx(scores[n][i] - base);
          total += scores[n][i];
        }
      sum[half] = sum[half] * shrink + total;
#pragma unroll
      for (int n = 0; n < kEights; ++n) {
        sums[n][2 * half] *= shrink;
        sums[n][2 * half + 1] *= shrink;
      }
    }
  }
};

// ---- which rows and keys ----

// Place i of a sequence's queries for one head: the row of q, and how many keys from k_start on it sees.
struct Query {
  int64_t t;  // -1: no such row, or the head is not active in it
  int keys;
};

__device__ __forceinline__ Query query_at(const AttentionCall& call, const CallSequence& s, int64_t b,
                                          int64_t head, int64_t i) {
  if (i >= s.T) return {-1, 0};
  const int64_t t = call.order ? call.order[s.query + i] : s.query + i;
  if (call.order && !head_active(call, units_of(call, b, t), head)) return {-1, 0};
  const int64_t keys = s.keys_end(call.causal, t - s.query) - s.k_start;
  return {t, static_cast<int>(keys > 0 ? keys : 0)};
}

}  // namespace flextron::attention
