// The hidden neurons of elastic_mlp for up to 64 tokens on Hopper, bf16 and fp16 (device/decode_sm90.cuh):
// both weights are read once, as far as the widest token needs them. A thread has the sums of both for a
// neuron and a token, and their product needs no one else.
#pragma once

#include "kernels/device/decode_sm90.cuh"
#include "kernels/elastic_mlp.h"
#include "kernels/elastic_mlp_values.cuh"

namespace flextron {
namespace {

// The weights are w_up, and beside it w_gate.
template <class S>
struct Operands : ElasticMlpHiddenParams<typename S::scalar_t> {
  decode::Maps<S> maps;
};

template <class scalar_t, int tokens, bool gated>
__global__ void __launch_bounds__(decode::kThreads, 1) elastic_mlp_decode_kernel(
    const __grid_constant__ Operands<decode::Shape<scalar_t, tokens, gated ? 2 : 1>> p) {
  const auto neurons = [&p](int64_t t) {
    return static_cast<int>(extent_at(p.extent, p.per_token, t, p.width));
  };
  const int inputs = static_cast<int>(p.K);
  const decode::Need need{.rows = decode::range_of(static_cast<int>(p.T), neurons).most,
                          .row_blocks = 1,
                          .row_stride = 0,
                          .inputs = inputs,
                          .input_blocks = 1,
                          .clean = INT32_MAX,
                          .to_edge = true};

  const auto bias = [&p](decode::Place place, int w) {
    const scalar_t* const biases = w == 0 ? p.b_up : p.b_gate;
    return biases ? static_cast<float>(load_global(biases + place.row)) : 0.0f;
  };
  const auto finish = [&](const auto& places, int token, const auto& sums, const auto& biases) {
    constexpr int kActivated = gated ? 1 : 0;
    Registers<float, 4> values;
#pragma unroll
    for (int v = 0; v < 4; ++v) values[v] = sums[kActivated][v] + biases[kActivated][v / 2];
    activate_all<scalar_t>(p.activation, values);
#pragma unroll
    for (int v = 0; v < 4; ++v) {
      const int j = places[v / 2].row;
      const int64_t t = token + v % 2;
      if (j < 0 || j >= p.width || t >= p.T) continue;
      float value = 0;
      if (j < neurons(t)) {
        value = values[v];
        if constexpr (gated) value *= sums[0][v] + biases[0][v / 2];
        value *= gate_scale(p, t, j);
      }
      store_global(p.h + t * p.width + j, scalar_t(value));
    }
  };
  decode::run_block(
      p.maps, need, static_cast<int>(p.T), static_cast<int>(p.width), p.h, [&](int) { return inputs; }, bias,
      finish);
}

template <class S, bool gated>
void run(const ElasticMlpHiddenParams<typename S::scalar_t>& p, CUstream_st* stream) {
  Operands<S> operands{p, {}};
  operands.maps.x = pipeline::operand_map(p.x, p.K, 1, p.T, 0, p.x_stride, S::kTokens);
  decode::set_weight_maps(operands.maps.weight[0], p.w_up, p.K, 1, p.width, 0, p.w_up_stride);
  if constexpr (gated)
    decode::set_weight_maps(operands.maps.weight[1], p.w_gate, p.K, 1, p.width, 0, p.w_gate_stride);
  decode::launch_clusters<S, elastic_mlp_decode_kernel<typename S::scalar_t, S::kTokens, gated>>(
      tiles_over(p.width, decode::kAtom), operands, stream, false);
}

}  // namespace

template <class scalar_t, int tokens>
void elastic_mlp_decode_sm90(const ElasticMlpHiddenParams<scalar_t>& p, CUstream_st* stream) {
  p.w_gate ? run<decode::Shape<scalar_t, tokens, 2>, true>(p, stream)
           : run<decode::Shape<scalar_t, tokens, 1>, false>(p, stream);
}

#define FLEXTRON_ELASTIC_MLP_DECODE_SM90(scalar_t, tokens)                                         \
  template void elastic_mlp_decode_sm90<scalar_t, tokens>(const ElasticMlpHiddenParams<scalar_t>&, \
                                                          CUstream_st*);

}  // namespace flextron
