// Attention of a few new tokens against a cache, split over the keys: what the kernels are given. Formula and
// layout are those of head_attention.h with B sequences of T queries each, the cache being pages (a
// contiguous cache has one page per sequence). The loops are in head_attention_decode_block.h.
//
//   out[b, i, h] = sum_j softmax_j(scale * q[b, i, h] . k[b, j, g]) v[b, j, g]     k_start <= j <= i +
//   seqlens[b] - T, and with a window i + seqlens[b] - T - window < j
//
// Each item covers one (sequence, group, block of queries, part of the keys) and leaves maximum, sum and
// unnormalised output of its rows in `partial`; the parts are merged in their order,
// and a sink is added last, once.
#pragma once

#include "kernels/head_attention.h"

namespace flextron {

template <class scalar_t>
struct HeadAttentionDecodeParams {
  using acc_t = accumulate_t<scalar_t>;

  HeadAttentionParams<scalar_t> attention;
  acc_t* partial;           // [items, rows, D + 2], rows = attention.max_queries * M
  const int64_t* merge_at;  // [merges + 1]: the items of merge i are merge_at[i] up to merge_at[i + 1]
};

#define FLEXTRON_HEAD_ATTENTION_DECODE_LAUNCHERS(isa)                                                 \
  template <class scalar_t>                                                                           \
  void head_attention_decode_##isa(const HeadAttentionDecodeParams<scalar_t>& p, int64_t first,       \
                                   int64_t last, char* scratch);                                      \
  template <class scalar_t>                                                                           \
  void head_attention_decode_merge_##isa(const HeadAttentionDecodeParams<scalar_t>& p, int64_t first, \
                                         int64_t last, char* scratch);
FLEXTRON_HEAD_ATTENTION_DECODE_LAUNCHERS(cpu)
FLEXTRON_HEAD_ATTENTION_DECODE_LAUNCHERS(avx2)
FLEXTRON_HEAD_ATTENTION_DECODE_LAUNCHERS(avx512)
// With a matrix unit: scratch is that of head_attention_amx().
void head_attention_decode_amx(const HeadAttentionDecodeParams<bf16>& p, int64_t first, int64_t last,
                               char* scratch);

}  // namespace flextron
