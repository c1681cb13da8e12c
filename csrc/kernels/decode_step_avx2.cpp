// decode_step with AVX2 and FMA: the loops of decode_step_block.h, chosen at run time.
#include "kernels/decode_step_block.h"

namespace flextron {

FLEXTRON_DEFINE_DECODE_STEP(avx2)

}  // namespace flextron
