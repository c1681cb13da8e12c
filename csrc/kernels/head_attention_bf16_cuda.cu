// head_attention by the tensor cores, bf16.
#include "kernels/head_attention_tiles.cuh"

namespace flextron {

FLEXTRON_HEAD_ATTENTION_TILES(bf16)

}  // namespace flextron
