// prefix_gate, the worked example of docs/add-an-op.md: each token is scaled by its gate and keeps a prefix
// of its features. No model calls it; it shows what an op consists of.
//
//   y[t, n] = gate[t] x[t, n]  for n < width[t],  0 elsewhere            T tokens, N features
//
//   dx[t, n] = gate[t] dy[t, n]  for n < width[t],  0 elsewhere          that is prefix_gate(dy, gate, width)
//   dgate[t] = sum_{n < width[t]} dy[t, n] x[t, n]
#pragma once

#include <cstdint>

#include "core/macros.h"
#include "core/types.h"

struct CUstream_st;  // cudaStream_t, without the CUDA headers

namespace flextron {

template <class scalar_t>
struct PrefixGateParams {
  const scalar_t* x;     // [T, N], contiguous
  const float* gate;     // [T]
  const int64_t* width;  // [T]; below 0 it means 0, above N it means N
  scalar_t* y;           // [T, N], contiguous; every element is written
  int64_t T, N;
};

template <class scalar_t>
struct PrefixGateBackwardParams {
  const scalar_t* dy;    // [T, N], contiguous
  const scalar_t* x;     // [T, N], contiguous
  const int64_t* width;  // [T]
  float* dgate;          // [T]; every element is written
  int64_t T, N;
};

// One element of y. The CPU's loop and the CUDA kernel differ only in who calls this. What lies beyond the
// width is not multiplied by 0 but not read: 0 times NaN is NaN.
template <class scalar_t>
FLEXTRON_HD scalar_t prefix_gate_at(const PrefixGateParams<scalar_t>& p, int64_t t, int64_t n) {
  using value_t = accumulate_t<scalar_t>;
  if (n >= p.width[t]) return scalar_t(0);
  return scalar_t(static_cast<value_t>(p.gate[t]) * static_cast<value_t>(p.x[t * p.N + n]));
}

// dgate[t] is added up by kPrefixGateLanes partial sums, which are then added in pairs. Both devices add in
// this order, and so are equally exact.
constexpr int kPrefixGateLanes = 128;

// One of them: the features lane, lane + kPrefixGateLanes, ...
template <class scalar_t>
FLEXTRON_HD accumulate_t<scalar_t> prefix_gate_partial(const PrefixGateBackwardParams<scalar_t>& p, int64_t t,
                                                       int lane) {
  using value_t = accumulate_t<scalar_t>;
  const int64_t end = p.width[t] < p.N ? p.width[t] : p.N;
  value_t sum = 0;
  for (int64_t n = lane; n < end; n += kPrefixGateLanes)
    sum += static_cast<value_t>(p.dy[t * p.N + n]) * static_cast<value_t>(p.x[t * p.N + n]);
  return sum;
}

// Tokens [begin, end). Any order, any thread.
template <class scalar_t>
void prefix_gate_cpu(const PrefixGateParams<scalar_t>& p, int64_t begin, int64_t end);
template <class scalar_t>
void prefix_gate_backward_cpu(const PrefixGateBackwardParams<scalar_t>& p, int64_t begin, int64_t end);

// Any GPU; float, double, bf16, fp16. One launch, none without tokens.
template <class scalar_t>
void prefix_gate_cuda(const PrefixGateParams<scalar_t>& p, CUstream_st* stream);
template <class scalar_t>
void prefix_gate_backward_cuda(const PrefixGateBackwardParams<scalar_t>& p, CUstream_st* stream);

}  // namespace flextron
