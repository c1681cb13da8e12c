// elastic_forward with AVX-512 (F, BW, VL, DQ): the loops of elastic_forward_block.h, chosen at run time.
#include "kernels/elastic_forward_block.h"

namespace flextron {

FLEXTRON_DEFINE_ELASTIC_FORWARD(avx512)

}  // namespace flextron
