// Attention of a few new tokens on a CPU, from a plan: what head_attention_decode and decoder_step share.
#pragma once

#include "kernels/head_attention_decode.h"
#include "ops/attention_plan.h"

namespace flextron {

// The work of one forward pass split over the keys: its items, and where the merge of each block of queries
// begins.
struct KeySplit {
  std::vector<AttentionItem> items;
  std::vector<int64_t> merge_at{0};
};

// Keys of a part: few keys are one part, more are fours of even ones, so that two threads or four have the
// same to do. Of the number of keys alone, so that a sequence's result does not depend on the batch it is in.
inline int64_t keys_of_part(int64_t keys) {
  // A part of 64 keys takes some 2 us, against which its merge is small.
  constexpr int64_t kFew = 256, kMost = 512;
  if (keys <= kFew) return kFew;
  return blocks_of(blocks_of(keys, 4 * blocks_of(keys, 4 * kMost)), 16) * 16;
}

// More queries than a block are work enough without splitting.
inline KeySplit split_keys(const AttentionPlan& plan) {
  KeySplit split;
  for (auto item : query_items(plan)) {
    const auto& s = plan.sequences[item.sequence];
    const int64_t keys = s.S - s.k_start, part = s.T > kAttentionQueries ? keys : keys_of_part(keys);
    for (item.begin = 0; item.begin < keys; item.begin = item.end) {
      item.end = std::min(item.begin + part, keys);
      split.items.push_back(item);
    }
    if (keys > 0) split.merge_at.push_back(split.items.size());
  }
  return split;
}

template <class scalar_t>
void run_decode(const AttentionPlan& plan, HeadAttentionParams<scalar_t> p, const Tensor& q) {
  const KeySplit split = split_keys(plan);
  p.few_rows = p.lse == nullptr;  // of use to a backward pass are scores as it makes them itself
  const int64_t items = split.items.size(), merges = split.merge_at.size() - 1;
  if (items == merges) return run_forward(plan, p);
  p.items = split.items.data();
  const Tensor partial = empty(q, {items, plan.max_queries * plan.M, plan.D + 2}, wide_dtype(q));
  const HeadAttentionDecodeParams<scalar_t> params{
      .attention = p,
      .partial = mutable_data_of<accumulate_t<scalar_t>>(partial),
      .merge_at = split.merge_at.data()};
  const int64_t bytes = forward_scratch(p);
  const auto decode = FLEXTRON_FOR_MATRIX_ISA(head_attention_decode, scalar_t);
  const auto merge = FLEXTRON_FOR_ISA(head_attention_decode_merge, scalar_t);
  run_items(items, plan.item_cost(keys_of_part(plan.max_keys)), bytes,
            [&](int64_t first, int64_t last, char* scratch) { decode(params, first, last, scratch); });
  run_items(merges, plan.item_cost(items / merges), bytes,
            [&](int64_t first, int64_t last, char* scratch) { merge(params, first, last, scratch); });
}

}  // namespace flextron
