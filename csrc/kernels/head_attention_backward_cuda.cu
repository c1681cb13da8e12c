// The gradients of head_attention on any GPU: delta, dq, and dk with dv, a kernel each that repeats the
// scores: no sum is shared by blocks, and each has its order.
//
//   P = exp(scale Q K^T - lse), dP = dO V^T, delta = rowsum(P dP), dS = P (dP - delta)
//   dq = scale dS K      dk = scale dS^T Q      dv = P^T dO
//
// A block owns kRows queries of a head, or kRows keys of a group, and passes over tiles of what they meet:
// the keys that its queries see, or the queries that see its keys. Both sides are pairs of matrices:
//
//   block          its own          what passes     sums over what passes
//   kDelta         q, dout          k, v            P dP
//   kQueries       q, dout          k, v            dS times k
//   kKeys          k, v             q, dout         dS times q, P times dout
//
// delta is summed from P dP and not taken as rowsum(dout out), which is free: a 16-bit out is rounded.
// Against plain PyTorch's, dq's error is 1.4 to 1.9 times as large with the sum and 1.6 to 2.3 times with the
// other (12 to 512 keys, D 8 to 128); twice is allowed.
#include <cmath>
#include <initializer_list>

#include "core/math.h"
#include "kernels/device/attention_tile.cuh"
#include "kernels/device/launch.cuh"
#include "kernels/head_attention_cuda.h"
#include "kernels/head_attention_walk.cuh"

namespace flextron {
namespace {

using namespace attention;

// A row of both matrices of a pair; null where there is none, which counts as zeros.
template <class scalar_t>
struct Pair {
  const scalar_t *first, *second;
};

template <class scalar_t>
__device__ __forceinline__ Pair<scalar_t> query_pair(const HeadAttentionBackwardCall<scalar_t>& call,
                                                     int64_t t, int64_t head) {
  if (t < 0) return {};
  return {call.q + t * call.q_stride_t + head * call.q_stride_h, call.dout + (t * call.H + head) * call.D};
}

// A block's own queries, and the keys that they see. Keys are counted from k_start.
template <class scalar_t, int kRows>
struct OwnQueries {
  using Call = HeadAttentionBackwardCall<scalar_t>;
  const Call& call;
  int64_t b, block, head;
  CallSequence s;
  int at, end;  // the tile of keys; where the latest query's end

  __device__ __forceinline__ OwnQueries(const Call& call_, const AttentionSchedule& schedule, int64_t item)
      : call(call_) {
    const AttentionItemPlace place = item_at(schedule, item);
    const AttentionBlock found = schedule.blocks[place.block];
    b = found.sequence, block = found.block, head = head_at(call, found.units, place.item);
    s = sequence_of(call, b);
    at = -kRows, end = 0;
    for (int r = threadIdx.x % 32; r < kRows; r += 32) end = max(end, query(r).keys);
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) end = max(end, __shfl_xor_sync(~0u, end, distance));
  }

  __device__ __forceinline__ bool next() {
    at += kRows;
    return at < end;
  }
  __device__ __forceinline__ Query query(int r) const {
    return query_at(call, s, b, head, block * kRows + r);
  }
  __device__ __forceinline__ int passing_rows() const { return min(end - at, kRows); }
  // Of lse and delta.
  __device__ __forceinline__ int64_t place(int64_t t) const { return t < 0 ? -1 : t * call.H + head; }
  __device__ __forceinline__ scalar_t* dq(int r) const {
    const int64_t t = query(r).t;
    return t < 0 ? nullptr : call.dq + place(t) * call.D;
  }
  __device__ __forceinline__ Pair<scalar_t> own(int r) const { return query_pair(call, query(r).t, head); }
  __device__ __forceinline__ Pair<scalar_t> passing(int r) const {
    if (at + r >= end) return {};
    const auto row = [&](const KeyView<const scalar_t>& view) {
      return view.data + key_offset(call, s, s.k_start + at + r, view.page_stride, view.key_stride) +
             head / call.M * view.group_stride;
    };
    return {row(call.k), row(call.v)};
  }
};

template <class scalar_t>
__device__ __forceinline__ Pair<scalar_t> key_pair(const HeadAttentionBackwardCall<scalar_t>& call,
                                                   const OwnKeys& keys, int r) {
  return {keys.row(call.k, r), keys.row(call.v, r)};
}

// f(queries) for each of a block's items.
template <int kRows, class scalar_t, class F>
__device__ __forceinline__ void for_each_query_block(const HeadAttentionBackwardCall<scalar_t>& call,
                                                     const AttentionSchedule& schedule, const F& f) {
  const int64_t items = schedule.first[*schedule.count];
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x)
    f(OwnQueries<scalar_t, kRows>(call, schedule, item));
}

// How many items there are: of a paged cache those are pages, blocks of keys in them and groups.
template <int kRows>
__device__ __forceinline__ int64_t key_items(const AttentionCall& call, const AttentionSchedule& schedule) {
  if (call.block_table) return call.pages * ((call.S + kRows - 1) / kRows) * call.G;
  return schedule.first[*schedule.count];
}

template <int kRows>
__device__ __forceinline__ void start(const AttentionCall& call, const AttentionSchedule& schedule,
                                      int64_t item, OwnKeys& keys, QueryWalk<kRows>& walk) {
  const auto count = [](int64_t from, int64_t size) {
    return static_cast<int>(min(size - from, int64_t{kRows}));
  };
  if (call.block_table) {
    const int64_t blocks = (call.S + kRows - 1) / kRows, block = item / call.G;
    const int64_t position = block % blocks * kRows;
    keys = {block / blocks, position, item % call.G, count(position, call.S)};
    walk = {};
    return;
  }
  const AttentionItemPlace place = item_at(schedule, item);
  const AttentionBlock block = schedule.blocks[place.block];
  const CallSequence s = sequence_of(call, block.sequence);
  const int64_t begin = s.k_start + block.block * kRows;
  keys = {s.page, s.position + begin, place.item, count(begin, s.S)};
  walk = {};
  walk.enter_sequence(call, keys, block.sequence, begin);
}

// ---- 16-bit types, D up to 128, by the tensor cores ----

// 64 own rows, 16 a warp, whose fragments stay in registers; tiles of 64 rows pass through shared memory, two
// stages, and are taken 16 rows at a time. With kKeys and kHead = 128 fragments and sums are 192 registers:
// what the walk over the queries needs is kept in shared memory.
constexpr int kTileRows = 64;
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
    int keys[kTileRows];                     // they see own keys [low, keys)
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

// delta of a block's queries, or dq. `aligned`: rows of q, k, v and dout begin at multiples of 16 bytes.
template <BackwardPart kPart, int kHead, class scalar_t>
__device__ __forceinline__ void pass_keys(TileShared<kHead>& shared,
                                          const HeadAttentionBackwardCall<scalar_t>& call, bool aligned,
                                          OwnQueries<scalar_t, kTileRows> own) {
  constexpr bool kDelta = kPart == BackwardPart::kDelta;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const float scale = call.scale * kLog2E;

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
#pragma unroll
        for (int n = 0; n < 2; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float probability = exp2_approx(p[n][i] * scale - lse[i / 2]);
            const float gradient = probability * (ds[n][i] - delta[i / 2]);
            // What is not seen may be NaN.
            ds[n][i] = at + chunk + 8 * n + lane % 4 * 2 + i % 2 < keys[i / 2] ? gradient : 0;
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
  const float scale = call.scale * kLog2E;
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
      if (!__any_sync(~0u, most > max(low, 16 * warp) && low < 16 * warp + 16)) continue;

      Sums<2> p, ds;
      scores<scalar_t, kHead>(p, k, stage.first, chunk, lane);
      scores<scalar_t, kHead>(ds, v, stage.second, chunk, lane);
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const int column = chunk + 8 * n + lane % 4 * 2;
        const float2 lse = load_shared(reinterpret_cast<const float2*>(&stage.lse[column]));
        const float2 delta = load_shared(reinterpret_cast<const float2*>(&stage.delta[column]));
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int key = 16 * warp + i / 2 * 8 + lane / 4;
          const bool visible = key >= low && key < (i % 2 ? keys[n].y : keys[n].x);
          const float probability = exp2_approx(p[n][i] * scale - (i % 2 ? lse.y : lse.x));
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

// ---- float, double, and larger D ----

// 32 own rows by 32 that pass, by 256 threads: a thread has rows y and y + 16, columns x and x + 16 of the
// scores, and every 16th column of the sums from x on. The elements of D go through shared memory 32 at a
// time; of the results a block has `width` elements of D at most, the others are other blocks' (blockIdx.y).
constexpr int kPlainRows = 32;
constexpr int kPlainThreads = 256;

template <class real>
struct PlainShared {
  static constexpr int kWidth = sizeof(real) == 8 ? 64 : 128;
  using Chunk = real[32][kPlainRows + 1];  // [element][row]
  // A warp writes to two rows of scores: their banks differ.
  using Scores = real[kPlainRows][kPlainRows + 16];
  union {
    Chunk chunk[4];  // of both pairs
    real passing[kPlainRows][kWidth];
  };
  Scores p, ds;
};

template <class real>
constexpr int kPlainColumns = PlainShared<real>::kWidth / 16;  // of a thread
template <class real>
using PlainSums = Registers<Registers<real, kPlainColumns<real>>, 2>;

template <class scalar_t>
struct PlainKeys {
  const HeadAttentionBackwardCall<scalar_t>& call;
  OwnKeys keys;
  QueryWalk<kPlainRows> walk;

  __device__ __forceinline__ bool next() { return walk.next(call, keys); }
  __device__ __forceinline__ Pair<scalar_t> own(int r) const { return key_pair(call, keys, r); }
  __device__ __forceinline__ int passing_rows() const {
    return min(walk.T - walk.block * kPlainRows, kPlainRows);
  }
  __device__ __forceinline__ Pair<scalar_t> passing(int r) const {
    return query_pair(call, walk.query(call, r).t, walk.head);
  }
};

template <class real, class scalar_t>
__device__ __forceinline__ real element(const scalar_t* row, int64_t d, int64_t D) {
  return row && d < D ? static_cast<real>(load_global(row + d)) : real(0);
}

// sums += values times columns from `column` on of the `count` rows that pass; those of a tile are summed
// apart.
template <class real, class Rows>
__device__ __forceinline__ void add_plain_products(PlainSums<real>& sums, PlainShared<real>& shared,
                                                   const typename PlainShared<real>::Scores& values,
                                                   int64_t column, int64_t D, int count, const Rows& rows) {
  constexpr int kWidth = PlainShared<real>::kWidth;
  const int width = static_cast<int>(min(D - column, int64_t{kWidth}));
  __syncthreads();
  for (int i = threadIdx.x; i < count * kWidth; i += kPlainThreads)
    if (i % kWidth < width)
      store_shared(&shared.passing[i / kWidth][i % kWidth],
                   element<real>(rows(i / kWidth), column + i % kWidth, D));
  __syncthreads();
  const int y = threadIdx.x / 16, x = threadIdx.x % 16;
  PlainSums<real> of_tile{};
#pragma unroll 4
  for (int r = 0; r < count; ++r) {
    const real near = values[y][r], far = values[y + 16][r];
#pragma unroll
    for (int c = 0; c < kPlainColumns<real>; ++c) {
      if (x + 16 * c >= width) continue;
      const real other = shared.passing[r][x + 16 * c];
      of_tile[0][c] = std::fma(near, other, of_tile[0][c]);
      of_tile[1][c] = std::fma(far, other, of_tile[1][c]);
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int c = 0; c < kPlainColumns<real>; ++c) sums[half][c] += of_tile[half][c];
}

template <class real, class scalar_t, class Row>
__device__ __forceinline__ void store_plain(const PlainSums<real>& sums, real factor, int64_t column,
                                            int64_t D, const Row& row_of) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    scalar_t* const row = row_of(threadIdx.x / 16 + 16 * half);
#pragma unroll
    for (int c = 0; c < kPlainColumns<real>; ++c) {
      const int64_t d = column + threadIdx.x % 16 + 16 * c;
      if (row && d < D) store_global(row + d, static_cast<scalar_t>(sums[half][c] * factor));
    }
  }
}

template <class real>
using PlainScores = Registers<Registers<real, 2>, 2>;

// sums += own rows times those that pass, over `count` elements of D.
template <class real>
__device__ __forceinline__ void add_plain_scores(PlainScores<real>& sums,
                                                 const typename PlainShared<real>::Chunk& own,
                                                 const typename PlainShared<real>::Chunk& passing,
                                                 int count) {
  const int y = threadIdx.x / 16, x = threadIdx.x % 16;
  PlainScores<real> of_chunk{};
#pragma unroll 8
  for (int d = 0; d < count; ++d) {
    const Registers<real, 2> mine{{own[d][y], own[d][y + 16]}};
    const Registers<real, 2> theirs{{passing[d][x], passing[d][x + 16]}};
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int j = 0; j < 2; ++j) of_chunk[i][j] = std::fma(mine[i], theirs[j], of_chunk[i][j]);
  }
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int j = 0; j < 2; ++j) sums[i][j] += of_chunk[i][j];
}

template <BackwardPart kPart, class scalar_t, class Own, class real = accumulate_t<scalar_t>>
__device__ __forceinline__ void compute_plain(PlainShared<real>& shared,
                                              const HeadAttentionBackwardCall<scalar_t>& call, Own own) {
  constexpr bool kKeys = kPart == BackwardPart::kKeys, kDelta = kPart == BackwardPart::kDelta;
  const int y = threadIdx.x / 16, x = threadIdx.x % 16;
  const int64_t column = int64_t{blockIdx.y} * shared.kWidth;

  // The two queries of a thread: its rows, or its columns of every tile.
  Registers<int64_t, 2> place;
  Registers<int, 2> keys;
  Registers<real, 2> lse, delta;
  const auto read = [&](const Query& query, int64_t head, int i) {
    place[i] = query.t < 0 ? -1 : query.t * call.H + head;
    keys[i] = query.keys;
    lse[i] = query.t < 0 ? 0 : load_global(call.lse + place[i]);
    delta[i] = kDelta || query.t < 0 ? 0 : load_global(call.delta + place[i]);
  };
  if constexpr (!kKeys) {
#pragma unroll
    for (int i = 0; i < 2; ++i) read(own.query(y + 16 * i), own.head, i);
  }

  PlainSums<real> of_ds{}, of_p{};
  Registers<real, 2> sum{{0, 0}}, whole{{0, 0}};  // of P dP and of P: lse is rounded
  bool passed = false;
  for (; own.next(); passed = true) {
    const int rows = own.passing_rows();
    PlainScores<real> s{}, dp{};
    for (int64_t begin = 0; begin < call.D; begin += 32) {
      const int count = static_cast<int>(min(call.D - begin, int64_t{32})), d = threadIdx.x % 32;
      __syncthreads();
      for (int r = threadIdx.x / 32; d < count && r < kPlainRows; r += kPlainThreads / 32) {
        const Pair<scalar_t> mine = own.own(r), theirs = own.passing(r);
        store_shared(&shared.chunk[0][d][r], element<real>(mine.first, begin + d, call.D));
        store_shared(&shared.chunk[1][d][r], element<real>(mine.second, begin + d, call.D));
        store_shared(&shared.chunk[2][d][r], element<real>(theirs.first, begin + d, call.D));
        store_shared(&shared.chunk[3][d][r], element<real>(theirs.second, begin + d, call.D));
      }
      __syncthreads();
      add_plain_scores<real>(s, shared.chunk[0], shared.chunk[2], count);
      add_plain_scores<real>(dp, shared.chunk[1], shared.chunk[3], count);
    }

    int low = 0;
    if constexpr (kKeys) {
#pragma unroll
      for (int j = 0; j < 2; ++j) read(own.walk.query(call, x + 16 * j), own.walk.head, j);
      low = own.walk.low();
    }
    Registers<real, 2> of_tile{{0, 0}}, p_of_tile{{0, 0}};
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int row = y + 16 * i, passing = x + 16 * j, query = kKeys ? j : i;
        int key = row;
        if constexpr (!kKeys) key = own.at + passing;
        const bool visible = key >= low && key < keys[query];
        const real p = visible ? exp_of(std::fma(s[i][j], call.scale, -lse[query])) : real(0);
        const real ds = visible ? p * (dp[i][j] - delta[query]) : real(0);
        store_shared(&shared.p[row][passing], p);
        store_shared(&shared.ds[row][passing], ds);
        of_tile[i] += ds;
        p_of_tile[i] += p;
      }
#pragma unroll
    for (int i = 0; i < 2; ++i) sum[i] += of_tile[i], whole[i] += p_of_tile[i];
    if constexpr (!kDelta)
      add_plain_products<real>(of_ds, shared, shared.ds, column, call.D, rows,
                               [&](int r) { return own.passing(r).first; });
    if constexpr (kKeys)
      add_plain_products<real>(of_p, shared, shared.p, column, call.D, rows,
                               [&](int r) { return own.passing(r).second; });
  }
  __syncthreads();

  if constexpr (kDelta) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      real total = sum[i], one = whole[i];
#pragma unroll
      for (int distance = 8; distance > 0; distance /= 2) {
        total += __shfl_xor_sync(~0u, total, distance);
        one += __shfl_xor_sync(~0u, one, distance);
      }
      if (x == 0 && place[i] >= 0) store_global(call.delta + place[i], one == 0 ? real(0) : total / one);
    }
  } else if constexpr (!kKeys) {
    store_plain<real, scalar_t>(of_ds, call.scale, column, call.D, [&](int r) { return own.dq(r); });
  } else if (passed) {
    const auto store = [&](const PlainSums<real>& sums, real factor, const KeyView<scalar_t>& view) {
      if (view.data)
        store_plain<real, scalar_t>(sums, factor, column, call.D,
                                    [&](int r) { return own.keys.row(view, r); });
    };
    store(of_ds, call.scale, call.dk);
    store(of_p, real(1), call.dv);
  }
}

template <BackwardPart kPart, class scalar_t>
__global__ __launch_bounds__(kPlainThreads, 2) void head_attention_backward_plain_kernel(
    const HeadAttentionBackwardCall<scalar_t> call, const AttentionSchedule schedule) {
  auto& shared = dynamic_shared<PlainShared<accumulate_t<scalar_t>>>();
  if constexpr (kPart == BackwardPart::kKeys) {
    const int64_t items = key_items<kPlainRows>(call, schedule);
    for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
      PlainKeys<scalar_t> own{call, {}, {}};
      start(call, schedule, item, own.keys, own.walk);
      compute_plain<kPart>(shared, call, own);
    }
  } else {
    for_each_query_block<kPlainRows>(call, schedule,
                                     [&](auto own) { compute_plain<kPart>(shared, call, own); });
  }
}

// ---- launches ----

template <class scalar_t>
bool by_tensor_cores(const AttentionCall& call) {
  return sizeof(scalar_t) == 2 && call.D <= kMostHead;
}

// Blocks that are ready when another ends: items are handed out by their number, the longest first.
constexpr int kBlocksEach = 8;  // of a multiprocessor

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

template <BackwardPart kPart, class scalar_t>
void run(const HeadAttentionBackwardCall<scalar_t>& call, const AttentionSchedule& schedule,
         CUstream_st* stream) {
  if constexpr (sizeof(scalar_t) == 2)
    if (by_tensor_cores<scalar_t>(call))
      return dispatch_int(HeadSizes{}, "head_attention_backward", "head size", tile_head(call.D),
                          [&](auto head) { run_tiles<kPart, head>(call, schedule, stream); });
  constexpr int kWidth = PlainShared<accumulate_t<scalar_t>>::kWidth;
  const int64_t parts = kPart == BackwardPart::kDelta ? 1 : (call.D + kWidth - 1) / kWidth;
  launch<head_attention_backward_plain_kernel<kPart, scalar_t>>(
      {.grid = dim3(static_cast<unsigned>(kBlocksEach * multiprocessors()), static_cast<unsigned>(parts)),
       .block = dim3(kPlainThreads),
       .stream = stream,
       .dynamic_shared = sizeof(PlainShared<accumulate_t<scalar_t>>)},
      call, schedule);
}

}  // namespace

template <class scalar_t>
int64_t head_attention_backward_rows(const HeadAttentionBackwardCall<scalar_t>& call) {
  return by_tensor_cores<scalar_t>(call) ? kTileRows : kPlainRows;
}
template <class scalar_t>
int64_t head_attention_backward_keys(const HeadAttentionBackwardCall<scalar_t>& call) {
  return by_tensor_cores<scalar_t>(call) ? kTileRows : kPlainRows;
}

template <class scalar_t>
void head_attention_backward_cuda(const HeadAttentionBackwardCall<scalar_t>& call,
                                  const AttentionSchedule& queries, const AttentionSchedule& keys,
                                  CUstream_st* stream) {
  if (call.T == 0 || call.heads == 0) return;
  run<BackwardPart::kDelta>(call, queries, stream);
  if (call.dq) run<BackwardPart::kQueries>(call, queries, stream);
  if (call.dk.data || call.dv.data) run<BackwardPart::kKeys>(call, keys, stream);
}

#define FLEXTRON_INSTANCE(scalar_t)                                                              \
  template int64_t head_attention_backward_rows(const HeadAttentionBackwardCall<scalar_t>&);     \
  template int64_t head_attention_backward_keys(const HeadAttentionBackwardCall<scalar_t>&);     \
  template void head_attention_backward_cuda(const HeadAttentionBackwardCall<scalar_t>&,         \
                                             const AttentionSchedule&, const AttentionSchedule&, \
                                             CUstream_st*);
FLEXTRON_INSTANCE(float)
FLEXTRON_INSTANCE(double)
FLEXTRON_INSTANCE(bf16)
FLEXTRON_INSTANCE(fp16)
#undef FLEXTRON_INSTANCE

}  // namespace flextron
