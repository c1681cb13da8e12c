// The part of elastic_mlp between its GEMMs: activation, product, soft gate, and their gradients.
//
//   h[r, b] = act(g[r, b]) * u[r, b]        s_b = sum_{c: d_c > b} gate[r, c]        y = (s * h) w_down^T
//   h[r, b] = act(u[r, b])                  where there is no g (plain MLP); s = 1 where there is no gate
//
//   C choices d_1 < ... < d_C
#pragma once

#include <cstdint>

#include "core/dispatch.h"
#include "core/math.h"
#include "core/types.h"

struct CUstream_st;  // cudaStream_t, without the CUDA headers

namespace flextron {

enum class Activation : int64_t { kRelu, kRelu2, kGelu, kGeluTanh, kSilu };
using Activations = IntList<0, 1, 2, 3, 4>;

// act(x) and act'(x) on a GPU; the CPU's are in vector_activation.h. At |x| = kFlatActivation both have
// reached their limits. Beyond it they are evaluated there, since infinity times 0 is NaN. NaN stays NaN.
constexpr double kFlatActivation = 1e4;
template <class real>
FLEXTRON_HD real low_enough(real x) {
  return x < real(-kFlatActivation) ? real(-kFlatActivation) : x;
}
template <class real>
FLEXTRON_HD real near_enough(real x) {
  return x > real(kFlatActivation) ? real(kFlatActivation) : low_enough(x);
}
template <Activation activation, class real>
FLEXTRON_HD real activate(real x) {
  const real positive = x < real(0) ? real(0) : x;  // keeps NaN
  if constexpr (activation == Activation::kRelu) return positive;
  if constexpr (activation == Activation::kRelu2) return positive * positive;
  if constexpr (activation == Activation::kGelu)
    return real(0.5) * low_enough(x) * (real(1) + erf_of(x * real(0.70710678118654752)));
  if constexpr (activation == Activation::kGeluTanh) {
    const real inner = real(0.79788456080286536) * (x + real(0.044715) * x * x * x);
    return real(0.5) * low_enough(x) * (real(1) + tanh_of(inner));
  }
  if constexpr (activation == Activation::kSilu) return low_enough(x) * sigmoid_of(x);
}

template <Activation activation, class real>
FLEXTRON_HD real activate_derivative(real x) {
  if constexpr (activation == Activation::kRelu) return x <= real(0) ? real(0) : real(1);
  if constexpr (activation == Activation::kRelu2) return x <= real(0) ? real(0) : real(2) * x;
  x = near_enough(x);
  if constexpr (activation == Activation::kGelu) {
    const real density = real(0.39894228040143268) * exp_of(real(-0.5) * x * x);
    return real(0.5) * (real(1) + erf_of(x * real(0.70710678118654752))) + x * density;
  }
  if constexpr (activation == Activation::kGeluTanh) {
    const real inner = real(0.79788456080286536) * (x + real(0.044715) * x * x * x);
    const real slope = real(0.79788456080286536) * (real(1) + real(3 * 0.044715) * x * x);
    const real t = tanh_of(inner);
    return real(0.5) * (real(1) + t) + real(0.5) * x * (real(1) - t * t) * slope;
  }
  if constexpr (activation == Activation::kSilu) {
    const real s = sigmoid_of(x);
    return s * (real(1) + x * (real(1) - s));
  }
}

// The same in a kernel that serves every activation. All threads take the same branch, and it is cheap beside
// a whole dot product.
#define FLEXTRON_ACTIVATE(function)              \
  switch (activation) {                          \
    case Activation::kRelu:                      \
      return function<Activation::kRelu>(x);     \
    case Activation::kRelu2:                     \
      return function<Activation::kRelu2>(x);    \
    case Activation::kGelu:                      \
      return function<Activation::kGelu>(x);     \
    case Activation::kGeluTanh:                  \
      return function<Activation::kGeluTanh>(x); \
    default:                                     \
      return function<Activation::kSilu>(x);     \
  }
template <class real>
FLEXTRON_HD real activate(Activation activation, real x) {
  FLEXTRON_ACTIVATE(activate)
}
template <class real>
FLEXTRON_HD real activate_derivative(Activation activation, real x) {
  FLEXTRON_ACTIVATE(activate_derivative)
}
#undef FLEXTRON_ACTIVATE

// ---- GPUs: the hidden neurons in one kernel, GEMMs included; y = h w_down^T is elastic_linear's ----

constexpr int kMaxChoices = 32;  // choices of a soft gate, which are passed by value

template <class scalar_t>
struct ElasticMlpHiddenParams {
  const scalar_t* x;       // [T, K], rows x_stride apart, innermost contiguous
  const scalar_t* w_gate;  // [F, K], rows w_gate_stride apart; null in a plain MLP
  const scalar_t* w_up;    // [F, K], rows w_up_stride apart
  const scalar_t* b_gate;  // [F], or null
  const scalar_t* b_up;    // [F], or null
  scalar_t* h;             // [T, width], contiguous: s * h, zeros from a row's extent to the end of the tile
  const int64_t*
      extent;  // on the device: [T] (descending where rows are sorted), [1] for all, or null: width
  const accumulate_t<scalar_t>* gate;  // [T, C], or one row where gate_stride is 0; null: s = 1
  int64_t choices[kMaxChoices];        // [C], ascending
  int64_t T, K, width, C, x_stride, w_gate_stride, w_up_stride, gate_stride;
  bool per_token;  // the extent has T entries
  Activation activation;
};

// s of neuron j of row t.
template <class scalar_t>
FLEXTRON_HD accumulate_t<scalar_t> gate_scale(const ElasticMlpHiddenParams<scalar_t>& p, int64_t t,
                                              int64_t j) {
  if (!p.gate) return accumulate_t<scalar_t>(1);
  accumulate_t<scalar_t> scale = 0;
  for (int64_t c = 0; c < p.C; ++c)
    if (j < p.choices[c]) scale += p.gate[t * p.gate_stride + c];
  return scale;
}

// Any GPU from sm_80 up, any address and stride; bf16, fp16. Rows with extents of their own are sorted. Tiles
// of h that no row needs are left as they are.
template <class scalar_t>
void elastic_mlp_hidden_cuda(const ElasticMlpHiddenParams<scalar_t>& p, CUstream_st* stream);

// Up to kDecodeTokens tokens, in any order; bf16, fp16; any GPU from sm_80 up. All of h is written.
template <class scalar_t>
void elastic_mlp_decode_cuda(const ElasticMlpHiddenParams<scalar_t>& p, CUstream_st* stream);

// sm_90 only; bf16, fp16. `fits` says whether TMA can take these addresses and strides; if so, the launch may
// be made. Rows with extents of their own are sorted. Tiles of h that no row needs are left as they are.
template <class scalar_t>
bool elastic_mlp_hidden_fits_sm90(const ElasticMlpHiddenParams<scalar_t>& p);
template <class scalar_t>
void elastic_mlp_hidden_sm90(const ElasticMlpHiddenParams<scalar_t>& p, CUstream_st* stream);

// The same for up to kDecodeTokens tokens, in any order. All of h is written.
template <class scalar_t>
bool elastic_mlp_decode_fits_sm90(const ElasticMlpHiddenParams<scalar_t>& p);
template <class scalar_t>
void elastic_mlp_decode_sm90(const ElasticMlpHiddenParams<scalar_t>& p, CUstream_st* stream);

// What lies between GEMMs that are launches of their own, ours or cuBLAS's: in the backward of every dtype;
// and in the forward with float or double, with cuBLAS, or if u and g are kept for the backward. Matrices are
// [T, width], contiguous. Each row is read and written as far as its extent. A result may lie where its
// operands do.
template <class scalar_t>
struct ElasticMlpRowsParams {
  const scalar_t* g;                   // before the activation; null in a plain MLP
  const scalar_t* u;                   // before it there, the factor beside it in a gated one
  scalar_t* h;                         // s * h, made by both
  const scalar_t* dh;                  // gradient of s * h, backward only
  scalar_t* dg;                        // gradients of g and u, backward only
  scalar_t* du;                        //
  const accumulate_t<scalar_t>* gate;  // as above
  accumulate_t<scalar_t>* dgate;       // [T, C], backward only; null when not wanted
  const int64_t* extent;               // as above
  int64_t choices[kMaxChoices];        // as above; one, width, where there is no gate
  int64_t T, width, C, gate_stride;
  bool per_token;
  Activation activation;
};
template <class scalar_t>
void elastic_mlp_rows_cuda(const ElasticMlpRowsParams<scalar_t>& p, CUstream_st* stream);
template <class scalar_t>
void elastic_mlp_rows_backward_cuda(const ElasticMlpRowsParams<scalar_t>& p, CUstream_st* stream);

// ---- CPUs: what lies between GEMMs ----

// R rows; a result may lie where its operands do.
template <class in_t, class out_t>
struct ElasticMlpParams {
  const in_t* g;                    // [R, d] before the activation; null in a plain MLP
  const in_t* u;                    // [R, d] before it there, the factor beside it in a gated one
  const out_t* dh;                  // [R, d] gradient of s * h, backward only
  out_t* h;                         // [R, d] s * h, made by both
  out_t* dg;                        // [R, d] gradients of g and u, backward only
  out_t* du;                        //
  const accumulate_t<out_t>* gate;  // [R, C], or one row where gate_stride is 0; null: s = 1
  accumulate_t<out_t>* dgate;       // [R, C], backward only; null when not wanted
  const int64_t* choices;           // [C]; one, d, where there is no gate
  int64_t R, d, C, gate_stride;
  int64_t in_stride, out_stride;  // elements between the rows of g and u, and of the others
  Activation activation;
};

// Rows [begin, end); the caller cuts R into ranges, one per thread.
#define FLEXTRON_ELASTIC_MLP_LAUNCHERS(isa)                                                   \
  template <class in_t, class out_t>                                                          \
  void elastic_mlp_##isa(const ElasticMlpParams<in_t, out_t>& p, int64_t begin, int64_t end); \
  template <class in_t, class out_t>                                                          \
  void elastic_mlp_backward_##isa(const ElasticMlpParams<in_t, out_t>& p, int64_t begin, int64_t end);
FLEXTRON_ELASTIC_MLP_LAUNCHERS(cpu)
FLEXTRON_ELASTIC_MLP_LAUNCHERS(avx2)
FLEXTRON_ELASTIC_MLP_LAUNCHERS(avx512)
#undef FLEXTRON_ELASTIC_MLP_LAUNCHERS

}  // namespace flextron
