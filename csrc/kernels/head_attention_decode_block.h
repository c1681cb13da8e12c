// The loops of head_attention_decode on a CPU, included once for each instruction set like
// head_attention_block.h.
#pragma once

#include "kernels/head_attention_block.h"
#include "kernels/head_attention_decode.h"

namespace flextron {
namespace {

template <class A>
struct Partial {
  A *max, *sum, *out;  // [rows], [rows], [rows][D]
};

template <class scalar_t, class A = accumulate_t<scalar_t>>
Partial<A> partial_of(const HeadAttentionDecodeParams<scalar_t>& p, i64 item) {
  const i64 rows = max_rows(p.attention);
  A* at = p.partial + item * rows * (p.attention.D + 2);
  return {at, at + rows, at + 2 * rows};
}

template <class scalar_t, class Attending>
void decode_item(const HeadAttentionDecodeParams<scalar_t>& params, i64 index, Arena arena,
                 const Attending& attending) {
  using A = accumulate_t<scalar_t>;
  const HeadAttentionParams<scalar_t>& p = params.attention;
  const AttentionItem& item = p.items[index];
  const Partial<A> to = partial_of(params, index);
  Rows rows = take_rows(p, arena);
  const Softmax<A> s = take_softmax(p, arena);
  find_rows(p, item, rows);
  const i64 k_start = p.sequences[item.sequence].k_start;
  attending(p, item, rows, larger(k_start + item.begin, rows.begin), smaller(k_start + item.end, rows.most),
            s);
  const i64 D = padded<A>(p.D);
  for (i64 r = 0; r < rows.count; ++r) {
    to.max[r] = s.max[r], to.sum[r] = s.sum[r];
    for (i64 d = 0; d < p.D; ++d) to.out[r * p.D + d] = s.out[r * D + d];
  }
}

template <class scalar_t>
void merge_items(const HeadAttentionDecodeParams<scalar_t>& params, i64 first, i64 last, Arena arena) {
  using A = accumulate_t<scalar_t>;
  const HeadAttentionParams<scalar_t>& p = params.attention;
  const A lowest = -A(__builtin_inf());
  Rows rows = take_rows(p, arena);
  const Softmax<A> s = take_softmax(p, arena);  // out for the sum, shrink for the parts' shares
  find_rows(p, p.items[first], rows);
  for (i64 r = 0; r < rows.count; ++r) {
    A max = lowest, sum = A(0);
    for (i64 i = first; i < last; ++i) {
      const A part_max = partial_of(params, i).max[r];
      max = max < part_max ? part_max : max;
    }
    for (i64 d = 0; d < p.D; ++d) s.out[d] = A(0);
    for (i64 i = first; i < last; ++i) {
      const Partial<A> from = partial_of(params, i);
      if (from.sum[r] == A(0)) continue;  // the row sees nothing of this part
      const A share = vec_exp(Vec<A>{} + (from.max[r] - max))[0];
      sum += share * from.sum[r];
      for (i64 d = 0; d < p.D; ++d) s.out[d] += share * from.out[r * p.D + d];
    }
    sum = finish_row(p, rows.at[r], max, sum);
    for (i64 d = 0; d < p.D; ++d) narrow(s.out[d] / sum, p.out + rows.at[r] * p.D + d);
  }
}

}  // namespace
}  // namespace flextron

// The launchers of head_attention_decode.h for the instruction set this file is compiled for.
#define FLEXTRON_DEFINE_HEAD_ATTENTION_DECODE(isa)                                                          \
  template <class scalar_t>                                                                                 \
  void head_attention_decode_##isa(const HeadAttentionDecodeParams<scalar_t>& p, int64_t first,             \
                                   int64_t last, char* scratch) {                                           \
    for (; first < last; ++first) decode_item(p, first, Arena{scratch}, Attend{});                          \
  }                                                                                                         \
  template <class scalar_t>                                                                                 \
  void head_attention_decode_merge_##isa(const HeadAttentionDecodeParams<scalar_t>& p, int64_t first,       \
                                         int64_t last, char* scratch) {                                     \
    for (; first < last; ++first) merge_items(p, p.merge_at[first], p.merge_at[first + 1], Arena{scratch}); \
  }                                                                                                         \
  FLEXTRON_HEAD_ATTENTION_DECODE_INSTANCES(isa, float)                                                      \
  FLEXTRON_HEAD_ATTENTION_DECODE_INSTANCES(isa, double)                                                     \
  FLEXTRON_HEAD_ATTENTION_DECODE_INSTANCES(isa, bf16)                                                       \
  FLEXTRON_HEAD_ATTENTION_DECODE_INSTANCES(isa, fp16)

#define FLEXTRON_HEAD_ATTENTION_DECODE_INSTANCES(isa, scalar_t)                                           \
  template void head_attention_decode_##isa(const HeadAttentionDecodeParams<scalar_t>&, int64_t, int64_t, \
                                            char*);                                                       \
  template void head_attention_decode_merge_##isa(const HeadAttentionDecodeParams<scalar_t>&, int64_t,    \
                                                  int64_t, char*);
