// Which queries see a block's keys: head_attention's gradients of keys and values walk over them.
#pragma once

#include "kernels/device/attention_tile.cuh"
#include "kernels/head_attention_cuda.h"

namespace flextron::attention {

// A block's own keys: neighbours in memory, under one group.
struct OwnKeys {
  int64_t page, position, group;
  int count;

  template <class scalar_t>
  __device__ __forceinline__ scalar_t* row(const KeyView<scalar_t>& view, int r) const {
    if (r >= count) return nullptr;
    return view.data + page * view.page_stride + (position + r) * view.key_stride + group * view.group_stride;
  }
};

// The queries that see a block's keys: sequence after sequence (several may share a page), head after head,
// tile after tile. All lanes of a warp together.
template <int kRows>
struct QueryWalk {
  int b, block, head;              // of the tile
  int first_query, T, S, k_start;  // of the sequence
  int next_head, heads_end;  // the next head of the group and where they end; with an index, places in it
  int first, end;  // the block's first key, from k_start: those below it are not seen; where its keys end
  int64_t entry;   // the next of block_table

  // To the next tile with a row that sees one of the keys.
  __device__ __forceinline__ bool next(const AttentionCall& call, const OwnKeys& keys) {
    for (++block;; ++block) {
      bool sees = false;
      while (!any_row(call, sees))
        if (!enter_head(call, keys)) return false;
      if (sees) return true;
    }
  }

  // Row r of the tile, with all keys from k_start on that it sees.
  __device__ __forceinline__ Query any_query(const AttentionCall& call, int r) const {
    CallSequence s{};
    s.query = first_query, s.T = T, s.S = S, s.k_start = k_start;
    return query_at(call, s, b, head, int64_t{block} * kRows + r);
  }

  // Rows that see none of the keys are left out; what the others see of them, counted from the block's first,
  // begins at low(), or at their window, and ends with `keys`.
  __device__ __forceinline__ Query query(const AttentionCall& call, int r) const {
    const Query found = any_query(call, r);
    return sees_one(call, found.keys) ? Query{found.t, found.keys - first} : Query{-1, 0};
  }
  __device__ __forceinline__ int low() const { return max(-first, 0); }

  // The keys are the sequence's from `first_key` on. If it has none of them, it has no heads here.
  __device__ __forceinline__ void enter_sequence(const AttentionCall& call, const OwnKeys& keys,
                                                 int64_t sequence, int64_t first_key) {
    const CallSequence s = sequence_of(call, sequence);
    b = static_cast<int>(sequence);
    first_query = static_cast<int>(s.query), T = static_cast<int>(s.T), S = static_cast<int>(s.S);
    k_start = static_cast<int>(s.k_start);
    first = static_cast<int>(first_key - s.k_start), end = first + keys.count;
    const bool has = T > 0 && first_key < S && first + keys.count > 0;
    const int64_t units = has ? units_of(call, b, call.order ? call.order[s.query] : s.query) : 0;
    const int64_t heads = heads_of(call, units);
    const auto group_of = [&](int64_t n) { return head_at(call, units, n) / call.M; };
    int64_t at = 0, last;
    if (call.index) {
      while (at < heads && group_of(at) < keys.group) ++at;
      for (last = at; last < heads && group_of(last) == keys.group;) ++last;
    } else {
      at = keys.group * call.M;
      last = at + (call.by_group ? (keys.group < units ? call.M : 0) : units);
    }
    next_head = static_cast<int>(at), heads_end = static_cast<int>(last);
    block = T / kRows;  // the last: a head comes next
  }

  // Of the heads to come the n-th alone, if there is one.
  __device__ __forceinline__ void keep_head(int n) {
    next_head = min(next_head + n, heads_end);
    heads_end = min(next_head + 1, heads_end);
  }

 private:
  __device__ __forceinline__ bool sees_one(const AttentionCall& call, int keys) const {
    return keys > max(first, 0) && keys - call.window < end;
  }

  // Whether the tile has rows, and one that sees a key. Rows in ascending order whose window begins behind
  // the keys are the last ones: they count as none.
  __device__ __forceinline__ bool any_row(const AttentionCall& call, bool& sees) const {
    bool there = false, one = false;
    for (int r = threadIdx.x % 32; r < kRows; r += 32) {
      const Query found = any_query(call, r);
      there |= found.t >= 0 && (call.order != nullptr || found.keys - call.window < end);
      one |= sees_one(call, found.keys);
    }
    sees = __any_sync(~0u, one);
    return __any_sync(~0u, there);
  }

  __device__ __forceinline__ bool enter_head(const AttentionCall& call, const OwnKeys& keys) {
    while (next_head == heads_end)
      if (!find_sequence(call, keys)) return false;
    head = call.index ? static_cast<int>(head_at(call, call.heads, next_head)) : next_head;
    ++next_head;
    // Where rows are in ascending order, the first that sees a key is known.
    block = call.causal && !call.order ? max(k_start + max(first, 0) + T - S, 0) / kRows : 0;
    return true;
  }

  // The next entry of block_table that names this page; those behind a sequence's last key may be anything.
  __device__ __forceinline__ bool find_sequence(const AttentionCall& call, const OwnKeys& keys) {
    const int64_t entries = call.block_table ? call.B * call.columns : 0;
    while (entry < entries) {
      const int64_t mine = entry + threadIdx.x % 32;
      const bool found = mine < entries && within(call.block_table[mine], 0, call.pages - 1) == keys.page;
      const uint32_t lanes = __ballot_sync(~0u, found);
      entry += lanes ? __ffs(static_cast<int>(lanes)) : 32;
      if (lanes == 0) continue;
      enter_sequence(call, keys, (entry - 1) / call.columns,
                     (entry - 1) % call.columns * call.S + keys.position);
      return true;
    }
    return false;
  }
};

}  // namespace flextron::attention
