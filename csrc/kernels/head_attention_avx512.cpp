// head_attention with AVX-512 (F, BW, VL, DQ): the loops of head_attention_block.h, chosen at run time.
#include "kernels/head_attention_block.h"

namespace flextron {

FLEXTRON_DEFINE_HEAD_ATTENTION(avx512)

}  // namespace flextron
