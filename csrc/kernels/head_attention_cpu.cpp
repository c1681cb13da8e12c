// head_attention for any CPU: the loops of head_attention_block.h as the compiler's baseline runs them.
#include "kernels/head_attention_block.h"

namespace flextron {

FLEXTRON_DEFINE_HEAD_ATTENTION(cpu)

template <class scalar_t>
int64_t head_attention_scratch(const HeadAttentionParams<scalar_t>& p) {
  Arena arena{nullptr};
  take_rows(p, arena);
  take_softmax(p, arena);
  return arena.used;
}
template <class scalar_t>
int64_t head_attention_backward_scratch(const HeadAttentionParams<scalar_t>& p, BackwardPart part) {
  Arena arena{nullptr};
  take_rows(p, arena);
  take_backward(p, part, arena);
  return arena.used;
}

template <class scalar_t, class grad_t>
void head_attention_sinks_cpu(const HeadAttentionBackwardParams<scalar_t, grad_t>& p, int64_t T,
                              accumulate_t<scalar_t>* dsinks, int64_t first, int64_t last) {
  const HeadAttentionParams<scalar_t>& f = p.forward;
  for (int64_t h = first; h < last; ++h) {
    double sum = 0;
    for (int64_t at = h; at < T * f.H; at += f.H) {
      if (f.lse[at] == -__builtin_inf()) continue;
      double delta = p.delta ? p.delta[at] : 0;
      for (int64_t d = 0; !p.delta && d < f.D; ++d)
        delta += double(widen(p.dout[at * f.D + d])) * double(widen(f.out[at * f.D + d]));
      sum -= __builtin_exp(double(f.sinks[h]) - double(f.lse[at])) * delta;
    }
    dsinks[h] = static_cast<accumulate_t<scalar_t>>(sum);
  }
}

#define FLEXTRON_SINKS_INSTANCE(scalar_t, grad_t)                                                       \
  template void head_attention_sinks_cpu(const HeadAttentionBackwardParams<scalar_t, grad_t>&, int64_t, \
                                         accumulate_t<scalar_t>*, int64_t, int64_t);
FLEXTRON_SINKS_INSTANCE(float, float)
FLEXTRON_SINKS_INSTANCE(double, double)
FLEXTRON_SINKS_INSTANCE(bf16, bf16)
FLEXTRON_SINKS_INSTANCE(fp16, fp16)
FLEXTRON_SINKS_INSTANCE(bf16, float)
FLEXTRON_SINKS_INSTANCE(fp16, float)

#define FLEXTRON_SCRATCH_INSTANCES(scalar_t)                                     \
  template int64_t head_attention_scratch(const HeadAttentionParams<scalar_t>&); \
  template int64_t head_attention_backward_scratch(const HeadAttentionParams<scalar_t>&, BackwardPart);
FLEXTRON_SCRATCH_INSTANCES(float)
FLEXTRON_SCRATCH_INSTANCES(double)
FLEXTRON_SCRATCH_INSTANCES(bf16)
FLEXTRON_SCRATCH_INSTANCES(fp16)

}  // namespace flextron
