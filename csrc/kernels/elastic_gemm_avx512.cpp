// elastic_gemm with AVX-512 (F, BW, VL, DQ): the loops of elastic_gemm_block.h, chosen at run time.
#include "kernels/elastic_gemm_block.h"

namespace flextron {

FLEXTRON_DEFINE_ELASTIC_GEMM(avx512)

}  // namespace flextron
