// The hidden neurons of elastic_mlp for up to 64 tokens: both weights read once, as far as the widest token
// needs them.
#include "kernels/device/launch.cuh"
#include "kernels/device/stream.cuh"
#include "kernels/elastic_linear_views.cuh"
#include "kernels/elastic_mlp.h"
#include "kernels/elastic_mlp_values.cuh"

namespace flextron {
namespace {

constexpr int kThreads = 32 * kStreamWarps;
constexpr int kNeurons = 16;  // of a block of threads

// A block owns 16 neurons for all tokens: rows of w_up, and beside them the same rows of w_gate.
template <class scalar_t, bool kGated, int kTokenTiles, bool kAligned>
__global__ __launch_bounds__(kThreads, kTokenTiles == 8 ? 1 : 2) void elastic_mlp_decode_kernel(
    const ElasticMlpHiddenParams<scalar_t> p) {
  constexpr int kWeights = kGated ? 2 : 1;
  auto& shared = dynamic_shared<StreamSums<kWeights, kTokenTiles>>();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t first = int64_t{blockIdx.x} * kNeurons;

  int64_t widest = 0;
  for (int64_t t = 0; t < p.T; ++t) widest = max(widest, extent_at(p.extent, p.per_token, t, p.width));
  if (first < widest) {
    Stream<scalar_t, kWeights, kTokenTiles> stream;
    stream.clear();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t j = first + 8 * half + lane / 4, row = j < widest ? j : first;
      const int inputs = j < widest ? static_cast<int>(p.K) : 0;
      stream.weight[half] = p.w_up + row * p.w_up_stride;
      stream.weight_inputs[half] = inputs;
      if constexpr (kGated) {
        stream.weight[2 + half] = p.w_gate + row * p.w_gate_stride;
        stream.weight_inputs[2 + half] = inputs;
      }
    }
#pragma unroll
    for (int tile = 0; tile < kTokenTiles; ++tile) {
      const int64_t t = 8 * tile + lane / 4;
      stream.token[tile] = p.x + (t < p.T ? t : 0) * p.x_stride;
      stream.token_inputs[tile] = t < p.T ? static_cast<int>(p.K) : 0;
    }
    stream.template add<kAligned>(warp, lane, static_cast<int>(p.K));
    shared.put(stream, warp, lane);
  }
  __syncthreads();

  for (int i = threadIdx.x; i < kNeurons * p.T; i += kThreads) {
    const int row = i % kNeurons;
    const int64_t t = i / kNeurons, j = first + row;
    if (j >= p.width) continue;
    float value = 0;
    if (j < extent_at(p.extent, p.per_token, t, p.width)) {
      value = shared.total(row, static_cast<int>(t));
      if (p.b_up) value += float(load_global(p.b_up + j));
      if constexpr (kGated) {
        float gate = shared.total(kNeurons + row, static_cast<int>(t));
        if (p.b_gate) gate += float(load_global(p.b_gate + j));
        value *= activate(p.activation, gate);
      } else {
        value = activate(p.activation, value);
      }
      value *= gate_scale(p, t, j);
    }
    store_global(p.h + t * p.width + j, scalar_t(value));
  }
}

template <class scalar_t, bool kGated, int kTokenTiles, bool kAligned = true>
void run(const ElasticMlpHiddenParams<scalar_t>& p, CUstream_st* stream) {
  launch<elastic_mlp_decode_kernel<scalar_t, kGated, kTokenTiles, kAligned>>(
      {.grid = dim3(static_cast<unsigned>((p.width + kNeurons - 1) / kNeurons)),
       .block = dim3(kThreads),
       .stream = stream,
       .dynamic_shared = sizeof(StreamSums < kGated ? 2 : 1, kTokenTiles >)},
      p);
}

template <class scalar_t, bool kGated>
void run(const ElasticMlpHiddenParams<scalar_t>& p, CUstream_st* stream) {
  if (!rows_aligned(p)) return run<scalar_t, kGated, 8, false>(p, stream);
  if (p.T <= 8) return run<scalar_t, kGated, 1>(p, stream);
  if (p.T <= 16) return run<scalar_t, kGated, 2>(p, stream);
  if (p.T <= 32) return run<scalar_t, kGated, 4>(p, stream);
  run<scalar_t, kGated, 8>(p, stream);
}

}  // namespace

template <class scalar_t>
void elastic_mlp_decode_cuda(const ElasticMlpHiddenParams<scalar_t>& p, CUstream_st* stream) {
  if (p.T == 0 || p.width == 0) return;
  p.w_gate ? run<scalar_t, true>(p, stream) : run<scalar_t, false>(p, stream);
}

template void elastic_mlp_decode_cuda(const ElasticMlpHiddenParams<bf16>&, CUstream_st*);
template void elastic_mlp_decode_cuda(const ElasticMlpHiddenParams<fp16>&, CUstream_st*);

}  // namespace flextron
