// elastic_mlp's neurons for up to 32 tokens on Hopper, bf16.
#include "kernels/elastic_mlp_decode_sm90.cuh"

namespace flextron {

FLEXTRON_ELASTIC_MLP_DECODE_SM90(bf16, 8)
FLEXTRON_ELASTIC_MLP_DECODE_SM90(bf16, 16)
FLEXTRON_ELASTIC_MLP_DECODE_SM90(bf16, 32)

}  // namespace flextron
