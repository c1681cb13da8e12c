// The decoder for any CPU: the loops of decoder_block.h as the compiler's baseline runs them.
#include "kernels/decoder_block.h"

namespace flextron {

FLEXTRON_DEFINE_DECODER(cpu)

}  // namespace flextron
