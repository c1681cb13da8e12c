// elastic_forward with AVX2 and FMA: the loops of elastic_forward_block.h, chosen at run time.
#include "kernels/elastic_forward_block.h"

namespace flextron {

FLEXTRON_DEFINE_ELASTIC_FORWARD(avx2)

}  // namespace flextron
