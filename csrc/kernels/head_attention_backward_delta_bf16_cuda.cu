// head_attention's delta by the tensor cores, bf16.
#include "kernels/head_attention_backward_tiles.cuh"

namespace flextron {

FLEXTRON_HEAD_ATTENTION_BACKWARD_TILES(kDelta, bf16)

}  // namespace flextron
