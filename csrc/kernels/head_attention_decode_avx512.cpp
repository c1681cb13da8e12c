// head_attention_decode with AVX-512 (F, BW, VL, DQ): the loops of head_attention_decode_block.h, chosen at
// run time.
#include "kernels/head_attention_decode_block.h"

namespace flextron {

FLEXTRON_DEFINE_HEAD_ATTENTION_DECODE(avx512)

}  // namespace flextron
