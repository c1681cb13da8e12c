// elastic_linear for up to 64 tokens: bound by reading the weights, which happens once, widest extent and no
// further. Mixed extents are masks on the tokens; nothing is sorted.
#include "kernels/device/launch.cuh"
#include "kernels/device/stream.cuh"
#include "kernels/elastic_linear.h"
#include "kernels/elastic_linear_views.cuh"

namespace flextron {
namespace {

constexpr int kThreads = 32 * kStreamWarps;
constexpr int kRows = 16;  // outputs of a block of threads: small, so that all multiprocessors have some

// A block owns 16 outputs for all tokens; its warps share the inputs.
template <class scalar_t, int kTokenTiles, bool kAligned>
__global__ __launch_bounds__(kThreads, kTokenTiles == 8 ? 1 : 2) void elastic_linear_decode_kernel(
    const ElasticLinearParams<scalar_t> p) {
  auto& shared = static_shared<StreamSums<1, kTokenTiles>>();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int blocks_of_rows = static_cast<int>((p.out_features + kRows - 1) / kRows);
  const int block = blockIdx.x / blocks_of_rows, first = blockIdx.x % blocks_of_rows * kRows;

  int64_t widest_in = 0, widest_out = 0;
  for (int64_t t = 0; t < p.T; ++t) {
    widest_in = max(widest_in, in_extent_at(p, t));
    widest_out = max(widest_out, out_extent_at(p, t));
  }

  Stream<scalar_t, 1, kTokenTiles> stream;
  stream.clear();
  if (first < widest_out) {
    for (int64_t in_block = 0; in_block < p.in_blocks; ++in_block) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t n = first + 8 * half + lane / 4, row = n < widest_out ? n : first;
        stream.weight[half] = p.weight + (block * p.nw + row) * p.weight_stride + in_block * p.kw;
        stream.weight_inputs[half] = n < widest_out ? static_cast<int>(widest_in) : 0;
      }
#pragma unroll
      for (int tile = 0; tile < kTokenTiles; ++tile) {
        const int64_t t = 8 * tile + lane / 4, row = t < p.T ? t : 0;
        stream.token[tile] = p.x + row * p.x_stride + in_block * p.kx;
        stream.token_inputs[tile] = t < p.T ? static_cast<int>(in_extent_at(p, t)) : 0;
      }
      stream.template add<kAligned>(warp, lane, static_cast<int>(widest_in));
    }
    shared.put(stream, warp, lane);
  }
  __syncthreads();

  for (int i = threadIdx.x; i < kRows * p.T; i += kThreads) {
    const int row = i % kRows;
    const int64_t t = i / kRows, n = first + row;
    if (n >= p.out_features) continue;
    float value = 0;
    if (n < out_extent_at(p, t)) {
      value = shared.total(row, static_cast<int>(t));
      if (p.bias) value += float(load_global(p.bias + block * p.nw + n));
    }
    store_global(p.y + (t * p.out_blocks + block) * p.out_features + n, scalar_t(value));
  }
}

template <class scalar_t, int kTokenTiles, bool kAligned = true>
void run(const ElasticLinearParams<scalar_t>& p, CUstream_st* stream) {
  const int64_t blocks = (p.out_features + kRows - 1) / kRows * p.out_blocks;
  launch<elastic_linear_decode_kernel<scalar_t, kTokenTiles, kAligned>>(
      {.grid = dim3(static_cast<unsigned>(blocks)), .block = dim3(kThreads), .stream = stream}, p);
}

}  // namespace

template <class scalar_t>
void elastic_linear_decode_cuda(const ElasticLinearParams<scalar_t>& p, CUstream_st* stream) {
  if (p.T == 0 || p.out_features == 0) return;
  if (!blocks_aligned(p.x, p.x_stride, p.in_blocks, p.kx) ||
      !blocks_aligned(p.weight, p.weight_stride, p.in_blocks, p.kw))
    return run<scalar_t, 8, false>(p, stream);
  if (p.T <= 8) return run<scalar_t, 1>(p, stream);
  if (p.T <= 16) return run<scalar_t, 2>(p, stream);
  if (p.T <= 32) return run<scalar_t, 4>(p, stream);
  run<scalar_t, 8>(p, stream);
}

template void elastic_linear_decode_cuda(const ElasticLinearParams<bf16>&, CUstream_st*);
template void elastic_linear_decode_cuda(const ElasticLinearParams<fp16>&, CUstream_st*);

}  // namespace flextron
