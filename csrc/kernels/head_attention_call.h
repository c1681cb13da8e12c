// One call of head_attention or head_attention_decode as CUDA kernels see it: the lengths, extents and pages
// lie on the device, where the host never reads them. Host and device.
//
// Values out of range are moved into it: a wrong one must not become a fault.
//
// Query blocks are kRows rows of one sequence, key blocks kRows of its keys. A schedule lists those that have
// work, longest first, each with as many items as it has active heads (of query blocks) or groups (of key
// blocks); blocks of a grid walk over the items. With an extent per token the rows of a sequence are taken in
// descending order of it, so that a block's first row is its widest: a staircase.
#pragma once

#include <climits>
#include <cstdint>

#include "core/macros.h"

namespace flextron {

constexpr int kAllKeys = INT_MAX;

struct AttentionCall {
  const int64_t* cu_seqlens_q;  // [B + 1]; null: queries_each rows of q a sequence
  const int64_t* cu_seqlens_k;  // [B + 1]; null: seqlens, or all S keys are of the one sequence
  const int64_t* seqlens;       // [B], keys of each sequence in a cache; null: not a cache
  const int64_t* block_table;   // [B, columns], page numbers; null: page b holds all keys of sequence b
  const int64_t* k_start;       // [B], or null: 0
  const int64_t* extent;        // [1], [B] or [T]; null: heads
  const int64_t* index;         // [heads], ascending, the active query heads; null: by extent or heads
  const int64_t* order;         // [T], per token alone: row of q of each place, descending within a sequence
  int64_t B, T, S;              // sequences, rows of q, rows of k (keys of a page in a cache)
  int64_t queries_each;         // without cu_seqlens_q
  int64_t pages, columns;       // in the cache; in block_table
  int64_t H, G, M, D, heads;    // query heads, groups, M = H / G, head size, active units at most
  int64_t extent_stride_b, extent_stride_t;  // extent of row t of sequence b: extent[b * .. + t * ..]
  bool by_group;                             // the unit is a group, not a query head of every group
  bool causal;
  int window;  // keys that a query sees at most, up to its own; kAllKeys where causal is not

  FLEXTRON_HD bool per_token() const { return extent_stride_t != 0; }
};

FLEXTRON_HD int64_t within(int64_t value, int64_t low, int64_t high) {
  return value < low ? low : value > high ? high : value;
}

struct CallSequence {
  int64_t query, T;      // its first row of q (of order, per token), its queries
  int64_t S, k_start;    // its keys, and those of them below are not seen, by any of its queries
  int64_t position;      // row of its key 0 in its page
  int64_t page;          // that page, where pages is null
  const int64_t* pages;  // its row of block_table

  // Keys that its query i sees: [k_start, end).
  FLEXTRON_HD int64_t keys_end(bool causal, int64_t i) const {
    return causal ? within(i + 1 + S - T, 0, S) : S;
  }
};

FLEXTRON_HD CallSequence sequence_of(const AttentionCall& call, int64_t b) {
  CallSequence s{};
  if (call.cu_seqlens_q) {
    s.query = within(call.cu_seqlens_q[b], 0, call.T);
    s.T = within(call.cu_seqlens_q[b + 1], s.query, call.T) - s.query;
  } else {
    s.query = b * call.queries_each;
    s.T = call.queries_each;
  }
  if (call.seqlens) {
    const int64_t room = call.block_table ? call.columns * call.S : call.S;
    s.S = within(call.seqlens[b], 0, room);
    s.page = call.block_table ? 0 : b;
    s.pages = call.block_table ? call.block_table + b * call.columns : nullptr;
  } else if (call.cu_seqlens_k) {
    s.position = within(call.cu_seqlens_k[b], 0, call.S);
    s.S = within(call.cu_seqlens_k[b + 1], s.position, call.S) - s.position;
  } else {
    s.S = call.S;
  }
  s.k_start = call.k_start ? within(call.k_start[b], 0, s.S) : 0;
  const int64_t before = s.S - s.T + 1 - call.window;  // every query's window
  if (before > s.k_start) s.k_start = before;
  return s;
}

// Whether a query that sees `keys` keys without a window, of its sequence or from any key on, sees number
// `key` of them.
FLEXTRON_HD bool sees(int keys, int key, int window) {
  return static_cast<unsigned>(keys - 1 - key) < static_cast<unsigned>(window);
}

// Where key j of a sequence lies, in elements from the first of all keys.
FLEXTRON_HD int64_t key_offset(const AttentionCall& call, const CallSequence& s, int64_t j,
                               int64_t page_stride, int64_t key_stride) {
  if (s.pages == nullptr) return s.page * page_stride + (s.position + j) * key_stride;
  return within(s.pages[j / call.S], 0, call.pages - 1) * page_stride + j % call.S * key_stride;
}

// Active units of row t of q, which is of sequence b. With an index: all that there are.
FLEXTRON_HD int64_t units_of(const AttentionCall& call, int64_t b, int64_t t) {
  if (call.extent == nullptr) return call.heads;
  return within(call.extent[b * call.extent_stride_b + t * call.extent_stride_t], 0, call.heads);
}

// Query heads that `units` are, and the n-th of these, ascending.
FLEXTRON_HD int64_t heads_of(const AttentionCall& call, int64_t units) {
  return call.index ? units : units * (call.by_group ? call.M : call.G);
}
FLEXTRON_HD int64_t head_at(const AttentionCall& call, int64_t units, int64_t n) {
  if (call.index) return within(call.index[n], 0, call.H - 1);
  if (call.by_group) return n;
  const int item = static_cast<int>(n), each = static_cast<int>(units);  // a long division is a call on a GPU
  return item / each * call.M + item % each;
}

// Whether a row of `units` has this head. With an index: asked of its heads alone.
FLEXTRON_HD bool head_active(const AttentionCall& call, int64_t units, int64_t head) {
  const int h = static_cast<int>(head), M = static_cast<int>(call.M);
  return call.index != nullptr || (call.by_group ? h / M : h % M) < units;
}

struct AttentionBlock {
  int64_t sequence,
      block;      // in blocks of the schedule's kRows, of the sequence's queries or of its keys from k_start
  int64_t units;  // of its widest row, or of its sequence's widest
};

// Written on the device by head_attention_schedule_cuda.
struct AttentionSchedule {
  const AttentionBlock* blocks;  // longest first
  const int64_t* first;  // [*count + 1]: the item that a block's begin with; the last entry is all items
  const int64_t* count;  // [1]
};

struct AttentionItemPlace {
  int64_t block, item;  // of the schedule; of the block
};

// Item `item` of those that there are.
FLEXTRON_HD AttentionItemPlace item_at(const AttentionSchedule& schedule, int64_t item) {
  int64_t low = 0, high = *schedule.count;  // first[low] <= item < first[high]
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (schedule.first[middle] <= item ? low : high) = middle;
  }
  return {low, item - schedule.first[low]};
}

// Groups that a sequence whose widest row has `units` may need. With an index some of them have no head.
FLEXTRON_HD int64_t groups_of(const AttentionCall& call, int64_t units) {
  if (call.index || !call.by_group) return units > 0 ? call.G : 0;
  return units;
}

// ---- what a schedule lists ----

struct AttentionWork {
  AttentionBlock block;
  int64_t items;   // 0: nothing to do
  int64_t length;  // of each item: keys that the block's last row sees, queries that see its first key
};

FLEXTRON_HD int64_t query_blocks(const CallSequence& s, int64_t rows) { return (s.T + rows - 1) / rows; }
FLEXTRON_HD int64_t key_blocks(const CallSequence& s, int64_t rows) {
  return (s.S - s.k_start + rows - 1) / rows;
}

// Rows that see no key stay: their results are written too. With an extent per token the last row may be any.
FLEXTRON_HD AttentionWork query_work(const AttentionCall& call, int64_t b, int64_t block, int64_t rows) {
  const CallSequence s = sequence_of(call, b);
  const int64_t place = s.query + block * rows, last = block * rows + rows < s.T ? block * rows + rows : s.T;
  const int64_t units = units_of(call, b, call.order ? call.order[place] : place);
  const int64_t end = s.keys_end(call.causal, call.order ? s.T - 1 : last - 1);
  const int64_t first = call.order ? 0 : s.keys_end(call.causal, block * rows) - call.window;
  const int64_t begin = first > s.k_start ? first : s.k_start;
  return {{b, block, units}, heads_of(call, units), end > begin ? end - begin : 0};
}

FLEXTRON_HD AttentionWork key_work(const AttentionCall& call, int64_t b, int64_t block, int64_t rows) {
  const CallSequence s = sequence_of(call, b);
  if (s.T == 0) return {};
  const int64_t units = units_of(call, b, call.order ? call.order[s.query] : s.query);
  const int64_t unseen = call.causal ? s.k_start + block * rows + s.T - s.S : 0;  // queries before the first
  const int64_t last =
      s.k_start + block * rows + rows + call.window - 1 + s.T - s.S;  // queries before it see one
  const int64_t seen = (last < s.T ? last : s.T) - (unseen > 0 ? unseen : 0);
  return {{b, block, units}, seen > 0 ? groups_of(call, units) : 0, seen};
}

// Lengths that a schedule takes for equal, ascending: whole blocks of 64 up to 64 of them, above that within
// one part in 32.
constexpr int kLengthClasses = 256;
FLEXTRON_HD int length_class(int64_t length) {
  int64_t blocks = (length + 63) / 64;
  int octave = 0;
  for (; blocks >= 64; blocks /= 2) ++octave;
  const int64_t result = 32 * octave + blocks;
  return static_cast<int>(result < kLengthClasses ? result : kLengthClasses - 1);
}

// Blocks of `rows` that the host must make room for: each sequence may add one that is not full.
FLEXTRON_HD int64_t most_blocks(int64_t B, int64_t total, int64_t rows) {
  return (total + rows - 1) / rows + B;
}

}  // namespace flextron
