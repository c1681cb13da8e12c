// elastic_gemm with AVX2 and FMA: the loops of elastic_gemm_block.h, chosen at run time.
#include "kernels/elastic_gemm_block.h"

namespace flextron {

FLEXTRON_DEFINE_ELASTIC_GEMM(avx2)

}  // namespace flextron
