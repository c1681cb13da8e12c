// head_attention's gradients on Hopper, bf16.
#include "kernels/head_attention_backward_sm90.cuh"

namespace flextron {

FLEXTRON_HEAD_ATTENTION_BACKWARD_SM90(bf16)

}  // namespace flextron
