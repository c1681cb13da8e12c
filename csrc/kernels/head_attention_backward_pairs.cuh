// The gradients of head_attention on any GPU: delta, dq, and dk with dv, a kernel each that repeats the
// scores: no sum is shared by blocks, and each has its order. What their kernels share is here; 16-bit types
// take those of head_attention_backward_tiles.cuh, others and larger heads those of
// head_attention_backward_cuda.cu.
//
//   P = exp(scale Q K^T - lse), dP = dO V^T, delta = rowsum(P dP), dS = P (dP - delta)
//   dq = scale dS K      dk = scale dS^T Q      dv = P^T dO
//
// With a softcap dS is times the slope of tanh as well. A sink is in lse; its gradient is - sum exp(sink -
// lse) delta.
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
#pragma once

#include "core/math.h"
#include "kernels/device/attention_tile.cuh"
#include "kernels/device/launch.cuh"
#include "kernels/head_attention_cuda.h"
#include "kernels/head_attention_walk.cuh"

namespace flextron {
namespace attention {

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
  int at, end;  // the tile of keys, in whole ones from where the first window begins; where the latest
                // query's end

  __device__ __forceinline__ OwnQueries(const Call& call_, const AttentionSchedule& schedule, int64_t item)
      : call(call_) {
    const AttentionItemPlace place = item_at(schedule, item);
    const AttentionBlock found = schedule.blocks[place.block];
    b = found.sequence, block = found.block, head = head_at(call, found.units, place.item);
    s = sequence_of(call, b);
    int least = INT_MAX;
    end = 0;
    for (int r = threadIdx.x % 32; r < kRows; r += 32) {
      const Query found = query(r);
      end = max(end, found.keys);
      if (found.t >= 0) least = min(least, found.keys);
    }
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
      end = max(end, __shfl_xor_sync(~0u, end, distance));
      least = min(least, __shfl_xor_sync(~0u, least, distance));
    }
    at = (max(least - call.window, 0) / kRows - 1) * kRows;
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

// Blocks that are ready when another ends: items are handed out by their number, the longest first.
constexpr int kBlocksEach = 8;  // of a multiprocessor

}  // namespace attention

// One part of the gradients by the tensor cores: bf16 and fp16, D up to 128, blocks of kBackwardTileRows
// rows. Each part and type is compiled in a file of its own.
constexpr int kBackwardTileRows = 64;
template <BackwardPart kPart, class scalar_t>
void head_attention_backward_tiles(const HeadAttentionBackwardCall<scalar_t>& call,
                                   const AttentionSchedule& schedule, CUstream_st* stream);

}  // namespace flextron
