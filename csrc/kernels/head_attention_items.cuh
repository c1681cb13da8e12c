// What head_attention's kernels for any GPU share. Blocks of threads walk over the schedule's items, longest
// first: an item is a block of one sequence's queries for one head, and the keys that its latest query sees
// go past it. 16-bit types up to a head size of 128 are head_attention_tiles.cuh's, everything else
// head_attention_cuda.cu's.
#pragma once

#include <algorithm>

#include "kernels/device/attention_tile.cuh"
#include "kernels/device/launch.cuh"
#include "kernels/head_attention_cuda.h"

namespace flextron {
namespace attention {

struct Item {
  CallSequence sequence;
  int64_t b, head, first;  // the block's first place among the sequence's queries
};

__device__ inline Item item_of(const AttentionCall& call, const AttentionSchedule& schedule, int64_t item,
                               int64_t rows) {
  const AttentionItemPlace place = item_at(schedule, item);
  const AttentionBlock& block = schedule.blocks[place.block];
  return {sequence_of(call, block.sequence), block.sequence, head_at(call, block.units, place.item),
          block.block * rows};
}

// A block of queries: found by one thread each, known to all.
template <int kRows>
struct Queries {
  int64_t t[kRows];
  int keys[kRows];

  __device__ __forceinline__ void find(const AttentionCall& call, const Item& item) {
    for (int i = threadIdx.x; i < kRows; i += blockDim.x) {
      const Query query = query_at(call, item.sequence, item.b, item.head, item.first + i);
      t[i] = query.t;
      keys[i] = query.keys;
    }
  }

  // Of the `count` queries from `row` on; the whole warp asks.
  __device__ __forceinline__ int most_keys(int row, int count) const {
    int most = 0;
    for (int i = row + threadIdx.x % 32; i < row + count; i += 32) most = max(most, keys[i]);
    for (int distance = 16; distance > 0; distance /= 2)
      most = max(most, __shfl_xor_sync(~0u, most, distance));
    return most;
  }
  // Where the first of the windows begins.
  __device__ __forceinline__ int first_key(int window) const {
    int least = INT_MAX;
    for (int i = threadIdx.x % 32; i < kRows; i += 32)
      if (t[i] >= 0) least = min(least, keys[i]);
    for (int distance = 16; distance > 0; distance /= 2)
      least = min(least, __shfl_xor_sync(~0u, least, distance));
    return max(least - window, 0);
  }
  __device__ __forceinline__ int least_keys(int row, int count) const {
    int least = keys[row];
    for (int i = row + threadIdx.x % 32; i < row + count; i += 32) least = min(least, keys[i]);
    for (int distance = 16; distance > 0; distance /= 2)
      least = min(least, __shfl_xor_sync(~0u, least, distance));
    return least;
  }
};

template <class scalar_t>
__device__ __forceinline__ void write_lse(const HeadAttentionCall<scalar_t>& call, int64_t t, int64_t head,
                                          accumulate_t<scalar_t> lse) {
  if (call.lse) store_global(call.lse + t * call.H + head, lse);
}

// Blocks beyond the items leave at once; a long list is walked over.
inline dim3 grid_of(const AttentionCall& call, int64_t rows, int64_t parts) {
  constexpr int64_t kWaves = 64;
  const int64_t most = most_blocks(call.B, call.T, rows) * heads_of(call, call.heads) * parts;
  return dim3(static_cast<unsigned>(std::min(most, kWaves * multiprocessors())));
}

}  // namespace attention

// By the tensor cores: bf16 and fp16, D up to 128, items of kAttentionTileRows queries. Each type is compiled
// in a file of its own.
constexpr int kAttentionTileRows = 128;
template <class scalar_t>
void head_attention_tiles(const HeadAttentionCall<scalar_t>& call, const AttentionSchedule& queries,
                          CUstream_st* stream);

}  // namespace flextron
