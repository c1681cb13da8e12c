// elastic_linear: a linear layer that uses a prefix of its input and output features inside each block.
//
//   y[t, ob*out+n] = bias[ob*nw+n] + sum_{ib, i < in_t} x[t, ib*kx+i] weight[ob*nw+n, ib*kw+i]   for n <
//   out_t, else 0
//
//   T tokens, sorted by extent where each has its own; out = out_features
#pragma once

#include <cstdint>

#include "core/macros.h"
#include "core/types.h"

struct CUstream_st;  // cudaStream_t, without the CUDA headers

namespace flextron {

template <class scalar_t>
struct ElasticLinearParams {
  const scalar_t* x;          // [T, in_blocks * kx], rows x_stride apart
  const scalar_t* weight;     // [out_blocks * nw, in_blocks * kw], rows weight_stride apart
  const scalar_t* bias;       // [out_blocks * nw], or null
  scalar_t* y;                // [T, out_blocks * out_features], contiguous; every element is written
  const int64_t* in_extent;   // on the device: [T] descending, [1] for all rows, or null: in_features
  const int64_t* out_extent;  // the same for outputs; at most one of the two
  // x has at most 2^30 columns, weight as many rows and columns; strides are in elements.
  int64_t T, in_features, out_features, in_blocks, out_blocks, kx, kw, nw, x_stride, weight_stride;
  bool per_token;  // the extent that is there has T entries
};

// The gradients for dy: dx = dy W, dweight = dy^T x, dbias = the sum of dy's rows, all as far as the extents
// reach and exact zeros elsewhere. With a second pair of dy and weight, dx is the sum of both. Pointers that
// a launcher does not name may be null.
template <class scalar_t>
struct ElasticLinearBackwardParams {
  const scalar_t* dy;       // [T, out_blocks * out_features], rows dy_stride apart
  const scalar_t* dy2;      // the same, or null
  const scalar_t* x;        // [T, in_blocks * kx], rows x_stride apart
  const scalar_t* weight;   // [out_blocks * nw, in_blocks * kw], rows weight_stride apart
  const scalar_t* weight2;  // the same, rows weight2_stride apart; null without dy2
  scalar_t* dx;             // [T, in_blocks * kx], contiguous, as are the others; every element is written
  scalar_t* dweight;        // [out_blocks * nw, in_blocks * kw]
  scalar_t* dbias;          // [out_blocks * nw]
  const int64_t* in_extent;
  const int64_t* out_extent;
  int64_t T, in_features, out_features, in_blocks, out_blocks, kx, kw, nw, dy_stride, x_stride, weight_stride,
      weight2_stride;
  bool per_token;
};

// The value of an extent on the device, moved into its range so that a wrong one causes no memory fault.
FLEXTRON_HD int64_t extent_at(const int64_t* extent, bool per_token, int64_t t, int64_t features) {
  if (extent == nullptr) return features;
  const int64_t value = extent[per_token ? t : 0];
  return value < 0 ? 0 : value > features ? features : value;
}

// The inputs and outputs of each block that row t uses. Extents descend, so the first row of a tile is its
// widest.
template <class scalar_t>
FLEXTRON_HD int64_t in_extent_at(const ElasticLinearParams<scalar_t>& p, int64_t t) {
  return extent_at(p.in_extent, p.per_token, t, p.in_features);
}
template <class scalar_t>
FLEXTRON_HD int64_t out_extent_at(const ElasticLinearParams<scalar_t>& p, int64_t t) {
  return extent_at(p.out_extent, p.per_token, t, p.out_features);
}

// Any GPU from sm_80 up, any address and stride; float, double, bf16, fp16. One launch, or none if y is
// empty.
template <class scalar_t>
void elastic_linear_cuda(const ElasticLinearParams<scalar_t>& p, CUstream_st* stream);

// The gradients, likewise: dx reads dy and weight, dweight dy and x, dbias dy.
template <class scalar_t>
void elastic_linear_backward_input_cuda(const ElasticLinearBackwardParams<scalar_t>& p, CUstream_st* stream);
template <class scalar_t>
void elastic_linear_backward_weight_cuda(const ElasticLinearBackwardParams<scalar_t>& p, CUstream_st* stream);
template <class scalar_t>
void elastic_linear_backward_bias_cuda(const ElasticLinearBackwardParams<scalar_t>& p, CUstream_st* stream);

// Up to kDecodeTokens tokens, in any order; bf16, fp16; any GPU from sm_80 up.
constexpr int64_t kDecodeTokens = 64;  // more sums do not fit into registers
template <class scalar_t>
void elastic_linear_decode_cuda(const ElasticLinearParams<scalar_t>& p, CUstream_st* stream);

// sm_90 only; bf16, fp16. `fits` says whether TMA can take these addresses and strides; if so, the launch may
// be made. `dependent`: it may start before the launch ahead of it in the stream has ended, and then it reads
// only x of that launch's results.
template <class scalar_t>
bool elastic_linear_backward_input_fits_sm90(const ElasticLinearBackwardParams<scalar_t>& p);
template <class scalar_t>
void elastic_linear_backward_input_sm90(const ElasticLinearBackwardParams<scalar_t>& p, CUstream_st* stream);
template <class scalar_t>
bool elastic_linear_backward_weight_fits_sm90(const ElasticLinearBackwardParams<scalar_t>& p);
template <class scalar_t>
void elastic_linear_backward_weight_sm90(const ElasticLinearBackwardParams<scalar_t>& p, CUstream_st* stream);
template <class scalar_t>
bool elastic_linear_fits_sm90(const ElasticLinearParams<scalar_t>& p);
template <class scalar_t>
void elastic_linear_sm90(const ElasticLinearParams<scalar_t>& p, CUstream_st* stream, bool dependent = false);

// The same for up to kDecodeTokens tokens, in any order. `x_is_clean`: x is zero behind every token's extent.
template <class scalar_t>
bool elastic_linear_decode_fits_sm90(const ElasticLinearParams<scalar_t>& p);
template <class scalar_t>
void elastic_linear_decode_sm90(const ElasticLinearParams<scalar_t>& p, CUstream_st* stream, bool x_is_clean,
                                bool dependent);

}  // namespace flextron
