// elastic_gemm of 16-bit weights with AVX-512 (F, BW, VL, DQ): the loops of elastic_gemm_block.h, chosen at
// run time.
#include "kernels/elastic_gemm_block.h"

namespace flextron {

FLEXTRON_DEFINE_ELASTIC_GEMM_16BIT(avx512)

}  // namespace flextron
