// elastic_linear on any GPU. A block owns one tile of y and reads the extents itself: a tile beyond its
// widest row's outputs is zeros and reads nothing, a row tile's inputs end with its widest row's.
#include "kernels/device/launch.cuh"
#include "kernels/device/plain_tile.cuh"
#include "kernels/device/tile.cuh"
#include "kernels/elastic_linear.h"
#include "kernels/elastic_linear_tiles.h"
#include "kernels/elastic_linear_views.cuh"
#include "kernels/tuning.h"

namespace flextron {
namespace {

// A tile of y, sides rows by columns: x's rows times the weight's, block of inputs after block.
template <class T>
struct Forward {
  using scalar_t = T;
  struct X : TokenRows<T> {
    const T* x;
    __device__ __forceinline__ void enter(int block) { this->data = x + block * this->block; }
  };
  struct Weight {
    using scalar_t = T;
    static constexpr bool kDeep = true;
    const T* weight;  // the tile's first row
    int64_t stride, block;
    int rows, inputs;
    const T* data;

    __device__ __forceinline__ void enter(int index) { data = weight + index * block; }
    __device__ __forceinline__ const T* line(int l) const { return data + l * stride; }
    __device__ __forceinline__ int count(int l) const { return l < rows ? inputs : 0; }
  };
  struct Out : TileOut<T> {
    int64_t first_row;
    int first_column;
    Extent extent;
    __device__ __forceinline__ int kept(int m) const { return extent.at(first_row + m) - first_column; }
  };

  X x;
  Weight weight;
  Out out;
  const T* bias;
  int parts, depth;

  __device__ __forceinline__ Forward(const ElasticLinearParams<T>& p, int rows, int columns) {
    const Tile tile =
        tile_of(blockIdx.x, tiles_over(p.T, rows), p.out_blocks, tiles_over(p.out_features, columns));
    const int64_t first_row = int64_t{tile.row} * rows, first = int64_t{tile.column} * columns;
    const Extent inputs{p.in_extent, p.per_token, p.in_features},
        outputs{p.out_extent, p.per_token, p.out_features};
    const int used =
        outputs.at(first_row) - static_cast<int>(first);  // of the tile's columns, by its widest row
    parts = used > 0 ? static_cast<int>(p.in_blocks) : 0;
    depth = inputs.at(first_row);
    x = {{nullptr, p.x_stride, p.kx, first_row, p.T, inputs}, p.x};
    const int64_t weight_row = tile.block * p.nw + first;
    weight = {p.weight + weight_row * p.weight_stride, p.weight_stride, p.kw, used, depth, nullptr};
    bias = p.bias ? p.bias + weight_row : nullptr;
    const int64_t stride = p.out_blocks * p.out_features;
    const auto left = [](int64_t size, int64_t from) { return static_cast<int>(size - from); };
    out = {{p.y + first_row * stride + tile.block * p.out_features + first, stride, left(p.T, first_row),
            left(p.out_features, first), whole_pieces(p.y, p.out_features)},
           first_row,
           static_cast<int>(first),
           outputs};
  }

  __device__ __forceinline__ accumulate_t<T> bias_at(int n) const {
    return bias && n < weight.rows ? accumulate_t<T>(load_global(bias + n)) : 0;
  }
};

// kAligned: every row of every block starts at a multiple of 16 bytes in x and in weight.
template <class scalar_t, int kRows, bool kAligned>
__global__ __launch_bounds__(tiles::kThreads,
                             2) void elastic_linear_kernel(const ElasticLinearParams<scalar_t> p) {
  auto& shared = dynamic_shared<tiles::Shared<kRows>>();
  const Forward<scalar_t> tile(p, kRows, tiles::kColumns);
  tiles::compute<kAligned>(
      shared, tile.x, tile.weight, tile.parts, tile.depth, [&](int n) { return tile.bias_at(n); }, tile.out);
}

template <class scalar_t>
__global__ __launch_bounds__(plain_tiles::kThreads,
                             2) void elastic_linear_plain_kernel(const ElasticLinearParams<scalar_t> p) {
  const Forward<scalar_t> tile(p, plain_tiles::kSide, plain_tiles::kSide);
  plain_tiles::compute(
      static_shared<plain_tiles::Shared<scalar_t>>(), tile.x, tile.weight, tile.parts, tile.depth,
      [&](int n) { return tile.bias_at(n); }, tile.out);
}

template <class scalar_t>
dim3 grid_of(const ElasticLinearParams<scalar_t>& p, int rows, int columns) {
  return dim3(
      static_cast<unsigned>(tiles_over(p.T, rows) * p.out_blocks * tiles_over(p.out_features, columns)));
}

template <class scalar_t, int kRows, bool kAligned>
void run(const ElasticLinearParams<scalar_t>& p, CUstream_st* stream) {
  launch<elastic_linear_kernel<scalar_t, kRows, kAligned>>({.grid = grid_of(p, kRows, tiles::kColumns),
                                                            .block = dim3(tiles::kThreads),
                                                            .stream = stream,
                                                            .dynamic_shared = sizeof(tiles::Shared<kRows>)},
                                                           p);
}

}  // namespace

template <class scalar_t>
void elastic_linear_cuda(const ElasticLinearParams<scalar_t>& p, CUstream_st* stream) {
  if (p.T == 0 || p.out_features == 0) return;
  if constexpr (sizeof(scalar_t) == 2) {
    if (!blocks_aligned(p.x, p.x_stride, p.in_blocks, p.kx) ||
        !blocks_aligned(p.weight, p.weight_stride, p.in_blocks, p.kw))
      return run<scalar_t, 64, false>(p, stream);
    elastic_linear_tile_rows(p.T) == 64 ? run<scalar_t, 64, true>(p, stream)
                                        : run<scalar_t, 128, true>(p, stream);
  } else {
    launch<elastic_linear_plain_kernel<scalar_t>>({.grid = grid_of(p, plain_tiles::kSide, plain_tiles::kSide),
                                                   .block = dim3(plain_tiles::kThreads),
                                                   .stream = stream},
                                                  p);
  }
}

template void elastic_linear_cuda(const ElasticLinearParams<float>&, CUstream_st*);
template void elastic_linear_cuda(const ElasticLinearParams<double>&, CUstream_st*);
template void elastic_linear_cuda(const ElasticLinearParams<bf16>&, CUstream_st*);
template void elastic_linear_cuda(const ElasticLinearParams<fp16>&, CUstream_st*);

}  // namespace flextron
