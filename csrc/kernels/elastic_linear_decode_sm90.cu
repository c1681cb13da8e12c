// elastic_linear for up to 64 tokens on Hopper, bf16 and fp16 (device/decode_sm90.cuh): the weight is read
// once, as far as the widest token needs it. Mixed extents are masks on the tokens; nothing is sorted.
#include "kernels/device/decode_sm90.cuh"
#include "kernels/elastic_linear.h"

namespace flextron {
namespace {

template <class S>
struct Operands : ElasticLinearParams<typename S::scalar_t> {
  decode::Maps<S> maps;
  bool x_is_clean;  // zeros behind every token's extent
};

template <class S>
__device__ __forceinline__ decode::Need need_of(const Operands<S>& p) {
  const int T = static_cast<int>(p.T), in_features = static_cast<int>(p.in_features);
  const decode::Range in = decode::range_of(T, [&](int t) { return static_cast<int>(in_extent_at(p, t)); });
  const decode::Range out = decode::range_of(T, [&](int t) { return static_cast<int>(out_extent_at(p, t)); });
  // Where no token ends before x does, its tensor map gives the zeros behind.
  const bool is_clean = p.x_is_clean || in.least == in_features;
  return {.rows = out.most,
          .row_blocks = static_cast<int>(p.out_blocks),
          .row_stride = static_cast<int>(p.nw),
          .inputs = in.most,
          .input_blocks = static_cast<int>(p.in_blocks),
          .clean = is_clean ? INT32_MAX : in.least,
          .to_edge = in.most == in_features};
}

template <class scalar_t, int tokens>
__global__ void __launch_bounds__(decode::kThreads, 1)
    elastic_linear_decode_kernel(const __grid_constant__ Operands<decode::Shape<scalar_t, tokens, 1>> p) {
  const auto inputs = [&p](int t) {
    return t < p.T ? static_cast<int>(in_extent_at(p, t)) : static_cast<int>(p.in_features);
  };
  const auto bias = [&p](decode::Place place, int) {
    return p.bias ? static_cast<float>(load_global(p.bias + place.block * p.nw + place.row)) : 0.0f;
  };
  const auto finish = [&p](const auto& places, int token, const auto& sums, const auto& biases) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t block = places[half].block;
      const int n = places[half].row;
      if (n < 0 || n >= p.out_features) continue;
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const int64_t t = token + k;
        if (t >= p.T) continue;
        const float value = n < out_extent_at(p, t) ? sums[0][2 * half + k] + biases[0][half] : 0.0f;
        store_global(p.y + (t * p.out_blocks + block) * p.out_features + n, scalar_t(value));
      }
    }
  };
  decode::run_block(p.maps, need_of(p), static_cast<int>(p.T), static_cast<int>(p.out_features), p.y, inputs,
                    bias, finish);
}

}  // namespace

template <class scalar_t>
bool elastic_linear_decode_fits_sm90(const ElasticLinearParams<scalar_t>& p) {
  using namespace pipeline;
  return size_fits(p.T) && size_fits(p.in_features) && size_fits(p.out_features) && size_fits(p.in_blocks) &&
         size_fits(p.out_blocks * p.nw) && address_fits(p.x) && address_fits(p.weight) &&
         stride_fits<scalar_t>(p.x_stride) && stride_fits<scalar_t>(p.weight_stride) &&
         (p.in_blocks == 1 || (stride_fits<scalar_t>(p.kx) && stride_fits<scalar_t>(p.kw)));
}

template <class scalar_t>
void elastic_linear_decode_sm90(const ElasticLinearParams<scalar_t>& p, CUstream_st* stream, bool x_is_clean,
                                bool dependent) {
  decode::with_shape<scalar_t, 1>(p.T, [&]<class S>(S) {
    Operands<S> operands{p, {}, x_is_clean};
    operands.maps.x =
        pipeline::operand_map(p.x, p.in_features, p.in_blocks, p.T, p.kx, p.x_stride, S::kTokens);
    decode::set_weight_maps(operands.maps.weight[0], p.weight, p.in_features, p.in_blocks,
                            (p.out_blocks - 1) * p.nw + p.out_features, p.kw, p.weight_stride);
    decode::launch_clusters<S, elastic_linear_decode_kernel<scalar_t, S::kTokens>>(
        p.out_blocks * tiles_over(p.out_features, decode::kAtom), operands, stream, dependent);
  });
}

#define FLEXTRON_ELASTIC_LINEAR_DECODE_SM90(scalar_t)                                  \
  template bool elastic_linear_decode_fits_sm90(const ElasticLinearParams<scalar_t>&); \
  template void elastic_linear_decode_sm90(const ElasticLinearParams<scalar_t>&, CUstream_st*, bool, bool);
FLEXTRON_ELASTIC_LINEAR_DECODE_SM90(bf16)
FLEXTRON_ELASTIC_LINEAR_DECODE_SM90(fp16)

}  // namespace flextron
