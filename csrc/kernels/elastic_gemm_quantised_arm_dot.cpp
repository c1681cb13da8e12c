// elastic_gemm over activations of eight bits, with ARM's dot products of bytes (SDOT): the loops of
// elastic_gemm_quantised.h, chosen at run time.
#include "kernels/elastic_gemm_quantised.h"

namespace flextron {

FLEXTRON_DEFINE_ELASTIC_GEMM_QUANTISED(arm_dot)

}  // namespace flextron
