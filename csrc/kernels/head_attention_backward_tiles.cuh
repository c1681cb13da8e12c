// The gradients of head_attention by the tensor cores: bf16 and fp16, D up to 128
// (head_attention_backward_pairs.cuh).
#pragma once

#include <initializer_list>

#include "kernels/head_attention_backward_pairs.cuh"

namespace flextron {
namespace {

using namespace attention;

// 64 own rows, 16 a warp, whose fragments stay in registers; tiles of 64 rows pass through shared memory, two
// stages, and are taken 16 rows at a time. With kKeys and kHead = 128 fragments and sums are 192 registers:
// what the walk over the queries needs is kept in shared memory.
constexpr int kTileRows = kBackwardTileRows;
constexpr int kTileThreads = 128;

// A tile of queries that will pass: written by the first warp while the one before is loaded.
struct NextQueries {
  int head;
  int row[kTileRows];  // of q; -1: none
  int keys[kTileRows];
  int low;
  bool there;
};

template <int kHead>
struct TileShared {
  struct Stage {
    Tile<kTileRows, kHead> first, second;
    float lse[kTileRows], delta[kTileRows];  // of passing queries; lse in base 2
    int keys[kTileRows];                     // they see own keys [low, keys), with a window the last of these
    int low;
  } stage[2];
  NextQueries next[2];
  OwnKeys keys;
  QueryWalk<kTileRows> walk;
};

constexpr float kLog2E = 1.44269504088896340736f;

template <int kHead, class scalar_t, class Rows>
__device__ __forceinline__ void load_pair(typename TileShared<kHead>::Stage& stage, int64_t D, bool aligned,
                                          const Rows& rows) {
  const auto first = [&](int r) { return rows(r).first; };
  const auto second = [&](int r) { return rows(r).second; };
  const int count = static_cast<int>(D);
  if (aligned) {
    load_rows<true, kTileThreads>(stage.first, count, first);
    load_rows<true, kTileThreads>(stage.second, count, second);
  } else {
    load_rows<false, kTileThreads>(stage.first, count, first);
    load_rows<false, kTileThreads>(stage.second, count, second);
  }
}

// The first warp: what passes next.
template <int kHead>
__device__ __forceinline__ void walk_on(TileShared<kHead>& shared, const AttentionCall& call,
                                        NextQueries& next) {
  if (threadIdx.x >= 32) return;
  QueryWalk<kTileRows> walk = shared.walk;
  const bool there = walk.next(call, shared.keys);
  for (int r = threadIdx.x; there && r < kTileRows; r += 32) {
    const Query query = walk.query(call, r);
    store_shared(&next.row[r], static_cast<int>(query.t));
    store_shared(&next.keys[r], query.keys);
  }
  __syncwarp();
  if (threadIdx.x != 0) return;
  shared.walk = walk;
  next.head = walk.head;
  next.low = walk.low();
  next.there = there;
}

// A thread's query of the tile that passes next: read early, put into shared memory late.
struct PassingQuery {
  float lse, delta;

  template <class scalar_t>
  __device__ __forceinline__ void read(const HeadAttentionBackwardCall<scalar_t>& call,
                                       const NextQueries& next) {
    if (threadIdx.x >= kTileRows) return;
    const int64_t t = load_shared(&next.row[threadIdx.x]), place = t * call.H + next.head;
    lse = t < 0 ? 0 : load_global(call.lse + place) * kLog2E;
    delta = t < 0 ? 0 : load_global(call.delta + place);
  }
  template <class Stage>
  __device__ __forceinline__ void put(Stage& stage) const {
    if (threadIdx.x >= kTileRows) return;
    store_shared(&stage.lse[threadIdx.x], lse);
    store_shared(&stage.delta[threadIdx.x], delta);
  }
};

template <int kHead>
using Fragments = Registers<Registers<uint32_t, 4>, kHead / 16>;
template <int kEights>
using Sums = Registers<Registers<float, 4>, kEights>;

// A warp's own rows times 16 rows that pass from `at` on.
template <class scalar_t, int kHead>
__device__ __forceinline__ void scores(Sums<2>& sums, const Fragments<kHead>& own,
                                       const Tile<kTileRows, kHead>& passing, int at, int lane) {
  clear(sums);
#pragma unroll
  for (int k = 0; k < kHead / 16; ++k) {
    Registers<uint32_t, 4> b;
    fragment_b(b, passing, at, k, lane);
    mma_m16n8k16<scalar_t>(sums[0], own[k], b[0], b[1]);
    mma_m16n8k16<scalar_t>(sums[1], own[k], b[2], b[3]);
  }
}

// sums += values, rounded, times the 16 rows that pass.
template <class scalar_t, int kHead>
__device__ __forceinline__ void add_products(Sums<kHead / 8>& sums, const Sums<2>& values,
                                             const Tile<kTileRows, kHead>& passing, int at, int lane) {
  const auto a = as_a<scalar_t>(values[0], values[1]);
#pragma unroll
  for (int n = 0; n < kHead / 16; ++n) {
    Registers<uint32_t, 4> b;
    fragment_b_transposed(b, passing, at, n, lane);
    mma_m16n8k16<scalar_t>(sums[2 * n], a, b[0], b[1]);
    mma_m16n8k16<scalar_t>(sums[2 * n + 1], a, b[2], b[3]);
  }
}

// Sums times a factor, rounded, to the rows that there are, by way of a tile that is free. All threads.
template <class scalar_t, int kHead, class Row>
__device__ __forceinline__ void store_rows(Tile<kTileRows, kHead>& tile, const Sums<kHead / 8>& sums,
                                           float factor, int64_t D, const Row& row_of) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int n = 0; n < kHead / 8; ++n)
#pragma unroll
    for (int half = 0; half < 2; ++half)
      store_shared(reinterpret_cast<uint32_t*>(tile.at(16 * warp + 8 * half + lane / 4, n)) + lane % 4,
                   pack<scalar_t>(sums[n][2 * half] * factor, sums[n][2 * half + 1] * factor));
  __syncthreads();
  for (int r = threadIdx.x / 8; r < kTileRows; r += kTileThreads / 8) {
    scalar_t* const row = row_of(r);
    if (row == nullptr) continue;
    const bool whole = reinterpret_cast<uintptr_t>(row) % 16 == 0;
    for (int piece = threadIdx.x % 8; 8 * piece < D; piece += 8) {
      const uint4 values = load_shared(tile.at(r, piece));
      if (whole && 8 * piece + 8 <= D) {
        store_global(reinterpret_cast<uint4*>(row + 8 * piece), values);
        continue;
      }
      const Registers<uint32_t, 4> words{{values.x, values.y, values.z, values.w}};
#pragma unroll
      for (int j = 0; j < 8; ++j)
        if (8 * piece + j < D)
          store_global(reinterpret_cast<uint16_t*>(row + 8 * piece) + j,
                       static_cast<uint16_t>(words[j / 2] >> (j % 2 * 16)));
    }
  }
}

// With a softcap products become the tanh that it is times, and dP what minus delta is times the slope of
// tanh: here, because both at once are too many registers where dS is made. Products times score_factor() are
// the scores in powers of two, with a softcap and without.
template <bool kSlope, class scalar_t, class Delta>
__device__ __forceinline__ void cap_products(const HeadAttentionBackwardCall<scalar_t>& call,
                                             Sums<2>& products, Sums<2>& dp, const Delta& delta) {
  if (call.softcap == 0) return;
#pragma unroll
  for (int n = 0; n < 2; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float share = tanh_approx(products[n][i] * call.cap_scale);
      products[n][i] = share;
      if (kSlope) dp[n][i] = delta(n, i) + (dp[n][i] - delta(n, i)) * ((1 - share) * (1 + share));
    }
}
template <class scalar_t>
__device__ __forceinline__ float score_factor(const HeadAttentionBackwardCall<scalar_t>& call) {
  return (call.softcap == 0 ? call.scale : call.softcap) * kLog2E;
}

// delta of a block's queries, or dq. `aligned`: rows of q, k, v and dout begin at multiples of 16 bytes.
template <BackwardPart kPart, int kHead, class scalar_t>
__device__ __forceinline__ void pass_keys(TileShared<kHead>& shared,
                                          const HeadAttentionBackwardCall<scalar_t>& call, bool aligned,
                                          OwnQueries<scalar_t, kTileRows> own) {
  constexpr bool kDelta = kPart == BackwardPart::kDelta;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const float factor = score_factor(call);

  Registers<int64_t, 2> place;  // a thread has rows lane / 4 and 8 more of its warp
  Registers<int, 2> keys;
  Registers<float, 2> lse, delta;
  int warp_keys = 0;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const Query query = own.query(16 * warp + 8 * half + lane / 4);
    place[half] = own.place(query.t);
    keys[half] = query.keys;
    lse[half] = query.t < 0 ? 0 : load_global(call.lse + place[half]) * kLog2E;
    delta[half] = kDelta || query.t < 0 ? 0 : load_global(call.delta + place[half]);
    warp_keys = max(warp_keys, keys[half]);
  }
#pragma unroll
  for (int distance = 4; distance < 32; distance *= 2)
    warp_keys = max(warp_keys, __shfl_xor_sync(~0u, warp_keys, distance));

  Sums<kHead / 8> dq;
  Registers<float, 2> sum{{0, 0}};
  if constexpr (!kDelta) clear(dq);
  bool more = own.next();
  if (more) {
    load_pair<kHead, scalar_t>(shared.stage[1], call.D, aligned, [&](int r) { return own.own(r); });
    load_pair<kHead, scalar_t>(shared.stage[0], call.D, aligned, [&](int r) { return own.passing(r); });
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    Fragments<kHead> q, dout;
#pragma unroll
    for (int k = 0; k < kHead / 16; ++k) {
      fragment_a(q[k], shared.stage[1].first, 16 * warp, k, lane);
      fragment_a(dout[k], shared.stage[1].second, 16 * warp, k, lane);
    }
    for (int step = 0; more; step ^= 1) {
      cp_async_wait<0>();
      __syncthreads();  // the stage is there for all, and all have left the other one
      const auto& stage = shared.stage[step];
      const int at = own.at;
      more = own.next();
      if (more)
        load_pair<kHead, scalar_t>(shared.stage[step ^ 1], call.D, aligned,
                                   [&](int r) { return own.passing(r); });
      cp_async_commit();
#pragma unroll 1
      for (int chunk = 0; chunk < kTileRows && at + chunk < warp_keys; chunk += 16) {
        Sums<2> p, ds;
        scores<scalar_t, kHead>(p, q, stage.first, chunk, lane);
        scores<scalar_t, kHead>(ds, dout, stage.second, chunk, lane);
        cap_products<!kDelta>(call, p, ds, [&](int, int i) { return delta[i / 2]; });
#pragma unroll
        for (int n = 0; n < 2; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float probability = exp2_approx(p[n][i] * factor - lse[i / 2]);
            const float gradient = probability * (ds[n][i] - delta[i / 2]);
            // What is not seen may be NaN.
            ds[n][i] =
                sees(keys[i / 2], at + chunk + 8 * n + lane % 4 * 2 + i % 2, call.window) ? gradient : 0;
          }
        if constexpr (kDelta) {
#pragma unroll
          for (int half = 0; half < 2; ++half)
            sum[half] += (ds[0][2 * half] + ds[0][2 * half + 1]) + (ds[1][2 * half] + ds[1][2 * half + 1]);
        } else {
          add_products<scalar_t, kHead>(dq, ds, stage.first, chunk, lane);
        }
      }
    }
    __syncthreads();
  }

  if constexpr (kDelta) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float total = sum_of_row(sum[half]);
      if (lane % 4 == 0 && place[half] >= 0) store_global(call.delta + place[half], total);
    }
  } else {
    store_rows<scalar_t, kHead>(shared.stage[0].first, dq, call.scale, call.D,
                                [&](int r) { return own.dq(r); });
    __syncthreads();
  }
}

// dk and dv of a block's keys.
template <int kHead, class scalar_t>
__device__ __forceinline__ void pass_queries(TileShared<kHead>& shared,
                                             const HeadAttentionBackwardCall<scalar_t>& call, bool aligned) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const float factor = score_factor(call);
  const auto load = [&](int to) {
    const NextQueries& next = shared.next[to];
    load_pair<kHead, scalar_t>(shared.stage[to], call.D, aligned,
                               [&](int r) { return query_pair(call, next.row[r], next.head); });
    if (threadIdx.x < kTileRows)
      store_shared(&shared.stage[to].keys[threadIdx.x], load_shared(&next.keys[threadIdx.x]));
    if (threadIdx.x == 0) shared.stage[to].low = next.low;
  };

  walk_on(shared, call, shared.next[0]);
  __syncthreads();
  bool more = shared.next[0].there;
  if (!more) return;
  PassingQuery query{};
  load_pair<kHead, scalar_t>(shared.stage[1], call.D, aligned,
                             [&](int r) { return key_pair(call, shared.keys, r); });
  load(0);
  cp_async_commit();
  query.read(call, shared.next[0]);
  query.put(shared.stage[0]);
  walk_on(shared, call, shared.next[1]);
  cp_async_wait<0>();
  __syncthreads();

  Fragments<kHead> k, v;
#pragma unroll
  for (int i = 0; i < kHead / 16; ++i) {
    fragment_a(k[i], shared.stage[1].first, 16 * warp, i, lane);
    fragment_a(v[i], shared.stage[1].second, 16 * warp, i, lane);
  }
  Sums<kHead / 8> dk, dv;
  clear(dk);
  clear(dv);
  for (int step = 0; more; step ^= 1) {
    cp_async_wait<0>();
    __syncthreads();  // the stage is there for all, and all have left the other one
    const auto& stage = shared.stage[step];
    more = shared.next[step ^ 1].there;
    if (more) {
      load(step ^ 1);
      query.read(call, shared.next[step ^ 1]);
      walk_on(shared, call, shared.next[step]);
    }
    cp_async_commit();

    const int low = stage.low;
#pragma unroll 1
    for (int chunk = 0; chunk < kTileRows; chunk += 16) {
      Registers<int2, 2> keys;  // of a thread's columns lane % 4 * 2 and the next, then 8 further
#pragma unroll
      for (int n = 0; n < 2; ++n)
        keys[n] = load_shared(reinterpret_cast<const int2*>(&stage.keys[chunk + 8 * n + lane % 4 * 2]));
      const int most = max(max(keys[0].x, keys[0].y), max(keys[1].x, keys[1].y));
      const int least = min(min(keys[0].x, keys[0].y), min(keys[1].x, keys[1].y));
      if (!__any_sync(~0u, most > max(low, 16 * warp) && max(low, least - call.window) < 16 * warp + 16))
        continue;

      Sums<2> p, ds;
      scores<scalar_t, kHead>(p, k, stage.first, chunk, lane);
      scores<scalar_t, kHead>(ds, v, stage.second, chunk, lane);
      cap_products<true>(call, p, ds, [&](int n, int i) {
        return load_shared(&stage.delta[chunk + 8 * n + lane % 4 * 2 + i % 2]);
      });
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const int column = chunk + 8 * n + lane % 4 * 2;
        const float2 lse = load_shared(reinterpret_cast<const float2*>(&stage.lse[column]));
        const float2 delta = load_shared(reinterpret_cast<const float2*>(&stage.delta[column]));
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int key = 16 * warp + i / 2 * 8 + lane / 4;
          const bool visible = key >= low && sees(i % 2 ? keys[n].y : keys[n].x, key, call.window);
          const float probability = exp2_approx(p[n][i] * factor - (i % 2 ? lse.y : lse.x));
          const float gradient = probability * (ds[n][i] - (i % 2 ? delta.y : delta.x));
          p[n][i] = visible ? probability : 0;  // what is not seen may be NaN
          ds[n][i] = visible ? gradient : 0;
        }
      }
      add_products<scalar_t, kHead>(dv, p, stage.second, chunk, lane);
      add_products<scalar_t, kHead>(dk, ds, stage.first, chunk, lane);
    }
    if (more) query.put(shared.stage[step ^ 1]);
  }
  __syncthreads();
  if (call.dk.data)
    store_rows<scalar_t, kHead>(shared.stage[0].first, dk, call.scale, call.D,
                                [&](int r) { return shared.keys.row(call.dk, r); });
  if (call.dv.data)
    store_rows<scalar_t, kHead>(shared.stage[0].second, dv, 1, call.D,
                                [&](int r) { return shared.keys.row(call.dv, r); });
}

template <BackwardPart kPart, class scalar_t, int kHead>
__global__ __launch_bounds__(kTileThreads, 2) void head_attention_backward_kernel(
    const HeadAttentionBackwardCall<scalar_t> call, const AttentionSchedule schedule, bool aligned) {
  auto& shared = dynamic_shared<TileShared<kHead>>();
  if constexpr (kPart == BackwardPart::kKeys) {
    const int64_t items = key_items<kTileRows>(call, schedule);
    for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
      __syncthreads();  // all have left the item before
      if (threadIdx.x == 0) start(call, schedule, item, shared.keys, shared.walk);
      __syncthreads();
      pass_queries<kHead>(shared, call, aligned);
    }
  } else {
    for_each_query_block<kTileRows>(call, schedule,
                                    [&](auto own) { pass_keys<kPart, kHead>(shared, call, aligned, own); });
  }
}

template <class scalar_t>
bool rows_aligned(const HeadAttentionBackwardCall<scalar_t>& call) {
  const auto pieces = [](const void* data, std::initializer_list<int64_t> strides) {
    bool whole = reinterpret_cast<uintptr_t>(data) % 16 == 0;
    for (const int64_t stride : strides) whole &= stride * int64_t{sizeof(scalar_t)} % 16 == 0;
    return whole;
  };
  return pieces(call.q, {call.q_stride_t, call.q_stride_h}) && pieces(call.dout, {call.D}) &&
         pieces(call.k.data, {call.k.page_stride, call.k.key_stride, call.k.group_stride}) &&
         pieces(call.v.data, {call.v.page_stride, call.v.key_stride, call.v.group_stride});
}

template <BackwardPart kPart, int kHead, class scalar_t>
void run_tiles(const HeadAttentionBackwardCall<scalar_t>& call, const AttentionSchedule& schedule,
               CUstream_st* stream) {
  launch<head_attention_backward_kernel<kPart, scalar_t, kHead>>(
      {.grid = dim3(static_cast<unsigned>(kBlocksEach * multiprocessors())),
       .block = dim3(kTileThreads),
       .stream = stream,
       .dynamic_shared = sizeof(TileShared<kHead>)},
      call, schedule, rows_aligned(call));
}

}  // namespace

template <BackwardPart kPart, class scalar_t>
void head_attention_backward_tiles(const HeadAttentionBackwardCall<scalar_t>& call,
                                   const AttentionSchedule& schedule, CUstream_st* stream) {
  dispatch_int(HeadSizes{}, "head_attention_backward", "head size", tile_head(call.D),
               [&](auto head) { run_tiles<kPart, head>(call, schedule, stream); });
}

#define FLEXTRON_HEAD_ATTENTION_BACKWARD_TILES(part, scalar_t)               \
  template void head_attention_backward_tiles<BackwardPart::part, scalar_t>( \
      const HeadAttentionBackwardCall<scalar_t>&, const AttentionSchedule&, CUstream_st*);

}  // namespace flextron
