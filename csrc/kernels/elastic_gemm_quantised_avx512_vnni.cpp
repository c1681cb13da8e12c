// elastic_gemm over activations of eight bits, with dot products of bytes (AVX512-VNNI): the loops of
// elastic_gemm_quantised.h, chosen at run time.
#define FLEXTRON_VNNI  // also where the instruction is emulated
#include "kernels/elastic_gemm_quantised.h"

namespace flextron {

FLEXTRON_DEFINE_ELASTIC_GEMM_QUANTISED(avx512_vnni)

}  // namespace flextron
