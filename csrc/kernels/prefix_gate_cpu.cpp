// prefix_gate on the CPU.
#include "kernels/prefix_gate.h"

namespace flextron {

template <class scalar_t>
void prefix_gate_cpu(const PrefixGateParams<scalar_t>& p, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t)
    for (int64_t n = 0; n < p.N; ++n) p.y[t * p.N + n] = prefix_gate_at(p, t, n);
}

template <class scalar_t>
void prefix_gate_backward_cpu(const PrefixGateBackwardParams<scalar_t>& p, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t) {
    accumulate_t<scalar_t> sum[kPrefixGateLanes];
    for (int lane = 0; lane < kPrefixGateLanes; ++lane) sum[lane] = prefix_gate_partial(p, t, lane);
    for (int half = kPrefixGateLanes / 2; half > 0; half /= 2)
      for (int lane = 0; lane < half; ++lane) sum[lane] += sum[lane + half];
    p.dgate[t] = static_cast<float>(sum[0]);
  }
}

#define FLEXTRON_PREFIX_GATE(scalar_t)                                                \
  template void prefix_gate_cpu(const PrefixGateParams<scalar_t>&, int64_t, int64_t); \
  template void prefix_gate_backward_cpu(const PrefixGateBackwardParams<scalar_t>&, int64_t, int64_t);
FLEXTRON_PREFIX_GATE(float)
FLEXTRON_PREFIX_GATE(double)
FLEXTRON_PREFIX_GATE(bf16)
FLEXTRON_PREFIX_GATE(fp16)

}  // namespace flextron
