// elastic_mlp's elementwise loops for any CPU: one row at a time, one block of constant gate at a time.
#include "kernels/elastic_mlp.h"

namespace flextron {
namespace {

// f(c, first, last, s) for each block of the row: neurons [first, last) are scaled by s, the sum of gates c
// and later.
template <class scalar_t, class F>
void for_each_block(const ElasticMlpParams<scalar_t>& p, int64_t row, const F& f) {
  using real = accumulate_t<scalar_t>;
  for (int64_t c = 0; c < p.C; ++c) {
    real s = p.gate == nullptr ? real(1) : real(0);
    if (p.gate != nullptr)
      for (int64_t later = p.C - 1; later >= c; --later) s += p.gate[row * p.gate_stride + later];
    f(c, c == 0 ? int64_t{0} : p.choices[c - 1], p.choices[c], s);
  }
}

template <Activation activation, class scalar_t>
void forward_rows(const ElasticMlpParams<scalar_t>& p, int64_t begin, int64_t end) {
  using real = accumulate_t<scalar_t>;
  for (int64_t row = begin; row < end; ++row)
    for_each_block(p, row, [&](int64_t, int64_t first, int64_t last, real s) {
      scalar_t* __restrict u = p.u + row * p.ld;
      const scalar_t* __restrict g = p.g + (p.g == nullptr ? 0 : row * p.ld);
      if (p.g == nullptr) {
        for (int64_t b = first; b < last; ++b) u[b] = scalar_t(activate<activation>(real(u[b])) * s);
      } else {
        for (int64_t b = first; b < last; ++b)
          u[b] = scalar_t(activate<activation>(real(g[b])) * real(u[b]) * s);
      }
    });
}

template <Activation activation, class scalar_t>
void backward_rows(const ElasticMlpParams<scalar_t>& p, int64_t begin, int64_t end) {
  using real = accumulate_t<scalar_t>;
  for (int64_t row = begin; row < end; ++row) {
    real reached = 0;  // of h * dh up to the current block: choice c reaches every neuron below d_c
    for_each_block(p, row, [&](int64_t c, int64_t first, int64_t last, real s) {
      scalar_t* __restrict u = p.u + row * p.ld;
      scalar_t* __restrict dh = p.dh + row * p.ld;
      scalar_t* __restrict g = p.g + (p.g == nullptr ? 0 : row * p.ld);
      real sum = 0;
      for (int64_t b = first; b < last; ++b) {
        const real up = real(u[b]), dscaled = real(dh[b]), pre = p.g == nullptr ? up : real(g[b]);
        const real a = activate<activation>(pre), slope = activate_derivative<activation>(pre);
        const real h = p.g == nullptr ? a : a * up;
        sum += h * dscaled;
        dh[b] = scalar_t(s * h);
        u[b] = scalar_t(p.g == nullptr ? s * dscaled * slope : s * dscaled * a);
        if (p.g != nullptr) g[b] = scalar_t(s * dscaled * up * slope);
      }
      reached += sum;
      if (p.dgate != nullptr) p.dgate[row * p.C + c] = reached;
    });
  }
}

}  // namespace

template <class scalar_t>
void elastic_mlp_cpu(const ElasticMlpParams<scalar_t>& p, int64_t begin, int64_t end) {
  dispatch_int(Activations{}, "elastic_mlp", "activation", static_cast<int64_t>(p.activation),
               [&](auto a) { forward_rows<static_cast<Activation>(a.value)>(p, begin, end); });
}

template <class scalar_t>
void elastic_mlp_backward_cpu(const ElasticMlpParams<scalar_t>& p, int64_t begin, int64_t end) {
  dispatch_int(Activations{}, "elastic_mlp_backward", "activation", static_cast<int64_t>(p.activation),
               [&](auto a) { backward_rows<static_cast<Activation>(a.value)>(p, begin, end); });
}

template void elastic_mlp_cpu(const ElasticMlpParams<float>&, int64_t, int64_t);
template void elastic_mlp_cpu(const ElasticMlpParams<double>&, int64_t, int64_t);
template void elastic_mlp_cpu(const ElasticMlpParams<bf16>&, int64_t, int64_t);
template void elastic_mlp_cpu(const ElasticMlpParams<fp16>&, int64_t, int64_t);
template void elastic_mlp_backward_cpu(const ElasticMlpParams<float>&, int64_t, int64_t);
template void elastic_mlp_backward_cpu(const ElasticMlpParams<double>&, int64_t, int64_t);
template void elastic_mlp_backward_cpu(const ElasticMlpParams<bf16>&, int64_t, int64_t);
template void elastic_mlp_backward_cpu(const ElasticMlpParams<fp16>&, int64_t, int64_t);

}  // namespace flextron
