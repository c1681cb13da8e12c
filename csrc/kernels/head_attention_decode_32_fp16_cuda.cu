// head_attention_decode by the tensor cores, 32 rows a unit, fp16.
#include "kernels/head_attention_decode_tiles.cuh"

namespace flextron {

FLEXTRON_HEAD_ATTENTION_DECODE_TILES(fp16, 2)

}  // namespace flextron
