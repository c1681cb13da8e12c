// head_attention with AVX2 and FMA: the loops of head_attention_block.h, chosen at run time.
#include "kernels/head_attention_block.h"

namespace flextron {

FLEXTRON_DEFINE_HEAD_ATTENTION(avx2)

}  // namespace flextron
