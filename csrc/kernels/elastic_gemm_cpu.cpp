// elastic_gemm for any CPU: the loops of elastic_gemm_block.h, chosen at run time.
#include "kernels/elastic_gemm_block.h"

namespace flextron {

FLEXTRON_DEFINE_ELASTIC_GEMM(cpu)

}  // namespace flextron
