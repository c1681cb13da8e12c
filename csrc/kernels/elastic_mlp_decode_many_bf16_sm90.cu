// elastic_mlp's neurons for 33 to 64 tokens on Hopper, bf16.
#include "kernels/elastic_mlp_decode_sm90.cuh"

namespace flextron {

FLEXTRON_ELASTIC_MLP_DECODE_SM90(bf16, 64)

}  // namespace flextron
