// The loops of elastic_mlp between its GEMMs on a CPU, included once for each instruction set; vector.h says
// why all is anonymous. One row at a time, one block of constant gate at a time, a vector of neurons at a
// time.
#pragma once

#include <type_traits>

#include "kernels/elastic_mlp.h"
#include "kernels/vector_activation.h"

namespace flextron {
namespace {

// The first n lanes of a vector, zeros behind them.
template <class real, class T>
inline Vec<real> load_some(const T* x, i64 n) {
  if (n == kLanes<real>) return widened(x);
  Vec<real> v = {};
  for (i64 i = 0; i < n; ++i) v[i] = widen(x[i]);
  return v;
}
// All lanes as narrow() makes each, which GCC 12 does one by one: a fifth of the time of a backward's rows
// (AVX-512).
inline void store_all(bf16* to, Vec<float> v) {
  const Words w = (Words)v, rounded = (w + 0x7FFFu + ((w >> 16) & 1u)) >> 16;
  const Words bits = v != v ? Words{} + 0x7FC0u : rounded;
  using Halves = Loose<uint16_t>::type;
  *reinterpret_cast<Halves*>(to) = __builtin_convertvector(bits, Halves);
}
template <class real, class T>
inline void store_some(T* to, Vec<real> v, i64 n) {
  if constexpr (std::is_same_v<T, bf16>)
    if (n == kLanes<real>) return store_all(to, v);
  real lanes[kLanes<real>];
  for (i64 i = 0; i < kLanes<real>; ++i) lanes[i] = v[i];
  narrow_some<kLanes<real>>(lanes, to, n);
}

// f(c, j, n, s) for each n neurons from j on, scaled by s: the sum of gates c and later. after(c) behind each
// block.
template <class in_t, class out_t, class F, class After>
inline void for_each_vector(const ElasticMlpParams<in_t, out_t>& p, i64 row, const F& f, const After& after) {
  using real = accumulate_t<out_t>;
  for (i64 c = 0; c < p.C; ++c) {
    real s = p.gate == nullptr ? real(1) : real(0);
    if (p.gate != nullptr)
      for (i64 later = p.C - 1; later >= c; --later) s += p.gate[row * p.gate_stride + later];
    const i64 last = p.choices[c];
    for (i64 j = c == 0 ? 0 : p.choices[c - 1]; j < last; j += kLanes<real>)
      f(j, smaller(kLanes<real>, last - j), s);
    after(c);
  }
}

template <Activation activation, class in_t, class out_t>
void forward_rows(const ElasticMlpParams<in_t, out_t>& p, i64 begin, i64 end) {
  using real = accumulate_t<out_t>;
  for (i64 row = begin; row < end; ++row) {
    const i64 in = row * p.in_stride, out = row * p.out_stride;
    for_each_vector(
        p, row,
        [&](i64 j, i64 n, real s) {
          const Vec<real> u = load_some<real>(p.u + in + j, n);
          const Vec<real> value =
              curve<activation, real>(p.g == nullptr ? u : load_some<real>(p.g + in + j, n)).value;
          store_some<real>(p.h + out + j, s * (p.g == nullptr ? value : value * u), n);
        },
        [](i64) {});
  }
}

template <Activation activation, class in_t, class out_t>
void backward_rows(const ElasticMlpParams<in_t, out_t>& p, i64 begin, i64 end) {
  using real = accumulate_t<out_t>;
  for (i64 row = begin; row < end; ++row) {
    const i64 in = row * p.in_stride, out = row * p.out_stride;
    Vec<real> reached = {};  // of h * dh up to the current block: choice c reaches every neuron below d_c
    for_each_vector(
        p, row,
        [&](i64 j, i64 n, real s) {
          const Vec<real> u = load_some<real>(p.u + in + j, n), dscaled = load_some<real>(p.dh + out + j, n);
          const Curve<real> at =
              curve<activation, real>(p.g == nullptr ? u : load_some<real>(p.g + in + j, n));
          const Vec<real> h = p.g == nullptr ? at.value : at.value * u;
          reached += h * dscaled;
          store_some<real>(p.h + out + j, s * h, n);
          store_some<real>(p.du + out + j, s * dscaled * (p.g == nullptr ? at.slope : at.value), n);
          if (p.g != nullptr) store_some<real>(p.dg + out + j, s * dscaled * u * at.slope, n);
        },
        [&](i64 c) {
          if (p.dgate == nullptr) return;
          real sum = 0;
          for (i64 i = 0; i < kLanes<real>; ++i) sum += reached[i];
          p.dgate[row * p.C + c] = sum;
        });
  }
}

}  // namespace
}  // namespace flextron

// The launchers of elastic_mlp.h for the instruction set this file is compiled for. The hidden layer is of
// the op's dtype, or floats made from it.
#define FLEXTRON_ELASTIC_MLP_INSTANCES(isa, in_t, out_t)                                   \
  template void elastic_mlp_##isa(const ElasticMlpParams<in_t, out_t>&, int64_t, int64_t); \
  template void elastic_mlp_backward_##isa(const ElasticMlpParams<in_t, out_t>&, int64_t, int64_t);
#define FLEXTRON_DEFINE_ELASTIC_MLP(isa)                                                                \
  template <class in_t, class out_t>                                                                    \
  void elastic_mlp_##isa(const ElasticMlpParams<in_t, out_t>& p, int64_t begin, int64_t end) {          \
    with_activation(p.activation, [&](auto a) { forward_rows<decltype(a)::value>(p, begin, end); });    \
  }                                                                                                     \
  template <class in_t, class out_t>                                                                    \
  void elastic_mlp_backward_##isa(const ElasticMlpParams<in_t, out_t>& p, int64_t begin, int64_t end) { \
    with_activation(p.activation, [&](auto a) { backward_rows<decltype(a)::value>(p, begin, end); });   \
  }                                                                                                     \
  FLEXTRON_ELASTIC_MLP_INSTANCES(isa, float, float)                                                     \
  FLEXTRON_ELASTIC_MLP_INSTANCES(isa, double, double)                                                   \
  FLEXTRON_ELASTIC_MLP_INSTANCES(isa, bf16, bf16)                                                       \
  FLEXTRON_ELASTIC_MLP_INSTANCES(isa, fp16, fp16)                                                       \
  FLEXTRON_ELASTIC_MLP_INSTANCES(isa, bf16, float)                                                      \
  FLEXTRON_ELASTIC_MLP_INSTANCES(isa, fp16, float)
