// What the portable kernels of elastic_linear and elastic_mlp hand to device/tile.cuh: rows of activations
// and weights as far as extents let them count, and where a tile of the result goes.
#pragma once

#include <cstdint>

#include "kernels/device/copy.cuh"
#include "kernels/elastic_linear.h"

namespace flextron {

// Features of each block that a row uses.
struct Extent {
  const int64_t* values;  // as in ElasticLinearParams
  bool per_token;
  int64_t features;

  __device__ __forceinline__ int at(int64_t t) const {
    return static_cast<int>(extent_at(values, per_token, t, features));
  }
};

// Of `count` numbers that do not rise, how many are above `bound`. All lanes of a warp together.
__device__ __forceinline__ int count_above(const int64_t* numbers, int count, int64_t bound) {
  constexpr int kLanes = 32;
  const int lane = threadIdx.x % kLanes;
  int above = 0;
  for (int left = count; left > 0;) {
    const int step = (left + kLanes - 1) / kLanes, probe = (lane + 1) * step - 1;
    const bool passed = probe < left && numbers[above + probe] > bound;
    above += __popc(__ballot_sync(~0u, passed)) * step;
    left = min(step - 1, count - above);
  }
  return above;
}

// Of T rows, sorted where they differ, how many use feature i: the first ones. All lanes of a warp together.
__device__ __forceinline__ int rows_that_reach(const Extent& extent, int64_t T, int64_t i) {
  if (i >= extent.features || T == 0) return 0;
  if (extent.values && extent.per_token) return count_above(extent.values, static_cast<int>(T), i);
  return i < extent.at(0) ? static_cast<int>(T) : 0;
}

// Rows of an activation from `first` on, its features along the depth; a part is a block.
template <class T>
struct TokenRows {
  using scalar_t = T;
  static constexpr bool kDeep = true;
  const scalar_t* data;
  int64_t stride, block, first, rows;
  Extent extent;

  __device__ __forceinline__ const scalar_t* line(int l) const { return data + (first + l) * stride; }
  __device__ __forceinline__ int count(int l) const { return first + l < rows ? extent.at(first + l) : 0; }
};

// Features of an activation from `first` of one block on, its rows along the depth.
template <class T>
struct TokenColumns {
  using scalar_t = T;
  static constexpr bool kDeep = false;
  const scalar_t* data;  // the first feature
  int64_t stride;
  int first, rows,
      whole;  // of the rows, how many count at all, and how many to the tile's last column at least
  Extent extent;

  __device__ __forceinline__ void enter(int) {}
  __device__ __forceinline__ const scalar_t* line(int l) const { return data + l * stride; }
  __device__ __forceinline__ int count(int l) const {
    return l < whole ? static_cast<int>(extent.features) - first : l < rows ? extent.at(l) - first : 0;
  }
};

// Rows of a contiguous result from `first` on, columns from one on.
template <class scalar_t>
struct TileOut {
  scalar_t* data;  // at the tile's first element
  int64_t stride;
  int rows, width;
  bool pieces;

  __device__ __forceinline__ scalar_t* row(int m) const { return m < rows ? data + m * stride : nullptr; }
};

// Whether rows that lie `stride` apart all begin at multiples of 16 bytes.
template <class scalar_t>
FLEXTRON_HD bool whole_pieces(const scalar_t* data, int64_t stride) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 &&
         stride * static_cast<int64_t>(sizeof(scalar_t)) % 16 == 0;
}

// The same of the rows' blocks.
template <class scalar_t>
bool blocks_aligned(const scalar_t* data, int64_t stride, int64_t blocks, int64_t block) {
  return whole_pieces(data, stride) && (blocks == 1 || whole_pieces(data, block));
}

}  // namespace flextron
