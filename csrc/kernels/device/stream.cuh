// Few tokens against many weights: every weight is read from global memory once, straight into the registers
// that mma takes it from. Weights are the 16 rows of mma's A, tokens the 8 columns of its B.
//
// A sum does not mind the order of its terms as long as both factors keep the same one: a lane reads 8
// neighbouring inputs (16 bytes) of its row and of its token, and hands them over as the pairs of two k16
// steps. So a step is 32 inputs, four lanes side by side, and nothing goes through shared memory.
#pragma once

#include "kernels/device/copy.cuh"
#include "kernels/device/mma.cuh"

namespace flextron {

constexpr int kStreamDepth = 32;  // inputs of a step
constexpr int kStreamWarps = 8;   // of a block; warp w takes steps w, w + 8, ... of each block of inputs

// The first `count` of 8 inputs, zeros behind them; one access where they are all there and aligned.
template <bool kAligned, class scalar_t>
__device__ __forceinline__ uint4 eight_inputs(const scalar_t* from, int count) {
  if (kAligned && count >= 8) return load_global(reinterpret_cast<const uint4*>(from));
  return gathered(from, count);
}

// A warp's sums: kRowTiles x 16 rows of weights by kTokenTiles x 8 tokens.
template <class scalar_t, int kRowTiles, int kTokenTiles>
struct Stream {
  Registers<const scalar_t*, 2 * kRowTiles> weight;  // rows lane / 4 and 8 further of each tile
  Registers<int, 2 * kRowTiles> weight_inputs;    // that are needed of the row: none, or the widest token's
  Registers<const scalar_t*, kTokenTiles> token;  // token lane / 4 of each tile
  Registers<int, kTokenTiles> token_inputs;       // that the token uses
  Registers<Registers<Registers<float, 4>, kTokenTiles>, kRowTiles> sum;

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
      for (int t = 0; t < kTokenTiles; ++t)
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[r][t][i] = 0;
  }

  // Adds one block of inputs, of which the widest token uses `widest`; the pointers are to its first input.
  template <bool kAligned>
  __device__ __forceinline__ void add(int warp, int lane, int widest) {
    // Steps whose weights are asked for before the first is used: 4 x 2 x 16 bytes a lane, 32 KiB a block.
    constexpr int kAhead = kRowTiles == 1 ? 4 : 2;
    const int first = warp * kStreamDepth + lane % 4 * 8;
    constexpr int kStride = kStreamWarps * kStreamDepth;
    for (int begin = first; begin - lane % 4 * 8 < widest; begin += kAhead * kStride) {
      Registers<Registers<uint4, 2 * kRowTiles>, kAhead> rows;
#pragma unroll
      for (int ahead = 0; ahead < kAhead; ++ahead)
#pragma unroll
        for (int r = 0; r < 2 * kRowTiles; ++r) {
          const int i = begin + ahead * kStride;
          rows[ahead][r] = eight_inputs<kAligned>(weight[r] + i, weight_inputs[r] - i);
        }
#pragma unroll
      for (int ahead = 0; ahead < kAhead; ++ahead) {
        const int i = begin + ahead * kStride;
        if (i - lane % 4 * 8 >= widest) break;  // the same for the whole warp
#pragma unroll
        for (int t = 0; t < kTokenTiles; ++t) {
          const uint4 x = eight_inputs<kAligned>(token[t] + i, token_inputs[t] - i);
#pragma unroll
          for (int r = 0; r < kRowTiles; ++r) {
            const uint4 top = rows[ahead][2 * r], bottom = rows[ahead][2 * r + 1];
            const Registers<uint32_t, 4> early{{top.x, bottom.x, top.y, bottom.y}};
            const Registers<uint32_t, 4> late{{top.z, bottom.z, top.w, bottom.w}};
            mma_m16n8k16<scalar_t>(sum[r][t], early, x.x, x.y);
            mma_m16n8k16<scalar_t>(sum[r][t], late, x.z, x.w);
          }
        }
      }
    }
  }
};

// Where the warps of a block put their sums, to be added in the order of the warps.
template <int kRowTiles, int kTokenTiles>
struct StreamSums {
  static constexpr int kRows = 16 * kRowTiles, kTokens = 8 * kTokenTiles;
  // Rows begin 8 banks apart: a warp's pairs of neighbouring sums fall into different ones.
  static constexpr int kPitch = (kTokens + 23) / 32 * 32 + 8;
  float sum[kStreamWarps][kRows][kPitch];

  template <class scalar_t>
  __device__ __forceinline__ void put(const Stream<scalar_t, kRowTiles, kTokenTiles>& stream, int warp,
                                      int lane) {
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
      for (int t = 0; t < kTokenTiles; ++t)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float* const to = &sum[warp][16 * r + 8 * half + lane / 4][8 * t + lane % 4 * 2];
          store_shared(reinterpret_cast<float2*>(to),
                       make_float2(stream.sum[r][t][2 * half], stream.sum[r][t][2 * half + 1]));
        }
  }

  __device__ __forceinline__ float total(int row, int token) const {
    float result = 0;
#pragma unroll
    for (int warp = 0; warp < kStreamWarps; ++warp) result += sum[warp][row][token];
    return result;
  }
};

}  // namespace flextron
