// elastic_mlp's neurons for up to 32 tokens on Hopper, fp16.
#include "kernels/elastic_mlp_decode_sm90.cuh"

namespace flextron {

FLEXTRON_ELASTIC_MLP_DECODE_SM90(fp16, 8)
FLEXTRON_ELASTIC_MLP_DECODE_SM90(fp16, 16)
FLEXTRON_ELASTIC_MLP_DECODE_SM90(fp16, 32)

}  // namespace flextron
