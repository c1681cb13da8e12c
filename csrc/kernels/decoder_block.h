// The decoder's loops on a CPU between its GEMMs and attention, included once for each instruction set;
// vector.h says why everything here is anonymous.
#pragma once

#include "kernels/decoder.h"
#include "kernels/vector.h"

namespace flextron {
namespace {

// 1 / sqrt(mean(x^2) + eps). Eight sums side by side, whatever the vectors: the compiler may not reorder one.
inline float inverse_norm(const float* x, i64 n, float eps) {
  float sum[8] = {};
  i64 i = 0;
  for (; i + 8 <= n; i += 8)
    for (i64 e = 0; e < 8; ++e) sum[e] += x[i + e] * x[i + e];
  for (; i < n; ++i) sum[i % 8] += x[i] * x[i];
  const float total = ((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7]));
  return 1.0f / __builtin_sqrtf(total / float(n) + eps);
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

// `head` is scratch of D floats.
template <NormKind kind, class scalar_t>
void turn_head(const DecoderHeadsParams<scalar_t>& p, const float* from, const scalar_t* cos,
               const scalar_t* sin, float* __restrict head, scalar_t* __restrict to) {
  if (p.norm.weight)
    normalise<kind>(p.norm, from, p.D, p.eps, head);
  else
    for (i64 d = 0; d < p.D; ++d) head[d] = from[d];
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
void turn_rows(const DecoderHeadsParams<scalar_t>& p, i64 begin, i64 end) {
  float head[kLongestHead];
  for (i64 r = begin; r < end; ++r) {
    const i64 b = r / p.T, t = r % p.T, table = (p.one_table ? t : r) * p.table_stride;
    for (i64 h = 0; h < p.heads; ++h)
      turn_head<kind>(p, p.from + (r * p.heads + h) * p.D, p.cos ? p.cos + table : nullptr,
                      p.cos ? p.sin + table : nullptr, head,
                      p.to + b * p.to_stride_b + t * p.to_stride_t + h * p.to_stride_h);
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
#define FLEXTRON_DEFINE_DECODER(isa)                                                            \
  template <class scalar_t>                                                                     \
  void decoder_norm_##isa(const DecoderNormParams<scalar_t>& p, int64_t begin, int64_t end) {   \
    with_norm(p.kind, [&]<NormKind kind>() { norm_rows<kind>(p, begin, end); });                \
  }                                                                                             \
  template <class scalar_t>                                                                     \
  void decoder_heads_##isa(const DecoderHeadsParams<scalar_t>& p, int64_t begin, int64_t end) { \
    with_norm(p.kind, [&]<NormKind kind>() { turn_rows<kind>(p, begin, end); });                \
  }                                                                                             \
  template <class scalar_t>                                                                     \
  void decoder_cap_##isa(const DecoderCapParams<scalar_t>& p, int64_t begin, int64_t end) {     \
    cap_elements(p, begin, end);                                                                \
  }                                                                                             \
  template <class scalar_t>                                                                     \
  void decoder_best_##isa(const DecoderBestParams<scalar_t>& p, int64_t begin, int64_t end) {   \
    best_rows(p, begin, end);                                                                   \
  }                                                                                             \
  void decoder_router_##isa(const DecoderRouterParams& p, int64_t begin, int64_t end) {         \
    router_rows(p, begin, end);                                                                 \
  }                                                                                             \
  FLEXTRON_DECODER_INSTANCES(isa, float)                                                        \
  FLEXTRON_DECODER_INSTANCES(isa, bf16)                                                         \
  FLEXTRON_DECODER_INSTANCES(isa, fp16)

#define FLEXTRON_DECODER_INSTANCES(isa, scalar_t)                                           \
  template void decoder_norm_##isa(const DecoderNormParams<scalar_t>&, int64_t, int64_t);   \
  template void decoder_heads_##isa(const DecoderHeadsParams<scalar_t>&, int64_t, int64_t); \
  template void decoder_cap_##isa(const DecoderCapParams<scalar_t>&, int64_t, int64_t);     \
  template void decoder_best_##isa(const DecoderBestParams<scalar_t>&, int64_t, int64_t);
