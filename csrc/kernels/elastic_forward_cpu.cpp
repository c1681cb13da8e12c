// elastic_forward for any CPU: the loops of elastic_forward_block.h as the compiler's baseline runs them.
#include "kernels/elastic_forward_block.h"

namespace flextron {

FLEXTRON_DEFINE_ELASTIC_FORWARD(cpu)

}  // namespace flextron
