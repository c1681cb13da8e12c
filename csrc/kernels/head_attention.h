// Attention over the active heads of a ragged batch: what the kernels are given and what they leave out. The
// CPU loops are in head_attention_block.h; checks and allocation in ops/head_attention.cpp.
//
//   s[t, h, j] = scale * q[t, h] . k[j, g]                  g = h / M; softcap * tanh(s / softcap) with a
//   softcap lse[t, h] = log(exp(sinks[h]) + sum_j exp(s[t, h, j]))  over the keys j that t sees; without
//   sinks no such
//                                                           term, and -inf where t sees no key
//   out[t, h] = sum_j exp(s[t, h, j] - lse[t, h]) v[j, g]
//
// Query i of a sequence of T queries and S keys sees the keys k_start <= j < S, if causal j <= i + S - T, and
// with a window, which is causal, i + S - T - window < j.
//
// T queries of all sequences, S keys, H query heads, G key/value heads (groups), M = H / G, D head size, B
// sequences.
#pragma once

#include <cstdint>

#include "core/dispatch.h"
#include "core/types.h"

namespace flextron {

using HeadAttentionTypes = TypeList<float, double, bf16, fp16>;

// Queries of one work item (times the active heads of its group), and keys of one step of the online softmax.
// The order of every sum depends on these two and not on the batch or the number of threads, so results do
// not either. 32 x 64 keeps scores, keys and queries of a GQA group of 3 at D = 64 inside 64 KiB.
constexpr int64_t kAttentionQueries = 32;
constexpr int64_t kAttentionKeys = 64;

// A window that leaves no key out.
constexpr int64_t kNoWindow = INT64_MAX / 2;

// Keys or values: row `position` of a sequence is at data + pages[position / page] * page_stride
// + (position % page) * key_stride + group * group_stride, its D elements adjacent.
template <class scalar_t>
struct KeyView {
  scalar_t* data;
  int64_t page_stride, key_stride, group_stride;
};

struct AttentionSequence {
  int64_t query;         // its first row of q
  int64_t T, S;          // its queries, its keys
  int64_t k_start;       // keys below are not seen, by any of its queries
  int64_t position;      // of its key 0
  const int64_t* pages;  // page numbers
};

struct AttentionItem {
  int64_t sequence, group;
  int64_t block;               // of kAttentionQueries queries or kAttentionKeys keys
  int64_t begin = 0, end = 0;  // of its keys from k_start on, in decode
};

template <class scalar_t>
struct HeadAttentionParams {
  using acc_t = accumulate_t<scalar_t>;

  const scalar_t* q;  // [T, H, D], D adjacent
  int64_t q_stride_t, q_stride_h;
  KeyView<const scalar_t> k, v;  // [S, G, D]
  int64_t page;                  // keys in a page
  scalar_t* out;                 // [T, H, D], contiguous, zero where inactive
  acc_t* lse;                    // [T, H], contiguous, -inf where inactive; or null
  const AttentionSequence* sequences;
  const AttentionItem* items;

  // Head h of query t of sequence b is active where its number in the unit is below
  // extent[b * extent_stride_b + t * extent_stride_t], or below heads without extent, or where chosen[h].
  const int64_t* extent;
  int64_t extent_stride_b, extent_stride_t;
  const uint8_t* chosen;
  int64_t heads;
  bool by_group;  // the unit is a group, not a query head of every group

  bool few_rows;  // items of few rows, (query, head) pairs, take loops of their own, which round otherwise
  bool causal;
  int64_t window;  // keys that a query sees at most, up to its own; kNoWindow where causal is not
  acc_t scale;
  acc_t softcap;       // or 0: none
  const acc_t* sinks;  // [H], or null
  int64_t H, G, M, D;
  int64_t max_queries;  // rows of the longest block of queries: min(kAttentionQueries, longest T)
  int64_t max_keys;     // of the longest sequence
};

// Gradients of the keys may be kept in a wider type than the keys (a page shared by sequences sums into it).
template <class scalar_t, class grad_t>
struct HeadAttentionBackwardParams {
  HeadAttentionParams<scalar_t> forward;
  const scalar_t* dout;  // [T, H, D], contiguous
  accumulate_t<scalar_t>*
      delta;               // [T, H], zero before kDelta; null: rowsum(dout out), where out was not rounded
  scalar_t* dq;            // [T, H, D], contiguous, zero where inactive; or null
  KeyView<grad_t> dk, dv;  // zero where unseen; data null where not wanted
};

// Which part of the backward pass an item stands for. kFused gives everything for one (sequence, group) with
// five products per tile; kQueries and kKeys repeat two of them, but split further: kQueries gives dq of a
// block of queries, kKeys gives dk and dv of a block of keys. The results are the same bit for bit. kDelta
// gives delta of a block of queries as the sum of P dP, for 16-bit types: from a rounded out it doubles the
// error of dq.
enum class BackwardPart { kDelta, kFused, kQueries, kKeys };

// Items [first, last) of params.items. Scratch: *_scratch(params) bytes, aligned to 64, for each concurrent
// call.
template <class scalar_t>
int64_t head_attention_scratch(const HeadAttentionParams<scalar_t>& p);
template <class scalar_t>
int64_t head_attention_backward_scratch(const HeadAttentionParams<scalar_t>& p, BackwardPart part);

#define FLEXTRON_HEAD_ATTENTION_LAUNCHERS(isa)                                                   \
  template <class scalar_t>                                                                      \
  void head_attention_##isa(const HeadAttentionParams<scalar_t>& p, int64_t first, int64_t last, \
                            char* scratch);                                                      \
  template <class scalar_t, class grad_t>                                                        \
  void head_attention_backward_##isa(const HeadAttentionBackwardParams<scalar_t, grad_t>& p,     \
                                     BackwardPart part, int64_t first, int64_t last, char* scratch);
FLEXTRON_HEAD_ATTENTION_LAUNCHERS(cpu)
FLEXTRON_HEAD_ATTENTION_LAUNCHERS(avx2)
FLEXTRON_HEAD_ATTENTION_LAUNCHERS(avx512)
// With a matrix unit, whose scratch is its own.
int64_t head_attention_amx_scratch(const HeadAttentionParams<bf16>& p);
void head_attention_amx(const HeadAttentionParams<bf16>& p, int64_t first, int64_t last, char* scratch);

// The gradient of the sinks of heads [first, last): - sum over the T rows of exp(sinks[h] - lse) delta.
template <class scalar_t, class grad_t>
void head_attention_sinks_cpu(const HeadAttentionBackwardParams<scalar_t, grad_t>& p, int64_t T,
                              accumulate_t<scalar_t>* dsinks, int64_t first, int64_t last);

}  // namespace flextron
