// elastic_mlp's neurons for up to 64 tokens on Hopper: whether the operands fit, and the kernel of the least
// tile of tokens that holds them. The kernels are compiled by type and tile (elastic_mlp_decode_sm90.cuh).
#include "kernels/device/decode_sm90.cuh"
#include "kernels/elastic_mlp.h"

namespace flextron {

template <class scalar_t, int tokens>
void elastic_mlp_decode_sm90(const ElasticMlpHiddenParams<scalar_t>& p, CUstream_st* stream);

template <class scalar_t>
bool elastic_mlp_decode_fits_sm90(const ElasticMlpHiddenParams<scalar_t>& p) {
  using namespace pipeline;
  return size_fits(p.T) && size_fits(p.K) && size_fits(p.width) && address_fits(p.x) &&
         address_fits(p.w_up) && stride_fits<scalar_t>(p.x_stride) && stride_fits<scalar_t>(p.w_up_stride) &&
         (!p.w_gate || (address_fits(p.w_gate) && stride_fits<scalar_t>(p.w_gate_stride)));
}

template <class scalar_t>
void elastic_mlp_decode_sm90(const ElasticMlpHiddenParams<scalar_t>& p, CUstream_st* stream) {
  decode::with_shape<scalar_t, 1>(
      p.T, [&]<class S>(S) { elastic_mlp_decode_sm90<scalar_t, S::kTokens>(p, stream); });
}

#define FLEXTRON_ELASTIC_MLP_DECODE_SM90(scalar_t)                                     \
  template bool elastic_mlp_decode_fits_sm90(const ElasticMlpHiddenParams<scalar_t>&); \
  template void elastic_mlp_decode_sm90(const ElasticMlpHiddenParams<scalar_t>&, CUstream_st*);
FLEXTRON_ELASTIC_MLP_DECODE_SM90(bf16)
FLEXTRON_ELASTIC_MLP_DECODE_SM90(fp16)

}  // namespace flextron
