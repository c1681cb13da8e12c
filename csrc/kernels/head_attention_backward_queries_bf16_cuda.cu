// head_attention's gradient of queries by the tensor cores, bf16.
#include "kernels/head_attention_backward_tiles.cuh"

namespace flextron {

FLEXTRON_HEAD_ATTENTION_BACKWARD_TILES(kQueries, bf16)

}  // namespace flextron
