// head_attention on Hopper, bf16 and fp16, head sizes 64, 80, 96 and 128.
//
// Blocks walk over the schedule's items: kQueries queries of one head against all keys that one of them sees,
// kKeys at a time from k_start on. Of the first warpgroup, one warp brings the queries of the item after, one
// the keys and values, through rings of stages, and one clears the values behind a sequence's last key, which
// are another's. The other two warpgroups are the consumers, each with 64 of the queries. They take turns:
// while one computes its weights, the tensor cores work for the other. Within a consumer they work too: the
// scores of a block are asked for before the sums of the block ahead, and the weights are computed during
// these.
//
// A row's result does not depend on the other rows: a block of which it sees nothing leaves its maximum, its
// total and its sums as they are, and every sum has its order.
#include <algorithm>
#include <climits>
#include <cmath>

#include "kernels/device/math.cuh"
#include "kernels/device/pipeline_sm90.cuh"
#include "kernels/head_attention_cuda.h"

namespace flextron {
namespace {

using pipeline::kConsumers;
using pipeline::kThreads;
using pipeline::kWarpgroup;
using pipeline::Ring;

constexpr int kQueries = kAttentionRowsSm90, kKeys = 128;
constexpr int kConsumerRows = pipeline::kConsumerRows, kWarpRows = 16;
constexpr int kSixteens = kKeys / 16;
constexpr int kProducerRegisters = 56, kConsumerRegisters = 224;  // 168 a thread in all
constexpr int kTurnOfConsumer = 4;  // and the next: named barriers behind the pipeline's
constexpr float kLog2E = 1.44269504f, kLn2 = 0.69314718f;

// Tiles lie in panels, kPanel of the head's elements wide, as wide as the swizzle; a panel that the head does
// not fill has zeros behind it.
template <class scalar, int head>
struct Shape {
  using scalar_t = scalar;
  static constexpr int kHead = head;
  static constexpr int kPanel = head % 64 == 0 ? 64 : 32, kPanels = (head + kPanel - 1) / kPanel;
  static constexpr int kWidth = kPanel * kPanels;
  static constexpr int kLine = kPanel * sizeof(scalar);  // bytes
  static constexpr Swizzle kSwizzle = kPanel == 64 ? Swizzle::k128 : Swizzle::k64;
  static constexpr int kSums = kWidth * kConsumerRows / kWarpgroup,
                       kScores = kKeys * kConsumerRows / kWarpgroup;
  static constexpr int kTileBytes = kKeys * kWidth * sizeof(scalar);
  static constexpr int kStages = std::min(4, (224 * 1024 / kTileBytes - 2) / 2);
  using Tile = scalar[kPanels][kKeys][kPanel];
};
static_assert(kQueries == kKeys);  // tiles of either have one shape

struct Slots {
  static constexpr int kStages = 2;
};

// What the consumers are told of an item, and of each of its queries.
struct alignas(16) Item {
  int head, blocks;  // of keys; head -1: no more items
  int seen[2];       // keys that one of a consumer's rows sees
};
struct alignas(8) Row {
  int t, seen;  // of q, -1 where there is none; keys that it sees
};

// Tiles come first: each is a multiple of 1024 bytes, and so is its address.
template <class S>
struct Shared {
  typename S::Tile q[Slots::kStages], k[S::kStages], v[S::kStages];
  Row rows[Slots::kStages][kQueries];
  Item items[Slots::kStages];
  Mbarrier q_full[Slots::kStages], q_empty[Slots::kStages];
  Mbarrier k_full[S::kStages], k_empty[S::kStages];
  Mbarrier v_full[S::kStages], v_empty[S::kStages];
  Mbarrier v_landed[S::kStages];  // but not cleared yet
};

template <class scalar_t>
struct Operands : HeadAttentionCall<scalar_t> {
  AttentionSchedule queries;
  TensorMap q_map, k_map, v_map, out_map;
};

__device__ __forceinline__ int lane_of() { return threadIdx.x % 32; }

// Items of this block, in rounds that go over the grid forth and back: who has the longest of one round has
// the shortest of the next.
__device__ __forceinline__ int64_t item_of(int64_t round) {
  return round * gridDim.x + (round % 2 == 0 ? blockIdx.x : gridDim.x - 1 - blockIdx.x);
}

// ---- the first warpgroup ----

struct Plan {
  int head, group;
  int query;  // the first row of q, where rows are neighbours
  int first,
      keys;     // row of k of the sequence's first key that may be seen, and how many there are from it on
  int seen[2];  // of these, those that one of a consumer's rows sees
  __device__ __forceinline__ int blocks() const { return (max(seen[0], seen[1]) + kKeys - 1) / kKeys; }
};

// By a whole warp. row_is(row, t, keys that it sees), t -1 where there is none.
template <class scalar_t, class RowIs>
__device__ __forceinline__ Plan plan_of(const Operands<scalar_t>& p, int64_t item, const RowIs& row_is) {
  const AttentionItemPlace place = item_at(p.queries, item);
  const AttentionBlock block = p.queries.blocks[place.block];
  const CallSequence s = sequence_of(p, block.sequence);
  const int rows = static_cast<int>(s.T - block.block * kQueries);
  Plan plan;
  plan.head = static_cast<int>(head_at(p, block.units, place.item));
  plan.group = plan.head / static_cast<int>(p.M);
  plan.query = static_cast<int>(s.query + block.block * kQueries);
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

template <class S>
__device__ __forceinline__ void load_tile(typename S::Tile& tile, const TensorMap& map, Mbarrier& full,
                                          int middle, int row) {
  mbarrier_arrive_expect(full, S::kTileBytes);
#pragma unroll
  for (int panel = 0; panel < S::kPanels; ++panel)
    tma_load_3d(tile[panel], map, full, panel * S::kPanel, middle, row);
}

// Rows of q that are not neighbours, by a whole warp, to where the copy engine would put them.
template <class S>
__device__ __forceinline__ void gather_queries(const Operands<typename S::scalar_t>& p, Shared<S>& shared,
                                               int slot, int head) {
  constexpr int kPieces = S::kPanel / 8;
#pragma unroll 1
  for (int panel = 0; panel < S::kPanels; ++panel) {
    const int column = panel * S::kPanel + lane_of() % kPieces * 8;
    if (column >= S::kHead) continue;
#pragma unroll 4
    for (int row = lane_of() / kPieces; row < kQueries; row += 32 / kPieces) {
      const int t = load_shared(&shared.rows[slot][row]).t;
      char* const to = reinterpret_cast<char*>(shared.q[slot][panel]) +
                       swizzled(row * S::kLine + lane_of() % kPieces * 16, S::kSwizzle);
      cp_async_16(to, p.q + max(t, 0) * p.q_stride_t + head * p.q_stride_h + column, t >= 0 ? 16 : 0);
    }
  }
  cp_async_commit();
  cp_async_wait<0>();
  fence_proxy_async();
}

template <class S>
__device__ __forceinline__ void load_queries(const Operands<typename S::scalar_t>& p, Shared<S>& shared,
                                             Ring<Slots>& slot, const Plan& plan) {
  if (lane_of() == 0)
    store_shared(&shared.items[slot.stage], Item{plan.head, plan.blocks(), {plan.seen[0], plan.seen[1]}});
  __syncwarp();
  Mbarrier& full = shared.q_full[slot.stage];
  if (p.order) {
    gather_queries<S>(p, shared, slot.stage, plan.head);
    __syncwarp();
    if (lane_of() == 0) mbarrier_arrive(full);
  } else if (lane_of() == 0) {
    load_tile<S>(shared.q[slot.stage], p.q_map, full, plan.head, plan.query);
  }
  slot.advance();
}

// Keys run a block ahead of values: they are needed, and given back, before them.
template <class S>
__device__ __forceinline__ void load_keys(const Operands<typename S::scalar_t>& p, Shared<S>& shared,
                                          Ring<S>& k_ring, Ring<S>& v_ring, const Plan& plan) {
  const int blocks = plan.blocks();
  for (int block = 0; block <= blocks; ++block) {
    if (block < blocks) {
      mbarrier_wait(shared.k_empty[k_ring.stage], k_ring.parity ^ 1);
      load_tile<S>(shared.k[k_ring.stage], p.k_map, shared.k_full[k_ring.stage], plan.group,
                   plan.first + block * kKeys);
      k_ring.advance();
    }
    if (block > 0) {
      mbarrier_wait(shared.v_empty[v_ring.stage], v_ring.parity ^ 1);
      Mbarrier& full =
          block * kKeys > plan.keys ? shared.v_landed[v_ring.stage] : shared.v_full[v_ring.stage];
      load_tile<S>(shared.v[v_ring.stage], p.v_map, full, plan.group, plan.first + (block - 1) * kKeys);
      v_ring.advance();
    }
  }
}

// Zeros behind the sequence's last key. By a whole warp; `landed` has the parity of each stage's barrier.
template <class S>
__device__ __forceinline__ void clear_values(Shared<S>& shared, Ring<S>& ring, unsigned& landed,
                                             const Plan& plan) {
  const int blocks = plan.blocks();
  for (int block = 1; block <= blocks; ++block, ring.advance()) {
    if (block * kKeys <= plan.keys) continue;
    const int stage = ring.stage, kept = plan.keys - (block - 1) * kKeys;
    mbarrier_wait(shared.v_landed[stage], landed >> stage & 1);
    landed ^= 1u << stage;
    constexpr int kPieces = S::kPanel / 8;
#pragma unroll
    for (int panel = 0; panel < S::kPanels; ++panel) {
      auto* const pieces = reinterpret_cast<uint4*>(shared.v[stage][panel]);
      for (int i = kept * kPieces + lane_of(); i < kKeys * kPieces; i += 32)
        store_shared(pieces + i, make_uint4(0, 0, 0, 0));
    }
    fence_proxy_async();
    __syncwarp();
    if (lane_of() == 0) mbarrier_arrive(shared.v_full[stage]);
  }
}

template <class S>
__device__ __forceinline__ void produce(const Operands<typename S::scalar_t>& p, Shared<S>& shared) {
  const int warp = threadIdx.x / 32;
  if (warp > 2) return;
  Ring<Slots> slot;
  Ring<S> k_ring, v_ring;
  unsigned landed = 0;
  const int64_t items = p.queries.first[*p.queries.count];
  for (int64_t round = 0, item; (item = item_of(round)) < items; ++round) {
    if (warp == 0) mbarrier_wait(shared.q_empty[slot.stage], slot.parity ^ 1);
    const Plan plan = plan_of(p, item, [&](int row, int t, int end) {
      if (warp == 0) store_shared(&shared.rows[slot.stage][row], Row{t, end});
    });
    if (warp == 0) {
      load_queries<S>(p, shared, slot, plan);
    } else if (warp == 1) {
      if (lane_of() == 0) load_keys<S>(p, shared, k_ring, v_ring, plan);
    } else {
      clear_values<S>(shared, v_ring, landed, plan);
    }
  }
  if (threadIdx.x == 0) {
    mbarrier_wait(shared.q_empty[slot.stage], slot.parity ^ 1);
    store_shared(&shared.items[slot.stage], Item{-1, 0, {0, 0}});
    mbarrier_arrive(shared.q_full[slot.stage]);
  }
}

// ---- the consumers ----

// A thread's place among the consumers, and what it has of its two rows.
struct Consumer {
  const int thread = static_cast<int>(threadIdx.x) - kWarpgroup;
  const int index = thread / kWarpgroup, lane = thread % 32;
  const int warp_row = thread / 32 * kWarpRows;  // its warp's first of the tile
  const int row = warp_row + lane / 4;           // and 8 below
  Registers<Row, 2> rows;
  Registers<float, 2> top, total;  // the greatest score; the sum of this thread's weights

  __device__ __forceinline__ void take_turn() const {
    named_barrier_sync(kTurnOfConsumer + index, kConsumers);
  }
  __device__ __forceinline__ void pass_turn() const {
    named_barrier_arrive(kTurnOfConsumer + 1 - index, kConsumers);
  }
};

template <class S>
using Scores = Registers<float, S::kScores>;
template <class S>
using Sums = Registers<float, S::kSums>;
using Weights = Registers<Registers<uint32_t, 4>, kSixteens>;  // as wgmma takes its A

// scores = q k^T, asked for.
template <class S>
__device__ __forceinline__ void ask_scores(Scores<S>& scores, uint64_t q, const typename S::Tile& tile) {
  const uint64_t k = wgmma_descriptor(tile, S::kSwizzle, 16, 8 * S::kLine);
#pragma unroll
  for (int column = 0; column < S::kHead; column += 16) {
    const uint32_t at = column / S::kPanel * (kKeys * S::kLine) + column % S::kPanel * 2;
    wgmma<typename S::scalar_t, kKeys>(scores, wgmma_advance(q, at), wgmma_advance(k, at), column > 0);
  }
  wgmma_commit();
}

// sums += weights v, asked for.
template <class S>
__device__ __forceinline__ void ask_sums(Sums<S>& sums, const Weights& weights,
                                         const typename S::Tile& tile) {
  const uint64_t v = wgmma_descriptor(tile, S::kSwizzle, kKeys * S::kLine, 8 * S::kLine);
#pragma unroll
  for (int i = 0; i < kSixteens; ++i)
    wgmma<typename S::scalar_t, S::kWidth, Major::kMN>(sums, weights[i], wgmma_advance(v, i * 16 * S::kLine),
                                                       1);
  wgmma_commit();
}

// Of value i of scores and sums, columns of eight: four a thread, two of each row.
__device__ __forceinline__ int row_of(int i) { return i / 2 % 2; }

// Scores of block `block` become weights; returns what the sums so far are to be multiplied with. A score is
// factor * scores, or, where prescale is not 1, prescale * scores and factor is 1.
template <class S>
__device__ __forceinline__ Registers<float, 2> soften(Consumer& me, Scores<S>& scores, int block,
                                                      float prescale, float factor) {
  if (prescale != 1) {
#pragma unroll
    for (int i = 0; i < S::kScores; ++i) scores[i] *= prescale;
  }
  if (min(me.rows[0].seen, me.rows[1].seen) < (block + 1) * kKeys) {
    const int first = block * kKeys + me.lane % 4 * 2;
    const Registers<int, 2> seen{{me.rows[0].seen - first, me.rows[1].seen - first}};
#pragma unroll
    for (int i = 0; i < S::kScores; ++i)
      if (i / 4 * 8 + i % 2 >= seen[row_of(i)]) scores[i] = -INFINITY;
  }
  Registers<float, 2> top{{-INFINITY, -INFINITY}}, total{{0, 0}}, kept, base;
#pragma unroll
  for (int i = 0; i < S::kScores; ++i) top[row_of(i)] = fmaxf(top[row_of(i)], scores[i]);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    top[half] = fmaxf(top[half], __shfl_xor_sync(~0u, top[half], 1));
    top[half] = fmaxf(top[half], __shfl_xor_sync(~0u, top[half], 2));
    // Differences of what is already rounded: exactly 1 is kept where the block brings no greater score.
    top[half] = fmaxf(me.top[half], top[half] * factor);
    base[half] = top[half] == -INFINITY ? 0 : top[half];
    kept[half] = exp2_approx(me.top[half] - base[half]);
    me.top[half] = top[half];
  }
#pragma unroll
  for (int i = 0; i < S::kScores; ++i) {
    scores[i] = exp2_approx(fmaf(scores[i], factor, -base[row_of(i)]));
    total[row_of(i)] += scores[i];
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) me.total[half] = fmaf(me.total[half], kept[half], total[half]);
  return kept;
}

template <class S>
__device__ __forceinline__ void round_weights(Weights& weights, const Scores<S>& scores) {
#pragma unroll
  for (int i = 0; i < kSixteens; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j)
      weights[i][j] = pack<typename S::scalar_t>(scores[8 * i + 2 * j], scores[8 * i + 2 * j + 1]);
}

// Every warp gives a stage back by itself, when all of its lanes have waited for it.
template <class S>
__device__ __forceinline__ void give_back(const Consumer& me, Mbarrier (&empty)[S::kStages], Ring<S>& ring) {
  if (me.lane == 0) mbarrier_arrive(empty[ring.stage]);
  ring.advance();
}

// The sums, divided by the total of the weights, into the queries' place and from there to out: by the copy
// engine where a warp's rows are neighbours and all there.
template <class S>
__device__ __forceinline__ void store(const Operands<typename S::scalar_t>& p, Shared<S>& shared,
                                      const Consumer& me, int slot, int head, const Sums<S>& sums) {
  using scalar_t = typename S::scalar_t;
  Registers<float, 2> share;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float total = me.total[half];
    total += __shfl_xor_sync(~0u, total, 1);
    total += __shfl_xor_sync(~0u, total, 2);
    share[half] = 1 / total;
    const bool sees = total != 0;
    if (!sees) share[half] = 0;
    if (p.lse && me.lane % 4 == 0 && me.rows[half].t >= 0)
      store_global(p.lse + me.rows[half].t * p.H + head,
                   sees ? me.top[half] * kLn2 + logf(total) : -INFINITY);
  }
  named_barrier_sync(pipeline::kBarrierOfConsumer + me.index, kWarpgroup);  // no product reads q any more
  const int line = me.warp_row + me.lane % 16, piece = me.lane / 16;
#pragma unroll
  for (int column = 0; column < S::kWidth; column += 16) {
    Registers<uint32_t, 4> blocks;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int i = column / 2 + 2 * j;
      const float part = share[j % 2];
      blocks[j] = part == 0 ? 0 : pack<scalar_t>(sums[i] * part, sums[i + 1] * part);
    }
    stmatrix_x4(reinterpret_cast<char*>(shared.q[slot][column / S::kPanel]) +
                    swizzled(line * S::kLine + column % S::kPanel * 2 + piece * 16, S::kSwizzle),
                blocks);
  }
  fence_proxy_async();
  __syncwarp();
  const int first = load_shared(&shared.rows[slot][me.warp_row]).t;
  const int last = load_shared(&shared.rows[slot][me.warp_row + kWarpRows - 1]).t;
  if (p.order == nullptr && last >= 0) {
    if (me.lane == 0) {
#pragma unroll
      for (int panel = 0; panel < S::kPanels; ++panel)
        tma_store_3d(p.out_map, shared.q[slot][panel][me.warp_row], panel * S::kPanel, head, first);
      tma_store_commit();
    }
    return;
  }
  constexpr int kPieces = S::kPanel / 8;
#pragma unroll 1
  for (int panel = 0; panel < S::kPanels; ++panel) {
    const int column = panel * S::kPanel + me.lane % kPieces * 8;
    if (column >= S::kHead) continue;
    for (int row = me.lane / kPieces; row < kWarpRows; row += 32 / kPieces) {
      const int64_t t = load_shared(&shared.rows[slot][me.warp_row + row]).t;
      if (t < 0) continue;
      const auto* const from = reinterpret_cast<const char*>(shared.q[slot][panel]) +
                               swizzled((me.warp_row + row) * S::kLine + me.lane % kPieces * 16, S::kSwizzle);
      store_global(reinterpret_cast<uint4*>(p.out + (t * p.H + head) * S::kHead + column),
                   load_shared(reinterpret_cast<const uint4*>(from)));
    }
  }
}

template <class S>
__device__ __forceinline__ void consume(const Operands<typename S::scalar_t>& p, Shared<S>& shared) {
  Consumer me;
  Ring<Slots> slot;
  Ring<S> k_ring, v_ring;
  int stored = -1;  // the slot of the item ahead, which its stores may still read
  // exp(scale * score) = exp2(factor * prescale * score), and factor > 0.
  const float prescale = p.scale > 0 ? 1 : p.scale * kLog2E, factor = p.scale > 0 ? p.scale * kLog2E : 1;
  if (me.index == 1) me.pass_turn();
  for (;; slot.advance()) {
    mbarrier_wait(shared.q_full[slot.stage], slot.parity);
    const Item item = load_shared(&shared.items[slot.stage]);
    const int head = item.head, blocks = item.blocks;
    const auto leave_stored = [&] {
      __syncwarp();
      if (stored >= 0 && me.lane == 0) {
        tma_store_wait_read<0>();
        mbarrier_arrive(shared.q_empty[stored]);
      }
      stored = slot.stage;
    };
    if (head < 0) break;
    const int own_blocks = ((me.index == 0 ? item.seen[0] : item.seen[1]) + kKeys - 1) / kKeys;
    const uint64_t q =
        wgmma_descriptor(shared.q[slot.stage][0][me.index * kConsumerRows], S::kSwizzle, 16, 8 * S::kLine);
    Sums<S> sums;
#pragma unroll
    for (int i = 0; i < S::kSums; ++i) sums[i] = 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      me.rows[half] = load_shared(&shared.rows[slot.stage][me.row + 8 * half]);
      me.top[half] = -INFINITY;
      me.total[half] = 0;
    }

    if (own_blocks > 0) {
      hold(sums);
      Scores<S> scores;
      Weights weights;
      mbarrier_wait(shared.k_full[k_ring.stage], k_ring.parity);
      me.take_turn();
      wgmma_fence();
      ask_scores<S>(scores, q, shared.k[k_ring.stage]);
      me.pass_turn();
      leave_stored();
      wgmma_wait<0>();
      hold(scores);
      give_back(me, shared.k_empty, k_ring);
      soften<S>(me, scores, 0, prescale, factor);
      round_weights<S>(weights, scores);
#pragma unroll 1
      for (int block = 1; block < own_blocks; ++block) {
        mbarrier_wait(shared.k_full[k_ring.stage], k_ring.parity);
        mbarrier_wait(shared.v_full[v_ring.stage], v_ring.parity);
        me.take_turn();
        wgmma_fence();
        ask_scores<S>(scores, q, shared.k[k_ring.stage]);
        ask_sums<S>(sums, weights, shared.v[v_ring.stage]);
        me.pass_turn();
        wgmma_wait<1>();
        hold(scores);
        give_back(me, shared.k_empty, k_ring);
        const Registers<float, 2> kept = soften<S>(me, scores, block, prescale, factor);
        wgmma_wait<0>();
        hold(sums);
        hold(scores);
        give_back(me, shared.v_empty, v_ring);
#pragma unroll
        for (int i = 0; i < S::kSums; ++i) sums[i] *= kept[row_of(i)];
        round_weights<S>(weights, scores);
      }
      mbarrier_wait(shared.v_full[v_ring.stage], v_ring.parity);
      wgmma_fence();
      ask_sums<S>(sums, weights, shared.v[v_ring.stage]);
      wgmma_wait<0>();
      hold(sums);
      give_back(me, shared.v_empty, v_ring);
    } else {
      leave_stored();
    }
    // What the other consumer alone sees goes by.
    for (int block = own_blocks; block < blocks; ++block) {
      me.take_turn();
      me.pass_turn();
      mbarrier_wait(shared.k_full[k_ring.stage], k_ring.parity);
      mbarrier_wait(shared.v_full[v_ring.stage], v_ring.parity);
      __syncwarp();  // all lanes have seen them full
      give_back(me, shared.k_empty, k_ring);
      give_back(me, shared.v_empty, v_ring);
    }
    store<S>(p, shared, me, slot.stage, head, sums);
  }
  if (me.index == 0) me.take_turn();  // the last that the other passes
  if (me.lane == 0) tma_store_wait_read<0>();
}

template <class S>
__global__ void __launch_bounds__(kThreads, 1)
    head_attention_kernel(const __grid_constant__ Operands<typename S::scalar_t> p) {
  auto& shared = dynamic_shared<Shared<S>>();
  if (threadIdx.x == 0) {
    for (int slot = 0; slot < Slots::kStages; ++slot) {
      mbarrier_init(shared.q_full[slot], 1);
      mbarrier_init(shared.q_empty[slot], kConsumers / 32);
    }
    for (int stage = 0; stage < S::kStages; ++stage) {
      mbarrier_init(shared.k_full[stage], 1);
      mbarrier_init(shared.k_empty[stage], kConsumers / 32);
      mbarrier_init(shared.v_full[stage], 1);
      mbarrier_init(shared.v_empty[stage], kConsumers / 32);
      mbarrier_init(shared.v_landed[stage], 1);
    }
    fence_mbarrier_init();
    prefetch_tensor_map(p.q_map);
    prefetch_tensor_map(p.k_map);
    prefetch_tensor_map(p.v_map);
    prefetch_tensor_map(p.out_map);
  }
  __syncthreads();
  if (threadIdx.x < kWarpgroup) {
    fewer_registers<kProducerRegisters>();
    produce(p, shared);
  } else {
    more_registers<kConsumerRegisters>();
    consume(p, shared);
  }
}

template <class S>
void run(const HeadAttentionCall<typename S::scalar_t>& call, const AttentionSchedule& queries,
         CUstream_st* stream) {
  static_assert(sizeof(Shared<S>) <= 227 * 1024);  // what a block may have
  const auto map = [&](const auto* data, int64_t heads, int64_t rows, int64_t head_stride, int64_t row_stride,
                       int box_rows) {
    return pipeline::tensor_map(data, call.D, heads, rows, head_stride, row_stride, S::kPanel, box_rows,
                                S::kSwizzle);
  };
  Operands<typename S::scalar_t> operands{call, queries, {}, {}, {}, {}};
  operands.q_map = map(call.q, call.H, call.T, call.q_stride_h, call.q_stride_t, kQueries);
  operands.k_map = map(call.k.data, call.G, call.S, call.k.group_stride, call.k.key_stride, kKeys);
  operands.v_map = map(call.v.data, call.G, call.S, call.v.group_stride, call.v.key_stride, kKeys);
  operands.out_map = map(call.out, call.H, call.T, call.D, call.H * call.D, kWarpRows);
  const int64_t items = most_blocks(call.B, call.T, kQueries) * heads_of(call, call.heads);
  launch<head_attention_kernel<S>>(
      {.grid = dim3(static_cast<unsigned>(std::min<int64_t>(items, multiprocessors()))),
       .block = dim3(kThreads),
       .stream = stream,
       .dynamic_shared = sizeof(Shared<S>)},
      operands);
}

}  // namespace

template <class scalar_t>
bool head_attention_fits_sm90(const HeadAttentionCall<scalar_t>& call) {
  using namespace pipeline;
  const auto keys_fit = [&](const KeyView<const scalar_t>& view) {
    return address_fits(view.data) && stride_fits<scalar_t>(view.key_stride) &&
           (call.G == 1 || stride_fits<scalar_t>(view.group_stride));
  };
  return (call.D == 64 || call.D == 80 || call.D == 96 || call.D == 128) && call.seqlens == nullptr &&
         size_fits(call.T) && size_fits(call.S) && address_fits(call.q) &&
         stride_fits<scalar_t>(call.q_stride_t) && (call.H == 1 || stride_fits<scalar_t>(call.q_stride_h)) &&
         keys_fit(call.k) && keys_fit(call.v) && address_fits(call.out);
}

template <class scalar_t>
void head_attention_sm90(const HeadAttentionCall<scalar_t>& call, const AttentionSchedule& queries,
                         CUstream_st* stream) {
  if (heads_of(call, call.heads) == 0) return;
  if (call.D == 64) return run<Shape<scalar_t, 64>>(call, queries, stream);
  if (call.D == 80) return run<Shape<scalar_t, 80>>(call, queries, stream);
  if (call.D == 96) return run<Shape<scalar_t, 96>>(call, queries, stream);
  run<Shape<scalar_t, 128>>(call, queries, stream);
}

#define FLEXTRON_HEAD_ATTENTION_SM90(scalar_t)                                                    \
  template bool head_attention_fits_sm90(const HeadAttentionCall<scalar_t>&);                     \
  template void head_attention_sm90(const HeadAttentionCall<scalar_t>&, const AttentionSchedule&, \
                                    CUstream_st*);
FLEXTRON_HEAD_ATTENTION_SM90(bf16)
FLEXTRON_HEAD_ATTENTION_SM90(fp16)

}  // namespace flextron
