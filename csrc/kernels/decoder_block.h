// The decoder's loops on a CPU between its GEMMs and attention, included once for each instruction set;
// vector.h says why everything here is anonymous.
#pragma once

#include "kernels/decoder.h"
#include "kernels/vector.h"

namespace flextron {
namespace {

// Eight sums side by side, whatever the vectors: the compiler may not reorder one.
inline float sum_of_squares(const float* x, i64 n) {
  float sum[8] = {};
  i64 i = 0;
  for (; i + 8 <= n; i += 8)
    for (i64 e = 0; e < 8; ++e) sum[e] += x[i + e] * x[i + e];
  for (; i < n; ++i) sum[i % 8] += x[i] * x[i];
  return ((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7]));
}

// 1 / sqrt(mean(x^2) + eps).
inline float inverse_norm(const float* x, i64 n, float eps) {
  return 1.0f / __builtin_sqrtf(sum_of_squares(x, n) / float(n) + eps);
}

// The mean of n, in eight sums as above.
inline float mean_of(const float* x, i64 n) {
  float sum[8] = {};
  i64 i = 0;
  for (; i + 8 <= n; i += 8)
    for (i64 e = 0; e < 8; ++e) sum[e] += x[i + e];
  for (; i < n; ++i) sum[i % 8] += x[i];
  return (((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7]))) / float(n);
}

template <NormKind kind, class scalar_t>
inline float factor(scalar_t weight) {
  const float value = widen(weight);
  if constexpr (kind == NormKind::kRmsPlusOne) return 1.0f + value;
  if constexpr (kind == NormKind::kLayerPlusOne) {
    scalar_t rounded;
    narrow(1.0f + value, &rounded);
    return widen(rounded);
  }
  return value;
}

// to = norm(x), with a weight; `to` is other memory than x.
template <NormKind kind, class scalar_t>
inline void normalise(const DecoderNorm<scalar_t>& norm, const float* __restrict x, i64 n, float eps,
                      float* __restrict to) {
  if constexpr (kind == NormKind::kRms || kind == NormKind::kRmsPlusOne) {
    const float inverse = inverse_norm(x, n, eps);
    for (i64 i = 0; i < n; ++i) to[i] = x[i] * inverse * factor<kind>(norm.weight[i]);
  } else {
    const float mean = mean_of(x, n);
    for (i64 i = 0; i < n; ++i) to[i] = x[i] - mean;
    const float inverse = inverse_norm(to, n, eps);
    for (i64 i = 0; i < n; ++i) to[i] = to[i] * inverse * factor<kind>(norm.weight[i]);
  }
  if (norm.bias)
    for (i64 i = 0; i < n; ++i) to[i] += widen(norm.bias[i]);
}

template <NormKind kind, class scalar_t>
void norm_rows(const DecoderNormParams<scalar_t>& p, i64 begin, i64 end) {
  for (i64 r = begin; r < end; ++r) {
    float* __restrict x = p.x + r * p.x_stride;
    float* __restrict to = p.to + r * p.x_stride;
    if (p.add && (!p.used || p.used[r] > 0)) {
      const float* add = p.add + r * p.K;
      if (p.post.weight) {
        normalise<kind>(p.post, add, p.K, p.eps, to);
        add = to;
      }
      for (i64 i = 0; i < p.K; ++i) x[i] += p.scale * add[i];
    }
    if (p.norm.weight)
      normalise<kind>(p.norm, x, p.K, p.eps, to);
    else
      for (i64 i = 0; i < p.K; ++i) to[i] = x[i];
  }
}

// f with the kind as a template argument: f.operator()<kind>().
template <class F>
inline void with_norm(NormKind kind, const F& f) {
  switch (kind) {
    case NormKind::kRms:
      return f.template operator()<NormKind::kRms>();
    case NormKind::kRmsPlusOne:
      return f.template operator()<NormKind::kRmsPlusOne>();
    case NormKind::kLayer:
      return f.template operator()<NormKind::kLayer>();
    case NormKind::kLayerPlusOne:
      return f.template operator()<NormKind::kLayerPlusOne>();
  }
}

constexpr float kRouterEps = 0x1p-23f, kRouterSlope = 0.1f;  // as in the formula

void router_rows(const DecoderRouterParams& p, i64 begin, i64 end) {
  for (i64 r = begin; r < end; ++r) {
    const float inverse = inverse_norm(p.normed + r * p.row_stride, p.K, kRouterEps);
    const float* __restrict state = p.state + r / p.rows_each * p.state_stride;
    float* __restrict h = p.h + r * p.hidden;
    for (i64 i = 0; i < p.hidden; ++i) {
      const float sum = state[i] + inverse * h[i];
      h[i] = sum < 0 ? kRouterSlope * sum : sum;
    }
  }
}

template <NormKind kind, class scalar_t>
void norm_all_heads(const DecoderAllHeadsParams<scalar_t>& p, i64 begin, i64 end) {
  for (i64 r = begin; r < end; ++r) {
    const i64 kept = p.unit * (p.extents ? p.extents[r] : p.extent), count = kept * p.blocks;
    float* const x = p.x + r * p.blocks * p.block;
    float total = 0;
    for (i64 b = 0; b < p.blocks; ++b) total += sum_of_squares(x + b * p.block, kept);
    const float inverse = 1.0f / __builtin_sqrtf(total / float(count > 0 ? count : 1) + p.eps);
    const i64 written = kept < p.least ? p.least : kept;
    for (i64 b = 0; b < p.blocks; ++b) {
      float* __restrict to = x + b * p.block;
      const scalar_t* const weight = p.norm.weight + b * p.norm_block;
      for (i64 i = 0; i < written; ++i) to[i] = to[i] * inverse * factor<kind>(weight[i]);
      if (!p.norm.bias) continue;
      for (i64 i = 0; i < written; ++i) to[i] += widen(p.norm.bias[b * p.norm_block + i]);
    }
  }
}

// to = turn(head), whose elements are adjacent; no turn where cos is null.
template <class scalar_t, class to_t>
inline void turn(const DecoderHeadsParams<scalar_t>& p, const scalar_t* cos, const scalar_t* sin,
                 const float* __restrict head, to_t* __restrict to) {
  const i64 R = cos ? p.R : 0, half = R / 2;
  if (p.rotation == Rotation::kHalves) {
    for (i64 i = 0; i < half; ++i) {
      const float a = head[i], b = head[i + half];
      narrow(a * widen(cos[i]) - b * widen(sin[i]), to + i);
      narrow(b * widen(cos[i + half]) + a * widen(sin[i + half]), to + i + half);
    }
  } else {
    for (i64 i = 0; i < R; i += 2) {
      const float a = head[i], b = head[i + 1];
      narrow(a * widen(cos[i]) - b * widen(sin[i]), to + i);
      narrow(b * widen(cos[i + 1]) + a * widen(sin[i + 1]), to + i + 1);
    }
  }
  for (i64 d = R; d < p.D; ++d) narrow(head[d], to + d);
}

template <NormKind kind, class scalar_t>
inline void turn_head(const DecoderHeadsParams<scalar_t>& p, const DecoderNorm<scalar_t>& norm,
                      const float* from, const scalar_t* cos, const scalar_t* sin, scalar_t* to) {
  float head[kLongestHead];
  if (norm.weight && !p.norm_last)
    normalise<kind>(norm, from, p.D, p.eps, head);
  else
    for (i64 d = 0; d < p.D; ++d) head[d] = from[d];
  if (p.clip < float(__builtin_inf()))
    for (i64 d = 0; d < p.D; ++d) head[d] = head[d] > p.clip ? p.clip : head[d] < -p.clip ? -p.clip : head[d];
  if (!norm.weight || !p.norm_last) return turn(p, cos, sin, head, to);
  float turned[kLongestHead];
  turn(p, cos, sin, head, turned);
  normalise<kind>(norm, turned, p.D, p.eps, head);
  for (i64 d = 0; d < p.D; ++d) narrow(head[d], to + d);
}

template <NormKind kind, class scalar_t>
void turn_rows(const DecoderHeadsParams<scalar_t>& p, i64 begin, i64 end) {
  for (i64 r = begin; r < end; ++r) {
    const i64 b = r / p.T, t = r % p.T, table = (p.one_table ? t : r) * p.table_stride;
    const scalar_t *const cos = p.cos ? p.cos + table : nullptr, *const sin = p.cos ? p.sin + table : nullptr;
    scalar_t* to = p.to + b * p.to_stride_b + t * p.to_stride_t;
    for (i64 g = 0; g < p.groups; ++g)
      for (i64 i = 0; i < p.each; ++i, to += p.to_stride_h) {
        DecoderNorm<scalar_t> norm = p.norm;
        const i64 place = g * p.norm_group + i * p.norm_head;
        if (norm.weight) norm.weight += place;
        if (norm.bias) norm.bias += place;
        turn_head<kind>(p, norm, p.from + r * p.from_row + g * p.from_group + i * p.D, cos, sin, to);
      }
  }
}

// Where the greatest of n is: the first of equals, the first NaN before all others.
template <class scalar_t>
i64 best_of(const scalar_t* x, i64 n) {
  constexpr i64 kBlock = 256, lanes = kLanes<float>;  // only the block that has it is searched
  const float lowest = -float(__builtin_inf());
  float most = lowest;
  i64 block = 0;
  for (i64 at = 0; at < n; at += kBlock) {
    const i64 end = smaller(at + kBlock, n);
    Vec<float> greatest = Vec<float>{} + lowest, nans = {};
    i64 i = at;
    for (; i + lanes <= end; i += lanes) {
      const Vec<float> value = widened(x + i);
      greatest = greatest < value ? value : greatest;
      nans = value == value ? nans : value;
    }
    float here = lowest;
    bool has_nan = false;
    for (i64 e = 0; e < lanes; ++e) {
      here = here < greatest[e] ? greatest[e] : here;
      has_nan = has_nan || nans[e] != nans[e];
    }
    for (; i < end; ++i) {
      const float value = widen(x[i]);
      here = here < value ? value : here;
      has_nan = has_nan || value != value;
    }
    if (has_nan)
      for (i = at; i < end; ++i)
        if (const float value = widen(x[i]); value != value) return i;
    if (most < here) most = here, block = at;
  }
  while (widen(x[block]) != most) ++block;
  return block;
}

template <class scalar_t>
void cap_elements(const DecoderCapParams<scalar_t>& p, i64 begin, i64 end) {
  constexpr i64 lanes = kLanes<float>;
  for (i64 at = begin; at < end; at += lanes) {
    const i64 count = smaller(lanes, end - at);
    Vec<float> value = {};
    for (i64 e = 0; e < count; ++e) value[e] = widen(p.x[at + e]);
    value = p.cap * vec_tanh(value / p.cap);
    for (i64 e = 0; e < count; ++e) narrow(value[e], p.x + at + e);
  }
}

template <class scalar_t>
void best_rows(const DecoderBestParams<scalar_t>& p, i64 begin, i64 end) {
  for (i64 r = begin; r < end; ++r) p.best[r] = best_of(p.logits + r * p.stride, p.vocabulary);
}

}  // namespace
}  // namespace flextron

// The launchers of decoder.h for the instruction set this file is compiled for.
#define FLEXTRON_DEFINE_DECODER(isa)                                                                   \
  template <class scalar_t>                                                                            \
  void decoder_norm_##isa(const DecoderNormParams<scalar_t>& p, int64_t begin, int64_t end) {          \
    with_norm(p.kind, [&]<NormKind kind>() { norm_rows<kind>(p, begin, end); });                       \
  }                                                                                                    \
  template <class scalar_t>                                                                            \
  void decoder_all_heads_##isa(const DecoderAllHeadsParams<scalar_t>& p, int64_t begin, int64_t end) { \
    p.kind == NormKind::kRms ? norm_all_heads<NormKind::kRms>(p, begin, end)                           \
                             : norm_all_heads<NormKind::kRmsPlusOne>(p, begin, end);                   \
  }                                                                                                    \
  template <class scalar_t>                                                                            \
  void decoder_heads_##isa(const DecoderHeadsParams<scalar_t>& p, int64_t begin, int64_t end) {        \
    with_norm(p.kind, [&]<NormKind kind>() { turn_rows<kind>(p, begin, end); });                       \
  }                                                                                                    \
  template <class scalar_t>                                                                            \
  void decoder_cap_##isa(const DecoderCapParams<scalar_t>& p, int64_t begin, int64_t end) {            \
    cap_elements(p, begin, end);                                                                       \
  }                                                                                                    \
  template <class scalar_t>                                                                            \
  void decoder_best_##isa(const DecoderBestParams<scalar_t>& p, int64_t begin, int64_t end) {          \
    best_rows(p, begin, end);                                                                          \
  }                                                                                                    \
  void decoder_router_##isa(const DecoderRouterParams& p, int64_t begin, int64_t end) {                \
    router_rows(p, begin, end);                                                                        \
  }                                                                                                    \
  FLEXTRON_DECODER_INSTANCES(isa, float)                                                               \
  FLEXTRON_DECODER_INSTANCES(isa, bf16)                                                                \
  FLEXTRON_DECODER_INSTANCES(isa, fp16)

#define FLEXTRON_DECODER_INSTANCES(isa, scalar_t)                                                  \
  template void decoder_norm_##isa(const DecoderNormParams<scalar_t>&, int64_t, int64_t);          \
  template void decoder_all_heads_##isa(const DecoderAllHeadsParams<scalar_t>&, int64_t, int64_t); \
  template void decoder_heads_##isa(const DecoderHeadsParams<scalar_t>&, int64_t, int64_t);        \
  template void decoder_cap_##isa(const DecoderCapParams<scalar_t>&, int64_t, int64_t);            \
  template void decoder_best_##isa(const DecoderBestParams<scalar_t>&, int64_t, int64_t);
