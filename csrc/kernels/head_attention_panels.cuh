// What head_attention's Hopper kernels share: tiles of a head's rows in shared memory, as TMA and the tensor
// cores take them, and which rows an item of a query schedule has. bf16 and fp16.
#pragma once

#include <climits>

#include "kernels/device/pipeline_sm90.cuh"
#include "kernels/head_attention_cuda.h"

namespace flextron::panels {

using pipeline::kConsumerRows;
using pipeline::kConsumers;
using pipeline::kWarpgroup;

constexpr int kRows = kAttentionRowsSm90;  // of an item, 64 a consumer
constexpr int kWarpRows = 16;
static_assert(kRows == 2 * kConsumerRows);
constexpr float kLog2E = 1.44269504f;

// Tiles lie in panels, kPanel of the head's elements wide, as wide as the swizzle; a panel that the head does
// not fill has zeros behind it.
template <class scalar, int head>
struct Panels {
  using scalar_t = scalar;
  static constexpr int kHead = head;
  static constexpr int kPanel = head % 64 == 0 ? 64 : 32, kPanels = (head + kPanel - 1) / kPanel;
  static constexpr int kWidth = kPanel * kPanels;
  static constexpr int kLine = kPanel * sizeof(scalar);  // bytes
  static constexpr Swizzle kSwizzle = kPanel == 64 ? Swizzle::k128 : Swizzle::k64;
  static constexpr int kSums = kWidth * kConsumerRows / kWarpgroup;  // of a thread
};
// Each is a multiple of 1024 bytes, as its address must be.
template <class S, int rows>
using Tile = typename S::scalar_t[S::kPanels][rows][S::kPanel];

__device__ __forceinline__ int lane_of() { return threadIdx.x % 32; }

// The items of this block. Rounds go over the grid forth and back, so that the block with the longest item of
// one round has the shortest of the next.
__device__ __forceinline__ int64_t item_of(int64_t round) {
  return round * gridDim.x + (round % 2 == 0 ? blockIdx.x : gridDim.x - 1 - blockIdx.x);
}

// ---- which rows ----

struct alignas(8) Row {
  int t, seen;  // of q, -1 where there is none; keys that it sees
};

struct Plan {
  int head, group;
  int query;  // the first row of q, where rows are neighbours
  int first,
      keys;     // row of k of the sequence's first key that may be seen, and how many there are from it on
  int seen[2];  // of these, those that one of a consumer's rows sees
  __device__ __forceinline__ int blocks(int rows) const { return (max(seen[0], seen[1]) + rows - 1) / rows; }
};

// By a whole warp. row_is(row, t, keys that it sees), t -1 where there is none.
template <class RowIs>
__device__ __forceinline__ Plan plan_of(const AttentionCall& p, const AttentionSchedule& queries,
                                        int64_t item, const RowIs& row_is) {
  const AttentionItemPlace place = item_at(queries, item);
  const AttentionBlock block = queries.blocks[place.block];
  const CallSequence s = sequence_of(p, block.sequence);
  const int rows = static_cast<int>(s.T - block.block * kRows);
  Plan plan;
  plan.head = static_cast<int>(head_at(p, block.units, place.item));
  plan.group = plan.head / static_cast<int>(p.M);
  plan.query = static_cast<int>(s.query + block.block * kRows);
  plan.first = static_cast<int>(s.position + s.k_start);
  plan.keys = static_cast<int>(s.S - s.k_start);
#pragma unroll
  for (int consumer = 0; consumer < 2; ++consumer) {
    int most = 0;
#pragma unroll 1
    for (int row = consumer * kConsumerRows + lane_of(); row < (consumer + 1) * kConsumerRows; row += 32) {
      int t = -1, end = INT_MAX;
      if (row < rows) {
        const int at = p.order ? static_cast<int>(p.order[plan.query + row]) : plan.query + row;
        if (!p.per_token() || head_active(p, units_of(p, block.sequence, at), plan.head)) {
          t = at;
          end = max(static_cast<int>(s.keys_end(p.causal, at - s.query) - s.k_start), 0);
          most = max(most, end);
        }
      }
      row_is(row, t, end);
    }
#pragma unroll
    for (int other = 16; other > 0; other /= 2) most = max(most, __shfl_xor_sync(~0u, most, other));
    plan.seen[consumer] = most;
  }
  return plan;
}

// ---- into shared memory ----

template <class S, int rows>
constexpr int kTileBytes = rows * S::kWidth * static_cast<int>(sizeof(typename S::scalar_t));

// Neighbouring rows, by one thread; `full` expects kTileBytes for them.
template <class S, int rows>
__device__ __forceinline__ void load(Tile<S, rows>& tile, const TensorMap& map, Mbarrier& full, int middle,
                                     int row) {
#pragma unroll
  for (int panel = 0; panel < S::kPanels; ++panel)
    tma_load_3d(tile[panel], map, full, panel * S::kPanel, middle, row);
}

// Rows from anywhere, by a whole warp, to where TMA would put them: the head's elements at row_at(row), zeros
// where that is null. They are there for the lane that asked when gathered() returns.
template <class S, int rows, class RowAt>
__device__ __forceinline__ void gather(Tile<S, rows>& tile, const RowAt& row_at) {
  constexpr int kPieces = S::kPanel / 8;
#pragma unroll 1
  for (int panel = 0; panel < S::kPanels; ++panel) {
    const int column = panel * S::kPanel + lane_of() % kPieces * 8;
#pragma unroll 4
    for (int row = lane_of() / kPieces; row < rows; row += 32 / kPieces) {
      const typename S::scalar_t* const from = row_at(row);
      const bool there = from && column < S::kHead;
      char* const to = reinterpret_cast<char*>(tile[panel]) +
                       swizzled(row * S::kLine + lane_of() % kPieces * 16, S::kSwizzle);
      cp_async_16(to, there ? from + column : from, there ? 16 : 0);
    }
  }
  cp_async_commit();
}
__device__ __forceinline__ void gathered() {
  cp_async_wait<0>();
  fence_proxy_async();
}

// ---- products ----

// A thread's place among the consumers.
struct Place {
  const int thread = static_cast<int>(threadIdx.x) - kWarpgroup, lane = thread % 32;
  // A lane's for all of its warp, so that the compiler keeps what follows from it once (keys' gradients of D
  // = 128: 8 bytes spilled without).
  const int index = __shfl_sync(~0u, thread / kWarpgroup, 0);
  const int warp_row = thread / 32 * kWarpRows;  // its warp's first of the item's rows
  const int row = warp_row + lane / 4;           // and 8 below
};

// Of value i of scores and sums, columns of eight: four a thread, two of each row.
__device__ __forceinline__ int row_of(int i) { return i / 2 % 2; }
// And its column.
__device__ __forceinline__ int column_of(int i, int lane) { return i / 4 * 8 + lane % 4 * 2 + i % 2; }

// A consumer's rows of an item's tile, from `row` on.
template <class S>
__device__ __forceinline__ uint64_t own_rows(const Tile<S, kRows>& tile, int row) {
  return wgmma_descriptor(tile[0][row], S::kSwizzle, 16, 8 * S::kLine);
}

// scores = own rows times the tile's rows, asked for.
template <class S, int rows>
__device__ __forceinline__ void ask_scores(Registers<float, rows / 2>& scores, uint64_t own,
                                           const Tile<S, rows>& tile) {
  const uint64_t passing = wgmma_descriptor(tile, S::kSwizzle, 16, 8 * S::kLine);
#pragma unroll
  for (int column = 0; column < S::kHead; column += 16) {
    const int panel = column / S::kPanel, within = column % S::kPanel * 2;
    wgmma<typename S::scalar_t, rows>(scores, wgmma_advance(own, panel * (kRows * S::kLine) + within),
                                      wgmma_advance(passing, panel * (rows * S::kLine) + within), column > 0);
  }
  wgmma_commit();
}

// Scores as wgmma takes its A.
template <int rows>
using Weights = Registers<Registers<uint32_t, 4>, rows / 16>;

template <class scalar_t, int rows>
__device__ __forceinline__ void round_weights(Weights<rows>& weights,
                                              const Registers<float, rows / 2>& scores) {
#pragma unroll
  for (int i = 0; i < rows / 16; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j)
      weights[i][j] = pack<scalar_t>(scores[8 * i + 2 * j], scores[8 * i + 2 * j + 1]);
}

// sums += weights times the tile's rows, asked for.
template <class S, int rows>
__device__ __forceinline__ void ask_sums(Registers<float, S::kSums>& sums, const Weights<rows>& weights,
                                         const Tile<S, rows>& tile) {
  const uint64_t passing = wgmma_descriptor(tile, S::kSwizzle, rows * S::kLine, 8 * S::kLine);
#pragma unroll
  for (int i = 0; i < rows / 16; ++i)
    wgmma<typename S::scalar_t, S::kWidth, Major::kMN>(sums, weights[i],
                                                       wgmma_advance(passing, i * 16 * S::kLine), 1);
  wgmma_commit();
}

// ---- out of shared memory ----

// A warp's sums, rounded, into its 16 rows of a tile that no product reads any more: value(i) of sum i.
template <class S, class Value>
__device__ __forceinline__ void put_rows(Tile<S, kRows>& tile, const Place& me, const Value& value) {
  const int line = me.warp_row + me.lane % 16, piece = me.lane / 16;
#pragma unroll
  for (int column = 0; column < S::kWidth; column += 16) {
    Registers<uint32_t, 4> blocks;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int i = column / 2 + 2 * j;
      blocks[j] = pack<typename S::scalar_t>(value(i), value(i + 1));
    }
    stmatrix_x4(reinterpret_cast<char*>(tile[column / S::kPanel]) +
                    swizzled(line * S::kLine + column % S::kPanel * 2 + piece * 16, S::kSwizzle),
                blocks);
  }
  fence_proxy_async();
  __syncwarp();
}

// Those rows to global memory: by TMA where they are neighbours and all there, from row `first` of the map
// on; else each to row_at(row of the tile), unless that is null.
template <class S, class RowAt>
__device__ __forceinline__ void send_rows(const Tile<S, kRows>& tile, const Place& me, bool neighbours,
                                          const TensorMap& map, int middle, int first, const RowAt& row_at) {
  if (neighbours) {
    if (me.lane == 0) {
#pragma unroll
      for (int panel = 0; panel < S::kPanels; ++panel)
        tma_store_3d(map, tile[panel][me.warp_row], panel * S::kPanel, middle, first);
      tma_store_commit();
    }
    return;
  }
  constexpr int kPieces = S::kPanel / 8;
#pragma unroll 1
  for (int panel = 0; panel < S::kPanels; ++panel) {
    const int column = panel * S::kPanel + me.lane % kPieces * 8;
    if (column >= S::kHead) continue;
    for (int row = me.warp_row + me.lane / kPieces; row < me.warp_row + kWarpRows; row += 32 / kPieces) {
      typename S::scalar_t* const to = row_at(row);
      if (to == nullptr) continue;
      const auto* const from = reinterpret_cast<const char*>(tile[panel]) +
                               swizzled(row * S::kLine + me.lane % kPieces * 16, S::kSwizzle);
      store_global(reinterpret_cast<uint4*>(to + column), load_shared(reinterpret_cast<const uint4*>(from)));
    }
  }
}

// ---- on the host ----

// Rows of `middle` heads or groups, `rows` of one of them a box.
template <class S>
TensorMap map_of(const typename S::scalar_t* data, int64_t middle, int64_t rows, int64_t middle_stride,
                 int64_t row_stride, int box_rows) {
  return pipeline::tensor_map(data, S::kHead, middle, rows, middle_stride, row_stride, S::kPanel, box_rows,
                              S::kSwizzle);
}

}  // namespace flextron::panels
