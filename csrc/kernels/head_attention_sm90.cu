// head_attention on Hopper, bf16 and fp16, head sizes 64, 80, 96 and 128.
//
// Blocks walk over the schedule's items. An item is kQueries queries of one head against all keys that any of
// them sees, kKeys at a time from k_start on. In the first warpgroup, one warp loads the queries of the next
// item and one loads keys and values, through rings of stages and by TMA where the rows are neighbours; a
// third clears the values behind a sequence's last key, which belong to another sequence. The other two
// warpgroups are the consumers, each with 64 of the queries. They take turns: while one computes its softmax
// weights, the tensor cores work for the other. Within a consumer they overlap too: it issues the scores of a
// block before the sums of the block ahead, and computes the weights during these.
//
// A row's result does not depend on other rows: a block of which it sees nothing leaves its maximum, its
// total and its sums as they are, and every sum has a fixed order.
#include <algorithm>
#include <cmath>

#include "kernels/device/math.cuh"
#include "kernels/head_attention_panels.cuh"

namespace flextron {
namespace {

using namespace panels;
using pipeline::kThreads;
using pipeline::Ring;

constexpr int kQueries = kRows, kKeys = 128;
constexpr int kProducerRegisters = 56, kConsumerRegisters = 224;  // 168 a thread in all
constexpr int kTurnOfConsumer = 4;  // and the next: named barriers behind the pipeline's
constexpr float kLn2 = 0.69314718f;

template <class scalar, int head>
struct Shape : Panels<scalar, head> {
  static constexpr int kScores = kKeys * kConsumerRows / kWarpgroup;
  static constexpr int kStages = std::min(4, (224 * 1024 / kTileBytes<Shape, kKeys> - 2) / 2);
};

struct Slots {
  static constexpr int kStages = 2;
};

// What the consumers are told of an item.
struct alignas(16) Item {
  int head, blocks;  // of keys; head -1: no more items
  int seen[2];       // keys that one of a consumer's rows sees
};

// Tiles come first: each is a multiple of 1024 bytes, and so is its address.
template <class S>
struct Shared {
  Tile<S, kQueries> q[Slots::kStages];
  Tile<S, kKeys> k[S::kStages], v[S::kStages];
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

// ---- the first warpgroup ----

template <class S>
__device__ __forceinline__ void load_queries(const Operands<typename S::scalar_t>& p, Shared<S>& shared,
                                             Ring<Slots>& slot, const Plan& plan) {
  if (lane_of() == 0)
    store_shared(&shared.items[slot.stage],
                 Item{plan.head, plan.blocks(kKeys), {plan.seen[0], plan.seen[1]}});
  __syncwarp();
  Mbarrier& full = shared.q_full[slot.stage];
  if (p.order) {
    gather<S, kQueries>(shared.q[slot.stage], [&](int row) {
      const int t = load_shared(&shared.rows[slot.stage][row]).t;
      return t < 0 ? nullptr : p.q + t * p.q_stride_t + plan.head * p.q_stride_h;
    });
    gathered();
    __syncwarp();
    if (lane_of() == 0) mbarrier_arrive(full);
  } else if (lane_of() == 0) {
    mbarrier_arrive_expect(full, kTileBytes<S, kQueries>);
    load<S, kQueries>(shared.q[slot.stage], p.q_map, full, plan.head, plan.query);
  }
  slot.advance();
}

// Keys run a block ahead of values: they are needed, and given back, before them.
template <class S>
__device__ __forceinline__ void load_keys(const Operands<typename S::scalar_t>& p, Shared<S>& shared,
                                          Ring<S>& k_ring, Ring<S>& v_ring, const Plan& plan) {
  const int blocks = plan.blocks(kKeys);
  for (int block = 0; block <= blocks; ++block) {
    if (block < blocks) {
      mbarrier_wait(shared.k_empty[k_ring.stage], k_ring.parity ^ 1);
      mbarrier_arrive_expect(shared.k_full[k_ring.stage], kTileBytes<S, kKeys>);
      load<S, kKeys>(shared.k[k_ring.stage], p.k_map, shared.k_full[k_ring.stage], plan.group,
                     plan.first + block * kKeys);
      k_ring.advance();
    }
    if (block > 0) {
      mbarrier_wait(shared.v_empty[v_ring.stage], v_ring.parity ^ 1);
      Mbarrier& full =
          block * kKeys > plan.keys ? shared.v_landed[v_ring.stage] : shared.v_full[v_ring.stage];
      mbarrier_arrive_expect(full, kTileBytes<S, kKeys>);
      load<S, kKeys>(shared.v[v_ring.stage], p.v_map, full, plan.group, plan.first + (block - 1) * kKeys);
      v_ring.advance();
    }
  }
}

// Zeros behind the sequence's last key. By a whole warp; `landed` has the parity of each stage's barrier.
template <class S>
__device__ __forceinline__ void clear_values(Shared<S>& shared, Ring<S>& ring, unsigned& landed,
                                             const Plan& plan) {
  const int blocks = plan.blocks(kKeys);
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
    const Plan plan = plan_of(p, p.queries, item, [&](int row, int t, int end) {
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

// A thread, and what it has of its two rows.
struct Consumer : Place {
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
  put_rows<S>(shared.q[slot], me, [&](int i) {
    const float part = share[row_of(i)];
    return part == 0 ? 0 : sums[i] * part;
  });
  const int first = load_shared(&shared.rows[slot][me.warp_row]).t;
  const int last = load_shared(&shared.rows[slot][me.warp_row + kWarpRows - 1]).t;
  send_rows<S>(shared.q[slot], me, p.order == nullptr && last >= 0, p.out_map, head, first, [&](int row) {
    const int64_t t = load_shared(&shared.rows[slot][row]).t;
    return t < 0 ? nullptr : p.out + (t * p.H + head) * S::kHead;
  });
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
    const uint64_t q = own_rows<S>(shared.q[slot.stage], me.index * kConsumerRows);
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
      Weights<kKeys> weights;
      mbarrier_wait(shared.k_full[k_ring.stage], k_ring.parity);
      me.take_turn();
      wgmma_fence();
      ask_scores<S, kKeys>(scores, q, shared.k[k_ring.stage]);
      me.pass_turn();
      leave_stored();
      wgmma_wait<0>();
      hold(scores);
      give_back(me, shared.k_empty, k_ring);
      soften<S>(me, scores, 0, prescale, factor);
      round_weights<typename S::scalar_t, kKeys>(weights, scores);
#pragma unroll 1
      for (int block = 1; block < own_blocks; ++block) {
        mbarrier_wait(shared.k_full[k_ring.stage], k_ring.parity);
        mbarrier_wait(shared.v_full[v_ring.stage], v_ring.parity);
        me.take_turn();
        wgmma_fence();
        ask_scores<S, kKeys>(scores, q, shared.k[k_ring.stage]);
        ask_sums<S, kKeys>(sums, weights, shared.v[v_ring.stage]);
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
        round_weights<typename S::scalar_t, kKeys>(weights, scores);
      }
      mbarrier_wait(shared.v_full[v_ring.stage], v_ring.parity);
      wgmma_fence();
      ask_sums<S, kKeys>(sums, weights, shared.v[v_ring.stage]);
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
  Operands<typename S::scalar_t> operands{call, queries, {}, {}, {}, {}};
  operands.q_map = map_of<S>(call.q, call.H, call.T, call.q_stride_h, call.q_stride_t, kQueries);
  operands.k_map = map_of<S>(call.k.data, call.G, call.S, call.k.group_stride, call.k.key_stride, kKeys);
  operands.v_map = map_of<S>(call.v.data, call.G, call.S, call.v.group_stride, call.v.key_stride, kKeys);
  operands.out_map = map_of<S>(call.out, call.H, call.T, call.D, call.H * call.D, kWarpRows);
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
