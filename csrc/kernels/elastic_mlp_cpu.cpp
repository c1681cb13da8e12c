// elastic_mlp between its GEMMs for any CPU: the loops of elastic_mlp_block.h as the compiler's baseline runs
// them.
#include "kernels/elastic_mlp_block.h"

namespace flextron {

FLEXTRON_DEFINE_ELASTIC_MLP(cpu)

}  // namespace flextron
