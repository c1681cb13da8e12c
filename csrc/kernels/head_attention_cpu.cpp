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

#define FLEXTRON_SCRATCH_INSTANCES(scalar_t)                                     \
  template int64_t head_attention_scratch(const HeadAttentionParams<scalar_t>&); \
  template int64_t head_attention_backward_scratch(const HeadAttentionParams<scalar_t>&, BackwardPart);
FLEXTRON_SCRATCH_INSTANCES(float)
FLEXTRON_SCRATCH_INSTANCES(double)
FLEXTRON_SCRATCH_INSTANCES(bf16)
FLEXTRON_SCRATCH_INSTANCES(fp16)

}  // namespace flextron
