// head_attention_decode for any CPU: the loops of head_attention_decode_block.h as the compiler's baseline
// runs them.
#include "kernels/head_attention_decode_block.h"

namespace flextron {

FLEXTRON_DEFINE_HEAD_ATTENTION_DECODE(cpu)

}  // namespace flextron
