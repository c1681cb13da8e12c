// head_attention's gradients of keys and values by the tensor cores, fp16.
#include "kernels/head_attention_backward_tiles.cuh"

namespace flextron {

FLEXTRON_HEAD_ATTENTION_BACKWARD_TILES(kKeys, fp16)

}  // namespace flextron
