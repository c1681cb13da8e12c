// elastic_mlp between its GEMMs with AVX-512: the loops of elastic_mlp_block.h, chosen at run time.
#include "kernels/elastic_mlp_block.h"

namespace flextron {

FLEXTRON_DEFINE_ELASTIC_MLP(avx512)

}  // namespace flextron
