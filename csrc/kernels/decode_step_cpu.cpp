// decode_step for any CPU: the loops of decode_step_block.h as the compiler's baseline runs them.
#include "kernels/decode_step_block.h"

namespace flextron {

FLEXTRON_DEFINE_DECODE_STEP(cpu)

}  // namespace flextron
