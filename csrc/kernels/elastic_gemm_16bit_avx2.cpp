// elastic_gemm of 16-bit weights with AVX2 and FMA: the loops of elastic_gemm_block.h, chosen at run time.
#include "kernels/elastic_gemm_block.h"

namespace flextron {

FLEXTRON_DEFINE_ELASTIC_GEMM_16BIT(avx2)

}  // namespace flextron
