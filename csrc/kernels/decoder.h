// A decoder: tokens through every layer, and to their logits. A Llama has no norm in square brackets, and
// scales of 1.
//
//   x = embedding_scale * embedding[id]
//   for each layer:  n = norm(x);  q, k, v = n Wq^T + bq, n Wk^T + bk, n Wv^T + bv
//                    q, k, v = clip(head_norm(q)), clip(head_norm(k)), clip(v)
//                    q, k = turn(q), turn(k);  k and v go to the cache
//                    x += residual_scale * [norm](attention(q, cache) Wo^T + bo)
//                    n = norm(x);  x += residual_scale * [norm]((act(n Wg^T + bg) * (n Wu^T + bu)) Wd^T + bd)
//   logits = logit_scale * norm(x) W_head^T + b_head, or logit_cap * tanh(logits / logit_cap)
//
//   Each norm has a weight w, and a bias where it is given; a norm before a part that has no weight is x
//   itself.
//     rms:    x / sqrt(mean(x^2) + eps) * w (RMSNorm)
//     layer:  (x - mean(x)) / sqrt(mean((x - mean(x))^2) + eps) * w + bias (LayerNorm)
//     rms+1, layer+1:  1 + w in the place of w, in layer+1 rounded to the dtype of w (Gemma, Nemotron)
//   head_norm is the same over a head, with a weight for all heads alike or for each; or over all heads that
//   a row keeps; or it comes after turn. clip bounds what it is given, from below and from above. An MLP
//   without a gate is act(n Wu^T + bu) Wd^T + bd. Where attention and MLP are parallel, n of the MLP is made
//   of the x before attention; it is attention's own without a norm.
//
//   attention may see the last `window` keys alone, and bound its scores: csrc/kernels/head_attention.h
//   turn is the rotary embedding (RoPE, Su et al., arXiv 2104.09864). For i < R/2:
//       turn(x)[i] = x[i] cos[i] - x[i + R/2] sin[i]
//       turn(x)[i + R/2] = x[i + R/2] cos[i + R/2] + x[i] sin[i + R/2]
//   or, where it turns pairs, the same with 2i and 2i + 1 in the place of i and i + R/2; and the D - R
//   elements that follow stay as they are. A layer may have another table than others, or none
//
// A row is one token of one sequence. Each row uses a prefix of the heads and of the neurons; to a row that
// uses none of a part the part adds nothing, neither its bias nor that of the norm behind it. How long the
// prefix is comes from the layer, from the sequence's budget, or from the router, which picks in each layer
// the menu entry with the largest logit (the first of equal ones). Its logits come from the n of attention:
//
//   logits = leaky_relu(state + (W1 n) / sqrt(mean(n^2) + 2^-23), slope 0.1) W2^T + base
//
// with state and base of the row's request (flextron.nn.router.AdaptiveRouter).
//
// Activations stay float32 from the embedding to the logits; what attention reads, q and the cache, has the
// dtype of the weights. The GEMMs are elastic_gemm.h's, attention is head_attention_decode.h's; this header
// has what lies between them.
#pragma once

#include <cstdint>

#include "core/dispatch.h"
#include "core/types.h"

namespace flextron {

using DecoderTypes = TypeList<float, bf16, fp16>;

constexpr int64_t kLongestHead = 1024;  // elements of a head; csrc/ops/decoder/model.cpp checks it

enum class NormKind : int64_t { kRms, kRmsPlusOne, kLayer, kLayerPlusOne };
enum class Rotation : int64_t { kHalves, kPairs };
enum class NormOver : int64_t { kHead, kHeads, kEach };  // as in DecoderShape

template <class scalar_t>
struct DecoderNorm {
  const scalar_t* weight = nullptr;  // null: what comes goes on as it is
  const scalar_t* bias = nullptr;    // null: 0; with a weight alone
};

// x[r] += scale * post(add[r]) where used[r] > 0, then to[r] = norm(x[r]).
template <class scalar_t>
struct DecoderNormParams {
  NormKind kind;
  DecoderNorm<scalar_t> norm, post;  // [K] each
  float* x;                          // [rows, K], rows x_stride apart
  const float* add;                  // [rows, K], contiguous; or null
  const int64_t* used;               // [rows]; null: every row adds
  float* to;                         // [rows, K], rows x_stride apart
  int64_t K, x_stride;
  float scale, eps;
};

// x[r] by the mean square of what row r keeps of it: of each block the first elements, `unit` for every one
// of its extent. Root mean squares alone.
template <class scalar_t>
struct DecoderAllHeadsParams {
  NormKind kind;
  float* x;                    // [rows, blocks, block], contiguous
  DecoderNorm<scalar_t> norm;  // blocks norm_block apart
  const int64_t* extents;      // [rows]; null: `extent`
  int64_t extent, unit;
  int64_t blocks, block, norm_block;
  int64_t least;  // so much of a block is normalised, even where a row keeps less
  float eps;
};

// to[b, t, h] = turn(clip(head_norm(from[b, t, h]))), or head_norm(turn(clip(from[b, t, h]))). Heads lie in
// groups, each of a number of heads.
template <class scalar_t>
struct DecoderHeadsParams {
  NormKind kind;
  Rotation rotation;
  bool norm_last;
  float clip;                     // infinite: none
  const float* from;              // D adjacent, and the heads of a group
  int64_t from_row, from_group;   // elements between rows and between groups
  DecoderNorm<scalar_t> norm;     // [D] of each head
  int64_t norm_group, norm_head;  // elements between those of groups and of heads
  const scalar_t *cos, *sin;      // [B or 1, T, R], tokens table_stride apart; null: no turn
  scalar_t* to;                   // D adjacent
  int64_t to_stride_b, to_stride_t, to_stride_h;
  int64_t T, groups, each, D, R, table_stride;
  bool one_table;  // cos and sin are the same for all sequences
  float eps;
};

// h[r] = leaky_relu(state of r's request + h[r] / sqrt(mean(normed[r]^2) + 2^-23)): the router's hidden
// layer.
struct DecoderRouterParams {
  const float* normed;  // [rows, K], rows row_stride apart
  const float* state;   // [requests, hidden], rows state_stride apart
  float* h;             // [rows, hidden], contiguous: W1 normed[r] before
  int64_t K, row_stride, hidden, state_stride;
  int64_t rows_each;  // of a request
};

// best[r] = where logits[r] is greatest: the first of equals, a NaN before all others, as torch.argmax.
template <class scalar_t>
struct DecoderBestParams {
  const scalar_t* logits;  // [rows, vocabulary], rows `stride` apart
  int64_t* best;           // [rows]
  int64_t vocabulary, stride;
};

// x = cap * tanh(x / cap).
template <class scalar_t>
struct DecoderCapParams {
  scalar_t* x;
  float cap;
};

// Rows [begin, end); decoder_cap: elements.
#define FLEXTRON_DECLARE_DECODER(isa)                                                                 \
  template <class scalar_t>                                                                           \
  void decoder_norm_##isa(const DecoderNormParams<scalar_t>& p, int64_t begin, int64_t end);          \
  template <class scalar_t>                                                                           \
  void decoder_all_heads_##isa(const DecoderAllHeadsParams<scalar_t>& p, int64_t begin, int64_t end); \
  template <class scalar_t>                                                                           \
  void decoder_heads_##isa(const DecoderHeadsParams<scalar_t>& p, int64_t begin, int64_t end);        \
  template <class scalar_t>                                                                           \
  void decoder_cap_##isa(const DecoderCapParams<scalar_t>& p, int64_t begin, int64_t end);            \
  template <class scalar_t>                                                                           \
  void decoder_best_##isa(const DecoderBestParams<scalar_t>& p, int64_t begin, int64_t end);          \
  void decoder_router_##isa(const DecoderRouterParams& p, int64_t begin, int64_t end);
FLEXTRON_DECLARE_DECODER(cpu)
FLEXTRON_DECLARE_DECODER(avx2)
FLEXTRON_DECLARE_DECODER(avx512)
#undef FLEXTRON_DECLARE_DECODER

}  // namespace flextron
