// head_attention_decode with AVX2 and FMA: the loops of head_attention_decode_block.h, chosen at run time.
#include "kernels/head_attention_decode_block.h"

namespace flextron {

FLEXTRON_DEFINE_HEAD_ATTENTION_DECODE(avx2)

}  // namespace flextron
