// head_attention by the tensor cores, fp16.
#include "kernels/head_attention_tiles.cuh"

namespace flextron {

FLEXTRON_HEAD_ATTENTION_TILES(fp16)

}  // namespace flextron
