// head_attention and head_attention_decode on GPUs: what their kernels are given. The formula is
// head_attention.h's; lengths, extents and pages are head_attention_call.h's.
#pragma once

#include "kernels/head_attention.h"
#include "kernels/head_attention_call.h"

struct CUstream_st;  // cudaStream_t, without the CUDA headers

namespace flextron {

template <class scalar_t>
struct HeadAttentionCall : AttentionCall {
  using acc_t = accumulate_t<scalar_t>;

  const scalar_t* q;  // [T, H, D], D adjacent
  int64_t q_stride_t, q_stride_h;
  KeyView<const scalar_t> k, v;  // [pages, S, G, D] in a cache, else [S, G, D]; D adjacent
  scalar_t* out;  // [T, H, D], contiguous; written where a head is active, zeros where it sees no key
  acc_t* lse;     // [T, H], contiguous, or null; written with out, -inf where it sees neither key nor sink
  acc_t scale;
  acc_t softcap, cap_scale;  // or 0: none; scale / softcap
  const acc_t* sinks;        // [H], or null

  bool plain_scores() const { return window == kAllKeys && softcap == acc_t(0) && sinks == nullptr; }
};

// What an active head has no part in is not touched: zeros before.
template <class scalar_t>
struct HeadAttentionBackwardCall : HeadAttentionCall<scalar_t> {
  const scalar_t* dout;                                 // [T, H, D], contiguous
  typename HeadAttentionCall<scalar_t>::acc_t* delta;   // [T, H], contiguous, room for the sum of P dP
  scalar_t* dq;                                         // [T, H, D], contiguous; or null
  KeyView<scalar_t> dk, dv;                             // as k and v; data null where not wanted
  typename HeadAttentionCall<scalar_t>::acc_t* dsinks;  // [H]; or null
};

// ---- schedules ----

// Room for a schedule of at most `blocks` blocks (most_blocks), in int64.
constexpr int64_t head_attention_schedule_size(int64_t blocks) { return 4 * blocks + 2; }

// Fills `room` with the query blocks of `rows` rows that have an active head, or with the key blocks of
// `rows` keys that have an active group which some query sees; one launch.
AttentionSchedule head_attention_query_schedule_cuda(const AttentionCall& call, int64_t rows, int64_t blocks,
                                                     int64_t* room, CUstream_st* stream);
AttentionSchedule head_attention_key_schedule_cuda(const AttentionCall& call, int64_t rows, int64_t blocks,
                                                   int64_t* room, CUstream_st* stream);

// keys[t], for each row of q: a stable descending sort of these gives AttentionCall::order. Rows of a
// sequence keep together, rows that no sequence has come last.
void head_attention_order_keys_cuda(const AttentionCall& call, int64_t* keys, CUstream_st* stream);

// ---- kernels ----

// Any GPU of sm_80 and up, any address and stride; float, double, bf16, fp16; the schedule is of
// head_attention_rows(call) rows.
template <class scalar_t>
int64_t head_attention_rows(const HeadAttentionCall<scalar_t>& call);
template <class scalar_t>
void head_attention_cuda(const HeadAttentionCall<scalar_t>& call, const AttentionSchedule& queries,
                         CUstream_st* stream);

// Gradients: delta, then that of the sinks, dq, then dk and dv, each where it is wanted; no atomics, every
// sum has its order. Keys of a paged cache may be several sequences': with a block_table `keys` is not looked
// at.
template <class scalar_t>
int64_t head_attention_backward_rows(const HeadAttentionBackwardCall<scalar_t>& call);
template <class scalar_t>
int64_t head_attention_backward_keys(const HeadAttentionBackwardCall<scalar_t>& call);
template <class scalar_t>
void head_attention_backward_cuda(const HeadAttentionBackwardCall<scalar_t>& call,
                                  const AttentionSchedule& queries, const AttentionSchedule& keys,
                                  CUstream_st* stream);

// sm_90 only; bf16, fp16. Whether TMA can take these addresses, strides and this head size, and scores are
// plain.
template <class scalar_t>
bool head_attention_fits_sm90(const HeadAttentionCall<scalar_t>& call);
constexpr int64_t kAttentionRowsSm90 = 128;
template <class scalar_t>
void head_attention_sm90(const HeadAttentionCall<scalar_t>& call, const AttentionSchedule& queries,
                         CUstream_st* stream);
// Its gradients; both schedules are of kAttentionRowsSm90 rows, and `partial` has room for
// head_attention_backward_partial_sm90(call) floats.
template <class scalar_t>
bool head_attention_backward_fits_sm90(const HeadAttentionBackwardCall<scalar_t>& call);
template <class scalar_t>
int64_t head_attention_backward_partial_sm90(const HeadAttentionBackwardCall<scalar_t>& call);
template <class scalar_t>
void head_attention_backward_sm90(const HeadAttentionBackwardCall<scalar_t>& call,
                                  const AttentionSchedule& queries, const AttentionSchedule& keys,
                                  float* partial, CUstream_st* stream);

// A few queries a sequence against a cache, split over its keys; any GPU of sm_80 and up. `partial` has room
// for head_attention_decode_partial(call) elements of acc_t. lse is not written.
template <class scalar_t>
int64_t head_attention_decode_partial(const HeadAttentionCall<scalar_t>& call);
template <class scalar_t>
void head_attention_decode_cuda(const HeadAttentionCall<scalar_t>& call,
                                typename HeadAttentionCall<scalar_t>::acc_t* partial, CUstream_st* stream);

}  // namespace flextron
