// head_attention's gradients on Hopper, bf16 and fp16, head sizes 64, 80, 96 and 128: delta with dq, and dk
// with dv, a kernel each; the formula is head_attention_backward_pairs.cuh's. Each sum has its order. Each
// type is compiled in a file of its own.
//
//   kernel     own, kRows     what passes, kTileRows at a time     sums over what passes
//   queries    q, dout        k, v                                 P dP, then dS times k
//   keys       k, v           q, dout of the heads that see them   dS times q, P times dout
//
// A block walks over the items of a schedule. The first warp is the producer: it loads the item's own pair,
// in two slots that alternate, and the pairs of tiles that pass, through a ring of stages. The other two
// warpgroups are the consumers, each with 64 of the own rows. Scores and dP of a tile are the own rows times
// the tile's, by wgmma. P and dS stay in registers and are the A of the products that follow; their B is the
// tile again, along its side. The queries' kernel passes over the keys twice, since delta must be complete
// before the first dS.
//
// The gradients of keys are sums over the heads of their group, added in the order of the heads. If there are
// few blocks of keys and groups, each head is an item of its own and a third kernel adds them up: a block
// that owns every head of a group would run last and leave the other SMs idle. The bits are the same.
//
// Tiles whose rows are neighbours and all exist come by TMA. The others (the last tile of a sequence, rows in
// the order of their extents, rows that see no key) are gathered, with zeros for rows that do not exist: 0 x
// NaN is NaN. If queries are in the order of their extents, all four warps of the keys' producer gather, each
// a quarter of a tile, and request the next tile before they wait for this one.
#pragma once

#include <algorithm>
#include <cmath>

#include "kernels/device/math.cuh"
#include "kernels/head_attention_panels.cuh"
#include "kernels/head_attention_walk.cuh"

namespace flextron {
namespace {

using namespace panels;
using attention::OwnKeys;
using attention::Query;
using attention::QueryWalk;
using pipeline::kThreads;
using pipeline::Ring;

constexpr int kTileRows = 64;
// Registers of a thread of the producer's warpgroup and of the consumers', 168 in all: the queries' producer
// has a plan to make, the keys' consumers have sums of two results.
struct QueriesRegisters {
  static constexpr int kProducer = 56, kConsumer = 224;
};
template <bool ordered>
struct KeysRegisters {
  static constexpr int kProducer = ordered ? 56 : 40, kConsumer = ordered ? 224 : 232;
};
constexpr size_t kMostShared = 227 * 1024;  // what a block may have

struct Slots {
  static constexpr int kStages = 2;
};

// What the consumers are told of an item: its own rows are queries, or keys.
struct alignas(16) QueriesItem {
  int head, tiles;  // of keys that pass; head -1: no more items
  int seen[2];      // keys that one of a consumer's rows sees
};
struct alignas(16) KeysItem {
  int group, first, count;  // the first's row of k, and how many there are; group -1: no more items
  int part;                 // where the sums of this one head go; -1: to the gradients
};
enum End : int { kGoesOn, kHeadEnds, kItemEnds };  // behind a tile

// Of a tile of queries that passes; keys are counted from the first of the own.
struct alignas(16) Columns {
  float lse[kTileRows], delta[kTileRows];  // lse in base 2
  int seen[kTileRows];                     // own keys below are seen
  int most, least;                         // of seen
  int end, unused;
};

// What a warp of the producer walks over where queries are in the order of their extents: not in registers,
// of which it has few.
struct OrderedSequence {
  int b, first_query, T;
  int shift;  // of OrderedWalk::seen
  int heads_end;
};

// Tiles come first: each is a multiple of 1024 bytes, and so is its address.
template <class S, int stages>
struct Tiles {
  Tile<S, kRows> own_first[Slots::kStages], own_second[Slots::kStages];
  Tile<S, kTileRows> first[stages], second[stages];
  Mbarrier own_full[Slots::kStages], own_empty[Slots::kStages];
  Mbarrier full[stages], empty[stages];
};
template <class S, int stages>
struct SharedOfQueries : Tiles<S, stages> {
  QueriesItem items[Slots::kStages];
  Row rows[Slots::kStages][kRows];
};
template <class S, int stages>
struct SharedOfKeys : Tiles<S, stages> {
  KeysItem items[Slots::kStages];
  Columns columns[stages];
  OrderedSequence sequences[kWarpgroup / 32];
};

// As many stages as fit, up to four.
template <class scalar, int head>
struct Shape : Panels<scalar, head> {
  static constexpr int kScores = kTileRows * kConsumerRows / kWarpgroup;
  static constexpr int kStages = sizeof(SharedOfKeys<Panels<scalar, head>, 4>) <= kMostShared ? 4 : 3;
};
template <class S>
using QueriesShared = SharedOfQueries<S, S::kStages>;
template <class S>
using KeysShared = SharedOfKeys<S, S::kStages>;

template <class scalar_t>
struct Operands : HeadAttentionBackwardCall<scalar_t> {
  AttentionSchedule schedule;
  float factor;    // of scores, in base 2
  float* partial;  // sums of heads (PartialSums), of keys alone
  int64_t parts;   // that there is room for
  int64_t few;     // with fewer blocks of keys times groups a head is an item
  TensorMap own_first_map, own_second_map, first_map, second_map;
  TensorMap first_result_map, second_result_map;  // dq; dk and dv
};

// ---- the first warp ----

template <class S, class Shared>
__device__ __forceinline__ void load_own(const Operands<typename S::scalar_t>& p, Shared& shared, int slot,
                                         int middle, int row) {
  Mbarrier& full = shared.own_full[slot];
  mbarrier_arrive_expect(full, 2 * kTileBytes<S, kRows>);
  load<S, kRows>(shared.own_first[slot], p.own_first_map, full, middle, row);
  load<S, kRows>(shared.own_second[slot], p.own_second_map, full, middle, row);
}
template <class S, class Shared>
__device__ __forceinline__ void load_tiles(const Operands<typename S::scalar_t>& p, Shared& shared, int stage,
                                           int middle, int row) {
  Mbarrier& full = shared.full[stage];
  mbarrier_arrive_expect(full, 2 * kTileBytes<S, kTileRows>);
  load<S, kTileRows>(shared.first[stage], p.first_map, full, middle, row);
  load<S, kTileRows>(shared.second[stage], p.second_map, full, middle, row);
}

// Tells the consumers that there are no more items.
template <class Shared, class Item>
__device__ __forceinline__ void end_items(Shared& shared, const Ring<Slots>& slot, const Item& none) {
  mbarrier_wait(shared.own_empty[slot.stage], slot.parity ^ 1);
  if (lane_of() != 0) return;
  store_shared(&shared.items[slot.stage], none);
  mbarrier_arrive(shared.own_full[slot.stage]);
}

// Queries and their dout; then the keys that one of them sees, twice where dq is wanted.
template <class S>
__device__ __forceinline__ void produce_for_queries(const Operands<typename S::scalar_t>& p,
                                                    QueriesShared<S>& shared) {
  Ring<Slots> slot;
  Ring<S> ring;
  const int64_t items = p.schedule.first[*p.schedule.count];
  for (int64_t round = 0, item; (item = item_of(round)) < items; ++round) {
    mbarrier_wait(shared.own_empty[slot.stage], slot.parity ^ 1);
    const Plan plan = plan_of(p, p.schedule, item, [&](int row, int t, int end) {
      store_shared(&shared.rows[slot.stage][row], Row{t, end});
    });
    const int tiles = plan.blocks(kTileRows);
    Mbarrier& full = shared.own_full[slot.stage];
    if (lane_of() == 0)
      store_shared(&shared.items[slot.stage], QueriesItem{plan.head, tiles, {plan.seen[0], plan.seen[1]}});
    __syncwarp();
    if (p.order && tiles > 0) {
      const auto row_of_q = [&](int row) { return load_shared(&shared.rows[slot.stage][row]).t; };
      gather<S, kRows>(shared.own_first[slot.stage], [&](int row) {
        const int64_t t = row_of_q(row);
        return t < 0 ? nullptr : p.q + t * p.q_stride_t + plan.head * p.q_stride_h;
      });
      gather<S, kRows>(shared.own_second[slot.stage], [&](int row) {
        const int64_t t = row_of_q(row);
        return t < 0 ? nullptr : p.dout + (t * p.H + plan.head) * S::kHead;
      });
      gathered();
      __syncwarp();
      if (lane_of() == 0) mbarrier_arrive(full);
    } else if (lane_of() == 0) {
      if (tiles > 0)
        load_own<S>(p, shared, slot.stage, plan.head, plan.query);
      else
        mbarrier_arrive(full);
    }
    slot.advance();

#pragma unroll 1
    for (int tile = 0, passes = p.dq ? 2 : 1; tile < passes * tiles; ++tile, ring.advance()) {
      const int first = (tile < tiles ? tile : tile - tiles) * kTileRows, kept = plan.keys - first;
      mbarrier_wait(shared.empty[ring.stage], ring.parity ^ 1);
      __syncwarp();  // all lanes have seen it empty: once it is full, its next phase may pass a late one by
      if (kept >= kTileRows) {
        if (lane_of() == 0) load_tiles<S>(p, shared, ring.stage, plan.group, plan.first + first);
        continue;
      }
      const auto row_in = [&](const KeyView<const typename S::scalar_t>& view) {
        const auto* const from =
            view.data + (plan.first + first) * view.key_stride + plan.group * view.group_stride;
        return [from, kept, stride = view.key_stride](int row) {
          return row < kept ? from + row * stride : nullptr;
        };
      };
      gather<S, kTileRows>(shared.first[ring.stage], row_in(p.k));
      gather<S, kTileRows>(shared.second[ring.stage], row_in(p.v));
      gathered();
      __syncwarp();
      if (lane_of() == 0) mbarrier_arrive(shared.full[ring.stage]);
    }
  }
  end_items(shared, slot, QueriesItem{-1, 0, {0, 0}});
}

// Sums of dk and dv of a block of keys and a head, in float: those of a consumer's thread four by four, each
// beside its neighbour thread's. There are `parts`, one a head's item, or one a block of threads which adds
// up heads; then, of each, whether it was written.
template <class S>
struct PartialSums {
  static constexpr int kFours = S::kSums / 4, kAll = 2 * kFours * kConsumers;
  using Place = const Operands<typename S::scalar_t>&;
  __device__ __forceinline__ static float4* at(Place p, int64_t part, int which, int four, int thread) {
    return reinterpret_cast<float4*>(p.partial) + part * kAll + (which * kFours + four) * kConsumers + thread;
  }
  __device__ __forceinline__ static float* used(Place p, int64_t part) {
    return p.partial + p.parts * kAll * 4 + part;
  }
};

// What the consumers need of each query of the tile that the walk has come to; both of a lane's two queries.
template <class S>
__device__ __forceinline__ void load_queries(const Operands<typename S::scalar_t>& p, KeysShared<S>& shared,
                                             int stage, const QueryWalk<kTileRows>& walk, End end) {
  Columns& columns = shared.columns[stage];
  Registers<int, 2> row;
  bool whole = true;
  int most = 0, least = kRows;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const Query query = walk.any_query(p, lane_of() + 32 * half);
    const int seen = query.keys - walk.first;
    whole &= query.keys > 0;
    row[half] = seen > 0 ? static_cast<int>(query.t) : -1;
    most = max(most, seen);
    least = min(least, max(seen, 0));
    store_shared(&columns.seen[lane_of() + 32 * half], seen);
  }
#pragma unroll
  for (int other = 16; other > 0; other /= 2) {
    most = max(most, __shfl_xor_sync(~0u, most, other));
    least = min(least, __shfl_xor_sync(~0u, least, other));
  }
  whole = __all_sync(~0u, whole);
  if (whole && lane_of() == 0)
    load_tiles<S>(p, shared, stage, walk.head, walk.first_query + walk.block * kTileRows);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t place = int64_t{row[half]} * p.H + walk.head;
    store_shared(&columns.lse[lane_of() + 32 * half],
                 row[half] < 0 ? 0 : load_global(p.lse + place) * kLog2E);
    store_shared(&columns.delta[lane_of() + 32 * half], row[half] < 0 ? 0 : load_global(p.delta + place));
  }
  if (lane_of() == 0) store_shared(reinterpret_cast<int4*>(&columns.most), int4{most, least, end, 0});
  if (!whole) {
    __syncwarp();
    const auto row_of_q = [&](int r) -> int64_t {  // -1 where it sees none of the keys
      if (load_shared(&columns.seen[r]) <= 0) return -1;
      return walk.first_query + walk.block * kTileRows + r;
    };
    gather<S, kTileRows>(shared.first[stage], [&](int r) {
      const int64_t t = row_of_q(r);
      return t < 0 ? nullptr : p.q + t * p.q_stride_t + walk.head * p.q_stride_h;
    });
    gather<S, kTileRows>(shared.second[stage], [&](int r) {
      const int64_t t = row_of_q(r);
      return t < 0 ? nullptr : p.dout + (t * p.H + walk.head) * S::kHead;
    });

    gathered();
  }
  __syncwarp();
  if (lane_of() == 0) {
    if (!whole) mbarrier_arrive(shared.full[stage]);
    mbarrier_arrive(shared.full[stage]);
  }
}

// Items of the keys' kernel, the longest first still.
struct KeysItems {
  int64_t groups;  // blocks of keys times their groups
  int64_t heads;   // items of each: one a head, or one

  template <class scalar_t>
  __device__ __forceinline__ explicit KeysItems(const Operands<scalar_t>& p)
      : groups(p.schedule.first[*p.schedule.count]), heads(groups < p.few ? p.M : 1) {}
};

// Keys of a group's block, and the queries that see them.
struct KeysBlock {
  OwnKeys keys;
  QueryWalk<kTileRows> walk{};

  template <class scalar_t>
  __device__ __forceinline__ KeysBlock(const Operands<scalar_t>& p, int64_t number) {
    const AttentionItemPlace place = item_at(p.schedule, number);
    const AttentionBlock block = p.schedule.blocks[place.block];
    const CallSequence s = sequence_of(p, block.sequence);
    const int64_t begin = s.k_start + block.block * kRows;
    keys = {0, s.position + begin, place.item, static_cast<int>(min(s.S - begin, int64_t{kRows}))};
    walk.enter_sequence(p, keys, block.sequence, begin);
  }
};

// Keys and values of a block; then tile after tile of the queries that see them.
template <class S>
__device__ __forceinline__ void produce_for_keys(const Operands<typename S::scalar_t>& p,
                                                 KeysShared<S>& shared) {
  Ring<Slots> slot;
  Ring<S> ring;
  const KeysItems items(p);
  for (int64_t round = 0, item; (item = item_of(round)) < items.groups * items.heads; ++round) {
    KeysBlock block(p, item / items.heads);
    const OwnKeys& keys = block.keys;
    QueryWalk<kTileRows>& walk = block.walk;
    if (items.heads > 1) walk.keep_head(static_cast<int>(item % items.heads));
    const bool any = walk.next(p, keys);
    if (items.heads > 1 && lane_of() == 0) store_global(PartialSums<S>::used(p, item), any ? 1.0f : 0.0f);
    if (!any) continue;

    mbarrier_wait(shared.own_empty[slot.stage], slot.parity ^ 1);
    if (lane_of() == 0) {
      const int group = static_cast<int>(keys.group), first = static_cast<int>(keys.position);
      store_shared(&shared.items[slot.stage],
                   KeysItem{group, first, keys.count, items.heads > 1 ? static_cast<int>(item) : -1});
      load_own<S>(p, shared, slot.stage, group, first);
    }
    slot.advance();
    for (bool more = true; more; ring.advance()) {
      const QueryWalk<kTileRows> here = walk;
      more = walk.next(p, keys);
      mbarrier_wait(shared.empty[ring.stage], ring.parity ^ 1);
      load_queries<S>(p, shared, ring.stage, here,
                      !more                    ? kItemEnds
                      : walk.head != here.head ? kHeadEnds
                                               : kGoesOn);
    }
  }
  end_items(shared, slot, KeysItem{-1, 0, 0, 0});
}

// The queries that see a block's keys, where rows are in the order of their extents: head after head, tile
// after tile. Rows are looked up for several tiles at once, as each is two loads one after the other.
struct OrderedWalk {
  static constexpr int kTiles = 2;  // 4: 56 bytes spilled
  const OrderedSequence& of;
  int head = -1, next_head;        // as QueryWalk's
  Registers<int, 2 * kTiles> row;  // of q: rows first_row + lane, 32 further, ...; -1 where none sees a key
  int first_row = 0;
  uint32_t tiles = 0;  // of these, those that are still to come
  bool ended = true;   // no row behind these has the head

  __device__ __forceinline__ OrderedWalk(const AttentionCall& call, const QueryWalk<kTileRows>& at,
                                         OrderedSequence& room)
      : of(room), next_head(at.next_head) {
    const int shift = at.S - at.k_start - at.first - (call.causal ? at.first_query + at.T - 1 : 0);
    __syncwarp();  // no lane reads what was there
    if (lane_of() == 0) room = {at.b, at.first_query, at.T, shift, at.heads_end};
    __syncwarp();
  }

  // Keys from the block's first on that row t of q sees; none where it is below 0.
  __device__ __forceinline__ int seen(const AttentionCall& call, int t) const {
    return load_shared(&of.shift) + (call.causal ? t : 0);
  }

  // To the next tile with a row that sees one of the keys: this lane's two rows of it.
  __device__ __forceinline__ bool next(const AttentionCall& call, Registers<int, 2>& rows) {
    while (tiles == 0) {
      first_row += kTiles * kTileRows;
      if (ended) {
        if (next_head == load_shared(&of.heads_end)) return false;
        head = call.index ? static_cast<int>(head_at(call, call.heads, next_head)) : next_head;
        ++next_head;
        first_row = 0;
      }
      look_up(call);
    }
    const int tile = __ffs(static_cast<int>(tiles)) - 1;
    tiles &= tiles - 1;
#pragma unroll
    for (int i = 0; i < kTiles; ++i)
      if (i == tile) rows[0] = row[2 * i], rows[1] = row[2 * i + 1];
    return true;
  }

 private:
  __device__ __forceinline__ void look_up(const AttentionCall& call) {
    int lane = lane_of();
    forget(lane);
#pragma unroll
    for (int i = 0; i < 2 * kTiles; ++i) {
      const int at = first_row + 32 * i + lane;
      row[i] = at < load_shared(&of.T)
                   ? static_cast<int>(load_global(call.order + load_shared(&of.first_query) + at))
                   : -1;
    }
#pragma unroll
    for (int i = 0; i < 2 * kTiles; ++i)
      if (row[i] >= 0 && !head_active(call, units_of(call, load_shared(&of.b), row[i]), head)) row[i] = -1;
    ended = __shfl_sync(~0u, row[2 * kTiles - 1], 31) < 0;  // extents descend
#pragma unroll
    for (int i = 0; i < 2 * kTiles; ++i) {
      if (row[i] >= 0 && seen(call, row[i]) <= 0) row[i] = -1;
      if (__any_sync(~0u, row[i] >= 0)) tiles |= 1u << i / 2;
    }
  }
};

// A quarter of a tile, of which this lane has two rows: asked for. `walk` is in the tile's sequence.
template <class S>
__device__ __forceinline__ void load_ordered(const Operands<typename S::scalar_t>& p, KeysShared<S>& shared,
                                             int stage, const OrderedWalk& walk,
                                             const Registers<int, 2>& rows) {
  constexpr int kQuarter = kTileRows / 4;
  static_assert(kQuarter == 16);
  Columns& columns = shared.columns[stage];
  int warp = threadIdx.x / 32, lane = lane_of();
  forget(warp), forget(lane);  // what follows from them would stay in registers, of which there are few
  if (warp == 0) {
    int most = 0, least = kRows;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int seen = rows[half] < 0 ? 0 : walk.seen(p, rows[half]);
      most = max(most, seen), least = min(least, seen);
    }
#pragma unroll
    for (int other = 16; other > 0; other /= 2) {
      most = max(most, __shfl_xor_sync(~0u, most, other));
      least = min(least, __shfl_xor_sync(~0u, least, other));
    }
    if (lane == 0) store_shared(reinterpret_cast<int2*>(&columns.most), int2{most, least});
  }
  const int head = walk.head;
  // Lanes 0 .. 15 and again 16 .. 31: the quarter's rows.
  const int t = __shfl_sync(~0u, warp < 2 ? rows[0] : rows[1], warp % 2 * kQuarter + lane % kQuarter);
  constexpr int kPieces = S::kPanel / 8;
  const auto ask = [&](auto& tile, const typename S::scalar_t* data, int64_t row, int64_t middle) {
#pragma unroll 1
    for (int i = lane / kPieces; i < kQuarter; i += 32 / kPieces) {
      const int from = __shfl_sync(~0u, t, i);
      const auto* const source = data + from * row + head * middle + lane % kPieces * 8;
      const uint32_t to = swizzled((warp * kQuarter + i) * S::kLine + lane % kPieces * 16, S::kSwizzle);
#pragma unroll
      for (int panel = 0; panel < S::kPanels; ++panel) {
        const bool there = from >= 0 && panel * S::kPanel + lane % kPieces * 8 < S::kHead;
        cp_async_16(reinterpret_cast<char*>(tile[panel]) + to, there ? source + panel * S::kPanel : data,
                    there ? 16 : 0);
      }
    }
  };
  ask(shared.first[stage], p.q, p.q_stride_t, p.q_stride_h);
  ask(shared.second[stage], p.dout, p.H * S::kHead, S::kHead);
  cp_async_commit();
  if (lane >= kQuarter) return;
  const int64_t place = int64_t{t} * p.H + head;
  store_shared(&columns.seen[warp * kQuarter + lane], t < 0 ? 0 : walk.seen(p, t));
  store_shared(&columns.lse[warp * kQuarter + lane], t < 0 ? 0 : load_global(p.lse + place) * kLog2E);
  store_shared(&columns.delta[warp * kQuarter + lane], t < 0 ? 0 : load_global(p.delta + place));
}

// This warp's quarter of a stage is there, but for the `pending` newest tiles.
template <int pending>
__device__ __forceinline__ void arrive_ordered(Mbarrier& full) {
  cp_async_wait<pending>();
  fence_proxy_async();
  __syncwarp();
  if (lane_of() == 0) mbarrier_arrive(full);
}

// As produce_for_keys, by all four warps: each walks by itself, and they come to the same tiles.
template <class S>
__device__ __forceinline__ void produce_for_ordered_keys(const Operands<typename S::scalar_t>& p,
                                                         KeysShared<S>& shared) {
  const bool leads = threadIdx.x < 32;
  Ring<Slots> slot;
  Ring<S> ring;
  for (int round = 0;; ++round) {
    const KeysItems items(p);  // again for every item: registers are few
    const int item = static_cast<int>(item_of(round));
    if (item >= items.groups * items.heads) break;
    const int heads = static_cast<int>(items.heads);
    KeysBlock block(p, item / heads);
    if (heads > 1) block.walk.keep_head(item % heads);
    OrderedWalk walk(p, block.walk, shared.sequences[threadIdx.x / 32]);
    Registers<int, 2> rows;
    const bool any = walk.next(p, rows);
    if (heads > 1 && threadIdx.x == 0) store_global(PartialSums<S>::used(p, item), any ? 1.0f : 0.0f);
    if (!any) continue;

    if (leads) {
      mbarrier_wait(shared.own_empty[slot.stage], slot.parity ^ 1);
      if (lane_of() == 0) {
        const int group = static_cast<int>(block.keys.group), first = static_cast<int>(block.keys.position);
        store_shared(&shared.items[slot.stage],
                     KeysItem{group, first, block.keys.count, heads > 1 ? item : -1});
        load_own<S>(p, shared, slot.stage, group, first);
      }
    }
    slot.advance();
    int under_way = -1;  // a stage
    for (bool more = true; more; ring.advance()) {
      mbarrier_wait(shared.empty[ring.stage], ring.parity ^ 1);
      __syncwarp();  // all lanes have seen it empty
      load_ordered<S>(p, shared, ring.stage, walk, rows);
      if (under_way >= 0) arrive_ordered<1>(shared.full[under_way]);
      under_way = ring.stage;
      const int head = walk.head;
      more = walk.next(p, rows);
      const End end = !more ? kItemEnds : walk.head != head ? kHeadEnds : kGoesOn;
      if (threadIdx.x == 0) store_shared(&shared.columns[ring.stage].end, static_cast<int>(end));
    }
    arrive_ordered<0>(shared.full[under_way]);
  }
  if (leads) end_items(shared, slot, KeysItem{-1, 0, 0, 0});
}

// ---- the consumers ----

template <class S>
using Scores = Registers<float, S::kScores>;
template <class S>
using Sums = Registers<float, S::kSums>;

template <class S>
__device__ __forceinline__ void clear(Sums<S>& sums) {
#pragma unroll
  for (int i = 0; i < S::kSums; ++i) sums[i] = 0;
}

// Every warp gives a stage back by itself, when all of its lanes have left it.
template <class S, class Shared>
__device__ __forceinline__ void give_back(const Place& me, Shared& shared, Ring<S>& ring) {
  if (me.lane == 0) mbarrier_arrive(shared.empty[ring.stage]);
  ring.advance();
}

// A consumer's sums, times a factor, to where the own rows of the same tile lay, and out.
template <class S, class RowAt>
__device__ __forceinline__ void store(Tile<S, kRows>& tile, const Place& me, const Sums<S>& sums,
                                      float factor, bool neighbours, const TensorMap& map, int middle,
                                      int first, const RowAt& row_at) {
  put_rows<S>(tile, me, [&](int i) { return sums[i] * factor; });
  send_rows<S>(tile, me, neighbours, map, middle, first, row_at);
}

// A warp is done with a slot: its stores have read it.
template <class Shared>
__device__ __forceinline__ void leave(const Place& me, Shared& shared, int slot) {
  __syncwarp();
  if (me.lane == 0) {
    tma_store_wait_read<0>();
    mbarrier_arrive(shared.own_empty[slot]);
  }
}

template <class S>
__device__ __forceinline__ void consume_for_queries(const Operands<typename S::scalar_t>& p,
                                                    QueriesShared<S>& shared) {
  using scalar_t = typename S::scalar_t;
  const Place me;
  Ring<Slots> slot;
  Ring<S> ring;
  for (;; slot.advance()) {
    mbarrier_wait(shared.own_full[slot.stage], slot.parity);
    const QueriesItem item = load_shared(&shared.items[slot.stage]);
    const int head = item.head, tiles = item.tiles;
    if (head < 0) break;
    const int own_tiles = ((me.index == 0 ? item.seen[0] : item.seen[1]) + kTileRows - 1) / kTileRows;

    const uint64_t q = own_rows<S>(shared.own_first[slot.stage], me.index * kConsumerRows);
    const uint64_t dout = own_rows<S>(shared.own_second[slot.stage], me.index * kConsumerRows);
    Registers<Row, 2> rows;
    Registers<float, 2> lse, delta;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      rows[half] = load_shared(&shared.rows[slot.stage][me.row + 8 * half]);
      const int64_t t = rows[half].t;
      lse[half] = t < 0 ? 0 : load_global(p.lse + t * p.H + head) * kLog2E;
      delta[half] = 0;
    }

    // ds = P (dP - delta) of the ring's next tile, zeros where a row sees no key; dP is `ds` before.
    const auto compute = [&](Scores<S>& scores, Scores<S>& ds, int tile) {
      wgmma_fence();
      ask_scores<S, kTileRows>(scores, q, shared.first[ring.stage]);
      ask_scores<S, kTileRows>(ds, dout, shared.second[ring.stage]);
      wgmma_wait<1>();
      hold(scores);
#pragma unroll
      for (int i = 0; i < S::kScores; ++i)
        scores[i] = exp2_approx(fmaf(scores[i], p.factor, -lse[row_of(i)]));
      wgmma_wait<0>();
      hold(ds);
#pragma unroll
      for (int i = 0; i < S::kScores; ++i) ds[i] = scores[i] * (ds[i] - delta[row_of(i)]);
      if (min(rows[0].seen, rows[1].seen) >= (tile + 1) * kTileRows) return;
#pragma unroll
      for (int i = 0; i < S::kScores; ++i)  // what is not seen may be NaN
        if (tile * kTileRows + column_of(i, me.lane) >= rows[row_of(i)].seen) ds[i] = 0;
    };
    // f(tile) for every tile of which one of the consumer's rows sees a key; the others go by.
    const auto for_each_tile = [&](const auto& f) {
#pragma unroll 1
      for (int tile = 0; tile < tiles; ++tile) {
        mbarrier_wait(shared.full[ring.stage], ring.parity);
        if (tile < own_tiles) f(tile);
        __syncwarp();  // all lanes have seen it full
        give_back(me, shared, ring);
      }
    };

    Registers<float, 2> sum{{0, 0}};
    for_each_tile([&](int tile) {
      Scores<S> scores, products;
      compute(scores, products, tile);
#pragma unroll
      for (int i = 0; i < S::kScores; ++i) sum[row_of(i)] += products[i];
    });
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float total = sum[half];
      total += __shfl_xor_sync(~0u, total, 1);
      total += __shfl_xor_sync(~0u, total, 2);
      delta[half] = total;
      if (me.lane % 4 == 0 && rows[half].t >= 0)
        store_global(p.delta + int64_t{rows[half].t} * p.H + head, total);
    }
    if (p.dq) {
      Sums<S> dq;
      clear<S>(dq);
      hold(dq);
      for_each_tile([&](int tile) {
        Scores<S> scores, ds;
        compute(scores, ds, tile);
        Weights<kTileRows> weights;
        round_weights<scalar_t, kTileRows>(weights, ds);
        wgmma_fence();
        ask_sums<S, kTileRows>(dq, weights, shared.first[ring.stage]);
        wgmma_wait<0>();
        hold(dq);
      });
      named_barrier_sync(pipeline::kBarrierOfConsumer + me.index, kWarpgroup);  // no product reads q any more
      const int first = load_shared(&shared.rows[slot.stage][me.warp_row]).t;
      const int last = load_shared(&shared.rows[slot.stage][me.warp_row + kWarpRows - 1]).t;
      store<S>(shared.own_first[slot.stage], me, dq, p.scale, p.order == nullptr && last >= 0,
               p.first_result_map, head, first, [&](int row) {
                 const int64_t t = load_shared(&shared.rows[slot.stage][row]).t;
                 return t < 0 ? nullptr : p.dq + (t * p.H + head) * S::kHead;
               });
    }
    leave(me, shared, slot.stage);
  }
}

template <class S>
__device__ __forceinline__ void consume_for_keys(const Operands<typename S::scalar_t>& p,
                                                 KeysShared<S>& shared) {
  using scalar_t = typename S::scalar_t;
  const Place me;
  Ring<Slots> slot;
  Ring<S> ring;
  for (;; slot.advance()) {
    mbarrier_wait(shared.own_full[slot.stage], slot.parity);
    if (load_shared(&shared.items[slot.stage]).group < 0) break;
    const uint64_t k = own_rows<S>(shared.own_first[slot.stage], me.index * kConsumerRows);
    const uint64_t v = own_rows<S>(shared.own_second[slot.stage], me.index * kConsumerRows);
    Sums<S> dk, dv;
    clear<S>(dk);
    clear<S>(dv);
    hold(dk);
    hold(dv);
    bool before = false;  // whether there are sums of heads before
    // sums += those of the heads before, where there are any; then to `part`, unless it is below 0.
    const auto add_heads = [&](Sums<S>& sums, int which, bool add, int64_t part) {
#pragma unroll
      for (int i = 0; i < S::kSums; i += 4) {
        if (add) {
          const float4 x = load_global(PartialSums<S>::at(p, blockIdx.x, which, i / 4, me.thread));
          sums[i] += x.x, sums[i + 1] += x.y, sums[i + 2] += x.z, sums[i + 3] += x.w;
        }
        if (part >= 0)
          store_global(PartialSums<S>::at(p, part, which, i / 4, me.thread),
                       make_float4(sums[i], sums[i + 1], sums[i + 2], sums[i + 3]));
      }
    };
    int end = kGoesOn;
    const auto leave_tile = [&] {
      give_back(me, shared, ring);
      if (end != kHeadEnds) return;
      add_heads(dk, 0, before, blockIdx.x);
      add_heads(dv, 1, before, blockIdx.x);
      before = true;
      clear<S>(dk);
      clear<S>(dv);
      hold(dk);
      hold(dv);
    };
#pragma unroll 1
    for (; end != kItemEnds; leave_tile()) {
      const int stage = ring.stage;
      const Columns& columns = shared.columns[stage];
      mbarrier_wait(shared.full[stage], ring.parity);
      const int4 of_tile = load_shared(reinterpret_cast<const int4*>(&columns.most));
      const int most = of_tile.x, least = of_tile.y;
      end = of_tile.z;
      __syncwarp();  // all lanes have seen it full
      if (most <= me.index * kConsumerRows) continue;

      const auto column_pair = [&](const auto* values, int i) {  // of value i, a multiple of 4
        return load_shared(reinterpret_cast<const float2*>(values + column_of(i, me.lane)));
      };
      const bool all_seen = least >= (me.index + 1) * kConsumerRows;
      // What is not seen may be NaN.
      const auto mask = [&](Scores<S>& scores, Scores<S>& ds) {
        if (all_seen) return;
#pragma unroll
        for (int i = 0; i < S::kScores; i += 4) {
          const int2 seen = load_shared(reinterpret_cast<const int2*>(columns.seen + column_of(i, me.lane)));
#pragma unroll
          for (int j = 0; j < 4; ++j)
            if (me.row + 8 * row_of(j) >= (j % 2 ? seen.y : seen.x)) scores[i + j] = ds[i + j] = 0;
        }
      };

      Scores<S> scores, ds;
      wgmma_fence();
      ask_scores<S, kTileRows>(scores, k, shared.first[stage]);
      ask_scores<S, kTileRows>(ds, v, shared.second[stage]);
      wgmma_wait<1>();
      hold(scores);
#pragma unroll
      for (int i = 0; i < S::kScores; i += 4) {
        const float2 lse = column_pair(columns.lse, i);
#pragma unroll
        for (int j = 0; j < 4; ++j)
          scores[i + j] = exp2_approx(fmaf(scores[i + j], p.factor, -(j % 2 ? lse.y : lse.x)));
      }
      wgmma_wait<0>();
      hold(ds);
#pragma unroll
      for (int i = 0; i < S::kScores; i += 4) {
        const float2 delta = column_pair(columns.delta, i);
#pragma unroll
        for (int j = 0; j < 4; ++j) ds[i + j] = scores[i + j] * (ds[i + j] - (j % 2 ? delta.y : delta.x));
      }
      mask(scores, ds);
      Weights<kTileRows> weights, ds_weights;
      round_weights<scalar_t, kTileRows>(weights, scores);
      round_weights<scalar_t, kTileRows>(ds_weights, ds);
      wgmma_fence();
      ask_sums<S, kTileRows>(dv, weights, shared.second[stage]);
      ask_sums<S, kTileRows>(dk, ds_weights, shared.first[stage]);
      wgmma_wait<0>();
      hold(dv);
      hold(dk);
    }

    named_barrier_sync(pipeline::kBarrierOfConsumer + me.index,
                       kWarpgroup);  // no product reads k and v any more
    const KeysItem item = load_shared(&shared.items[slot.stage]);
    if (before || item.part >= 0) {
      add_heads(dk, 0, before, item.part);
      add_heads(dv, 1, before, item.part);
    }
    if (item.part >= 0) {
      leave(me, shared, slot.stage);
      continue;
    }
    const auto store_keys = [&](Tile<S, kRows>& tile, const Sums<S>& sums, float factor,
                                const KeyView<scalar_t>& view, const TensorMap& map) {
      if (view.data == nullptr) return;
      scalar_t* const from = view.data + item.first * view.key_stride + item.group * view.group_stride;
      store<S>(tile, me, sums, factor, me.warp_row + kWarpRows <= item.count, map, item.group,
               item.first + me.warp_row,
               [&](int row) { return row < item.count ? from + row * view.key_stride : nullptr; });
    };
    store_keys(shared.own_first[slot.stage], dk, p.scale, p.dk, p.first_result_map);
    store_keys(shared.own_second[slot.stage], dv, 1, p.dv, p.second_result_map);
    leave(me, shared, slot.stage);
  }
}

// ---- the kernels ----

// Barriers, by one thread; then all meet. `arrivals` of the producer make a stage full.
template <class S, class Shared>
__device__ __forceinline__ void start(Shared& shared, const Operands<typename S::scalar_t>& p, int arrivals) {
  if (threadIdx.x == 0) {
    for (int slot = 0; slot < Slots::kStages; ++slot) {
      mbarrier_init(shared.own_full[slot], 1);
      mbarrier_init(shared.own_empty[slot], kConsumers / 32);
    }
    for (int stage = 0; stage < S::kStages; ++stage) {
      mbarrier_init(shared.full[stage], arrivals);
      mbarrier_init(shared.empty[stage], kConsumers / 32);
    }
    fence_mbarrier_init();
    prefetch_tensor_map(p.own_first_map);
    prefetch_tensor_map(p.own_second_map);
    prefetch_tensor_map(p.first_map);
    prefetch_tensor_map(p.second_map);
  }
  __syncthreads();
}

template <class S>
__global__ void __launch_bounds__(kThreads, 1)
    head_attention_backward_queries_kernel(const __grid_constant__ Operands<typename S::scalar_t> p) {
  auto& shared = dynamic_shared<QueriesShared<S>>();
  start<S>(shared, p, 1);
  if (threadIdx.x < kWarpgroup) {
    fewer_registers<QueriesRegisters::kProducer>();
    if (threadIdx.x < 32) produce_for_queries<S>(p, shared);
  } else {
    more_registers<QueriesRegisters::kConsumer>();
    consume_for_queries<S>(p, shared);
  }
}

// ordered: there is an order of the queries.
template <class S, bool ordered>
__global__ void __launch_bounds__(kThreads, 1)
    head_attention_backward_keys_kernel(const __grid_constant__ Operands<typename S::scalar_t> p) {
  auto& shared = dynamic_shared<KeysShared<S>>();
  start<S>(shared, p, ordered ? kWarpgroup / 32 : 2);
  if (threadIdx.x < kWarpgroup) {
    fewer_registers<KeysRegisters<ordered>::kProducer>();
    if constexpr (ordered)
      produce_for_ordered_keys<S>(p, shared);
    else if (threadIdx.x < 32)
      produce_for_keys<S>(p, shared);
  } else {
    more_registers<KeysRegisters<ordered>::kConsumer>();
    consume_for_keys<S>(p, shared);
  }
}

// Heads that were items are added in their order: by threads as the consumers', each block some of their
// fours.
constexpr int kSumBlocks = 8;  // for each group of a block of keys
template <class S>
__global__ void __launch_bounds__(kConsumers)
    head_attention_backward_sums_kernel(const __grid_constant__ Operands<typename S::scalar_t> p) {
  using scalar_t = typename S::scalar_t;
  grid_dependency_wait();
  const KeysItems items(p);
  if (items.heads == 1) return;
  const int thread = threadIdx.x, lane = thread % 32, first_row = thread / 32 * kWarpRows + lane / 4;
  for (int64_t number = blockIdx.x; number < items.groups; number += gridDim.x) {
    const OwnKeys keys = KeysBlock(p, number).keys;
    for (int four = blockIdx.y; four < 2 * PartialSums<S>::kFours; four += gridDim.y) {
      const int which = four / PartialSums<S>::kFours, i = four % PartialSums<S>::kFours * 4;
      const KeyView<scalar_t>& view = which ? p.dv : p.dk;
      if (view.data == nullptr || column_of(i, lane) >= S::kHead) continue;
      float4 sum = make_float4(0, 0, 0, 0);
      bool any = false;
      for (int64_t part = number * p.M; part < (number + 1) * p.M; ++part) {
        if (load_global(PartialSums<S>::used(p, part)) == 0) continue;
        const float4 x = load_global(PartialSums<S>::at(p, part, which, i / 4, thread));
        sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
        any = true;
      }
      if (!any) continue;
      const float factor = which ? 1 : p.scale;
      const auto store_pair = [&](int row, float low, float high) {
        if (scalar_t* const to = keys.row(view, row))
          store_global(reinterpret_cast<uint32_t*>(to + column_of(i, lane)),
                       pack<scalar_t>(low * factor, high * factor));
      };
      store_pair(first_row, sum.x, sum.y);
      store_pair(first_row + 8, sum.z, sum.w);
    }
  }
}

template <auto kernel, class Shared, class Params>
void start_blocks(int64_t items, const Params& params, CUstream_st* stream) {
  static_assert(sizeof(Shared) <= kMostShared);
  launch<kernel>({.grid = dim3(static_cast<unsigned>(std::min<int64_t>(items, multiprocessors()))),
                  .block = dim3(kThreads),
                  .stream = stream,
                  .dynamic_shared = sizeof(Shared)},
                 params);
}

// Blocks of keys times groups at most.
int64_t most_groups(const AttentionCall& call) {
  return most_blocks(call.B, call.S, kRows) * groups_of(call, call.heads);
}
// With fewer than these a head is an item. The longest item of a causal mask is twice the mean: two of them a
// multiprocessor are an even share. Extents of tokens make the longest group longer still.
int64_t few_of(const AttentionCall& call) {
  const int64_t halves = call.order ? 4 : 3;
  return std::min<int64_t>(halves * multiprocessors() / 2, most_groups(call) + 1);
}
int64_t parts_of(const AttentionCall& call) {
  return std::max<int64_t>(few_of(call) * call.M, multiprocessors());
}

template <class S>
int64_t partial_of(const AttentionCall& call) {
  return parts_of(call) * (4 * PartialSums<S>::kAll + 1);
}

template <class S>
void run(const HeadAttentionBackwardCall<typename S::scalar_t>& call, const AttentionSchedule& queries,
         const AttentionSchedule& keys, float* partial, CUstream_st* stream) {
  const auto queries_map = [&](const auto* data, int64_t head_stride, int64_t row_stride, int box) {
    return map_of<S>(data, call.H, call.T, head_stride, row_stride, box);
  };
  const auto keys_map = [&](const auto& view, int box) {
    return map_of<S>(view.data, call.G, call.S, view.group_stride, view.key_stride, box);
  };

  const float factor = call.scale * kLog2E;

  Operands<typename S::scalar_t> of_queries{call, queries, factor, nullptr, 0, 0, {}, {}, {}, {}, {}, {}};
  of_queries.own_first_map = queries_map(call.q, call.q_stride_h, call.q_stride_t, kRows);
  of_queries.own_second_map = queries_map(call.dout, call.D, call.H * call.D, kRows);
  of_queries.first_map = keys_map(call.k, kTileRows);
  of_queries.second_map = keys_map(call.v, kTileRows);
  if (call.dq) of_queries.first_result_map = queries_map(call.dq, call.D, call.H * call.D, kWarpRows);
  start_blocks<head_attention_backward_queries_kernel<S>, QueriesShared<S>>(
      most_blocks(call.B, call.T, kRows) * heads_of(call, call.heads), of_queries, stream);

  if (!call.dk.data && !call.dv.data) return;
  Operands<typename S::scalar_t> of_keys{call, keys, factor, partial, parts_of(call), few_of(call), {}, {},
                                         {},   {},   {},     {}};
  of_keys.own_first_map = keys_map(call.k, kRows);
  of_keys.own_second_map = keys_map(call.v, kRows);
  of_keys.first_map = queries_map(call.q, call.q_stride_h, call.q_stride_t, kTileRows);
  of_keys.second_map = queries_map(call.dout, call.D, call.H * call.D, kTileRows);
  if (call.dk.data) of_keys.first_result_map = keys_map(call.dk, kWarpRows);
  if (call.dv.data) of_keys.second_result_map = keys_map(call.dv, kWarpRows);
  const int64_t most = most_groups(call) * call.M;
  if (call.order)
    start_blocks<head_attention_backward_keys_kernel<S, true>, KeysShared<S>>(most, of_keys, stream);
  else
    start_blocks<head_attention_backward_keys_kernel<S, false>, KeysShared<S>>(most, of_keys, stream);
  if (call.M == 1) return;
  launch<head_attention_backward_sums_kernel<S>>(
      {.grid = dim3(static_cast<unsigned>(few_of(call)), kSumBlocks),
       .block = dim3(kConsumers),
       .stream = stream,
       .programmatic = true},
      of_keys);
}

}  // namespace

template <class scalar_t>
bool head_attention_backward_fits_sm90(const HeadAttentionBackwardCall<scalar_t>& call) {
  return head_attention_fits_sm90<scalar_t>(call) && pipeline::address_fits(call.dout);
}

template <class scalar_t>
int64_t head_attention_backward_partial_sm90(const HeadAttentionBackwardCall<scalar_t>& call) {
  if (call.M == 1 || (!call.dk.data && !call.dv.data)) return 0;
  if (call.D == 64) return partial_of<Shape<scalar_t, 64>>(call);
  if (call.D == 80) return partial_of<Shape<scalar_t, 80>>(call);
  if (call.D == 96) return partial_of<Shape<scalar_t, 96>>(call);
  return partial_of<Shape<scalar_t, 128>>(call);
}

template <class scalar_t>
void head_attention_backward_sm90(const HeadAttentionBackwardCall<scalar_t>& call,
                                  const AttentionSchedule& queries, const AttentionSchedule& keys,
                                  float* partial, CUstream_st* stream) {
  if (heads_of(call, call.heads) == 0) return;
  if (call.D == 64) return run<Shape<scalar_t, 64>>(call, queries, keys, partial, stream);
  if (call.D == 80) return run<Shape<scalar_t, 80>>(call, queries, keys, partial, stream);
  if (call.D == 96) return run<Shape<scalar_t, 96>>(call, queries, keys, partial, stream);
  run<Shape<scalar_t, 128>>(call, queries, keys, partial, stream);
}

#define FLEXTRON_HEAD_ATTENTION_BACKWARD_SM90(scalar_t)                                                  \
  template bool head_attention_backward_fits_sm90(const HeadAttentionBackwardCall<scalar_t>&);           \
  template int64_t head_attention_backward_partial_sm90(const HeadAttentionBackwardCall<scalar_t>&);     \
  template void head_attention_backward_sm90(const HeadAttentionBackwardCall<scalar_t>&,                 \
                                             const AttentionSchedule&, const AttentionSchedule&, float*, \
                                             CUstream_st*);

}  // namespace flextron
