// elastic_linear's gradients on any GPU. A block owns one tile of a result and writes all of it; the extents
// clip what it reads. dx: a row tile's outputs end with its widest row's. dweight: a tile adds up the rows
// that reach its first row and column, which are the first ones.
#include "kernels/device/launch.cuh"
#include "kernels/device/plain_tile.cuh"
#include "kernels/device/tile.cuh"
#include "kernels/elastic_linear.h"
#include "kernels/elastic_linear_tiles.h"
#include "kernels/elastic_linear_views.cuh"
#include "kernels/tuning.h"

namespace flextron {
namespace {

template <class scalar_t>
__device__ __forceinline__ Extent inputs_of(const ElasticLinearBackwardParams<scalar_t>& p) {
  return {p.in_extent, p.per_token, p.in_features};
}
template <class scalar_t>
__device__ __forceinline__ Extent outputs_of(const ElasticLinearBackwardParams<scalar_t>& p) {
  return {p.out_extent, p.per_token, p.out_features};
}

__device__ __forceinline__ int left(int64_t size, int64_t from) { return static_cast<int>(size - from); }

// A tile of dx, rows by columns: dy's rows times the weight's columns, block of outputs after block, then the
// same with the second pair.
template <class T>
struct InputGradient {
  using scalar_t = T;
  struct Gradient : TokenRows<T> {
    const T *dy, *dy2;
    int blocks;
    __device__ __forceinline__ void enter(int part) {
      this->data = part < blocks ? dy + part * this->block : dy2 + (part - blocks) * this->block;
    }
  };
  struct Weight {
    using scalar_t = T;
    static constexpr bool kDeep = false;
    const T *weight, *weight2;  // the tile's first column
    int64_t stride_of_first, stride_of_second, block;
    int blocks, outputs, columns;
    const T* data;
    int64_t stride;

    __device__ __forceinline__ void enter(int part) {
      stride = part < blocks ? stride_of_first : stride_of_second;
      data = part < blocks ? weight + part * block * stride : weight2 + (part - blocks) * block * stride;
    }
    __device__ __forceinline__ const T* line(int l) const { return data + l * stride; }
    __device__ __forceinline__ int count(int l) const { return l < outputs ? columns : 0; }
  };
  struct Out : TileOut<T> {
    int64_t first_row;
    int first_column;
    Extent extent;
    __device__ __forceinline__ int kept(int m) const { return extent.at(first_row + m) - first_column; }
  };

  Gradient a;
  Weight b;
  Out out;
  int parts, depth;

  __device__ __forceinline__ InputGradient(const ElasticLinearBackwardParams<T>& p, int rows, int columns) {
    const Tile tile = tile_of(blockIdx.x, tiles_over(p.T, rows), p.in_blocks, tiles_over(p.kx, columns));
    const int64_t first_row = int64_t{tile.row} * rows, first = int64_t{tile.column} * columns;
    const Extent inputs = inputs_of(p), outputs = outputs_of(p);
    const int used =
        inputs.at(first_row) - static_cast<int>(first);  // of the tile's columns, by its widest row
    const int blocks = static_cast<int>(p.out_blocks);
    parts = used > 0 ? (p.dy2 ? 2 : 1) * blocks : 0;
    depth = outputs.at(first_row);
    a = {{nullptr, p.dy_stride, p.out_features, first_row, p.T, outputs}, p.dy, p.dy2, blocks};
    const int64_t column = tile.block * p.kw + first;
    b = {p.weight + column,
         p.weight2 + (p.weight2 ? column : 0),
         p.weight_stride,
         p.weight2_stride,
         p.nw,
         blocks,
         depth,
         used,
         nullptr,
         0};
    const int64_t stride = p.in_blocks * p.kx;
    out = {{p.dx + first_row * stride + tile.block * p.kx + first, stride, left(p.T, first_row),
            left(p.kx, first), whole_pieces(p.dx, p.kx)},
           first_row,
           static_cast<int>(first),
           inputs};
  }
};

// A tile of dweight: dy's columns times x's, over the rows.
template <class T>
struct WeightGradient {
  using scalar_t = T;
  struct Out : TileOut<T> {
    int used_rows, used_columns;
    __device__ __forceinline__ int kept(int m) const { return m < used_rows ? used_columns : 0; }
  };

  TokenColumns<T> a, b;
  Out out;
  static constexpr int parts = 1;
  int depth;

  __device__ __forceinline__ WeightGradient(const ElasticLinearBackwardParams<T>& p, int rows, int columns) {
    const int row_tiles = tiles_over(p.nw, rows);
    const Tile tile = tile_of(blockIdx.x, row_tiles * p.out_blocks, p.in_blocks, tiles_over(p.kw, columns));
    const int64_t block = tile.row / row_tiles, first_row = int64_t{tile.row % row_tiles} * rows;
    const int64_t first = int64_t{tile.column} * columns;
    const auto side = [&](const T* data, int64_t stride, const Extent& extent, int64_t from, int size) {
      const int64_t last = min(from + size, extent.features) - 1;
      return TokenColumns<T>{data + from,
                             stride,
                             static_cast<int>(from),
                             rows_that_reach(extent, p.T, from),
                             rows_that_reach(extent, p.T, last),
                             extent};
    };
    const Extent inputs = inputs_of(p), outputs = outputs_of(p);
    a = side(p.dy + block * p.out_features, p.dy_stride, outputs, first_row, rows);
    b = side(p.x + tile.block * p.kx, p.x_stride, inputs, first, columns);
    depth = min(a.rows, b.rows);
    const int64_t stride = p.in_blocks * p.kw;
    out = {{p.dweight + (block * p.nw + first_row) * stride + tile.block * p.kw + first, stride,
            left(p.nw, first_row), left(p.kw, first), whole_pieces(p.dweight, p.kw)},
           depth > 0 ? left(outputs.at(0), first_row) : 0,
           depth > 0 ? left(inputs.at(0), first) : 0};
  }
};

struct NoBias {
  __device__ __forceinline__ float operator()(int) const { return 0; }
};

template <class Problem, class scalar_t, int kRows, bool kAligned>
__device__ __forceinline__ void compute(const ElasticLinearBackwardParams<scalar_t>& p) {
  auto& shared = dynamic_shared<tiles::Shared<kRows>>();
  const Problem tile(p, kRows, tiles::kColumns);
  tiles::compute<kAligned>(shared, tile.a, tile.b, tile.parts, tile.depth, NoBias{}, tile.out);
}

template <class Problem, class scalar_t>
__device__ __forceinline__ void compute_plain(const ElasticLinearBackwardParams<scalar_t>& p) {
  auto& shared = static_shared<plain_tiles::Shared<scalar_t>>();
  const Problem tile(p, plain_tiles::kSide, plain_tiles::kSide);
  plain_tiles::compute(shared, tile.a, tile.b, tile.parts, tile.depth, NoBias{}, tile.out);
}

// kAligned: every row of every block starts at a multiple of 16 bytes in both operands.
template <class scalar_t, int kRows, bool kAligned>
__global__ __launch_bounds__(tiles::kThreads, 2) void elastic_linear_backward_input_kernel(
    const ElasticLinearBackwardParams<scalar_t> p) {
  compute<InputGradient<scalar_t>, scalar_t, kRows, kAligned>(p);
}
template <class scalar_t, int kRows, bool kAligned>
__global__ __launch_bounds__(tiles::kThreads, 2) void elastic_linear_backward_weight_kernel(
    const ElasticLinearBackwardParams<scalar_t> p) {
  compute<WeightGradient<scalar_t>, scalar_t, kRows, kAligned>(p);
}
template <class scalar_t>
__global__ __launch_bounds__(plain_tiles::kThreads, 2) void elastic_linear_backward_input_plain_kernel(
    const ElasticLinearBackwardParams<scalar_t> p) {
  compute_plain<InputGradient<scalar_t>>(p);
}
template <class scalar_t>
__global__ __launch_bounds__(plain_tiles::kThreads, 2) void elastic_linear_backward_weight_plain_kernel(
    const ElasticLinearBackwardParams<scalar_t> p) {
  compute_plain<WeightGradient<scalar_t>>(p);
}

// A block adds up 32 outputs, 32 neighbours a warp; warp w takes rows w, w + 8, ..., 16 of them summed apart.
constexpr int kBiasThreads = 256, kBiasColumns = 32, kBiasWarps = kBiasThreads / kBiasColumns;

template <class scalar_t>
__global__ __launch_bounds__(kBiasThreads) void elastic_linear_backward_bias_kernel(
    const ElasticLinearBackwardParams<scalar_t> p) {
  using real = accumulate_t<scalar_t>;
  struct Shared {
    real sum[kBiasWarps][kBiasColumns];
  };
  auto& shared = static_shared<Shared>();
  const int lane = threadIdx.x % kBiasColumns, warp = threadIdx.x / kBiasColumns;
  const int columns = tiles_over(p.nw, kBiasColumns);
  const int64_t block = blockIdx.x / columns, first = int64_t{blockIdx.x % columns} * kBiasColumns;
  const int64_t n = first + lane;
  const Extent outputs = outputs_of(p);
  const int rows = rows_that_reach(outputs, p.T, first);
  const scalar_t* const dy = p.dy + block * p.out_features + n;

  constexpr int kApart = 16;
  real sum = 0;
  for (int t = warp; t < rows;) {
    real part = 0;
    for (int i = 0; i < kApart && t < rows; ++i, t += kBiasWarps)
      if (n < outputs.at(t)) part += static_cast<real>(load_global(dy + t * p.dy_stride));
    sum += part;
  }
  store_shared(&shared.sum[warp][lane], sum);
  __syncthreads();
  if (warp > 0 || n >= p.nw) return;
  real total = 0;
#pragma unroll
  for (int w = 0; w < kBiasWarps; ++w) total += load_shared(&shared.sum[w][lane]);
  store_global(p.dbias + block * p.nw + n, static_cast<scalar_t>(total));
}

// Launches one of the two tile kernels over rows x blocks x columns of the result.
template <auto narrow, auto wide, auto unaligned>
void run(int64_t rows, int64_t row_blocks, int64_t blocks, int64_t columns, bool aligned, const auto& p,
         CUstream_st* stream) {
  const bool is_wide = aligned && elastic_linear_tile_rows(rows * row_blocks) == 128;
  const int64_t tiles_down = tiles_over(rows, is_wide ? 128 : 64) * row_blocks;
  const dim3 grid(static_cast<unsigned>(tiles_down * blocks * tiles_over(columns, tiles::kColumns)));
  const LaunchConfig config{
      .grid = grid,
      .block = dim3(tiles::kThreads),
      .stream = stream,
      .dynamic_shared = is_wide ? sizeof(tiles::Shared<128>) : sizeof(tiles::Shared<64>)};
  if (is_wide) return launch<wide>(config, p);
  aligned ? launch<narrow>(config, p) : launch<unaligned>(config, p);
}

template <auto kernel>
void run_plain(int64_t rows, int64_t row_blocks, int64_t blocks, int64_t columns, const auto& p,
               CUstream_st* stream) {
  constexpr int kSide = plain_tiles::kSide;
  const int64_t grid = tiles_over(rows, kSide) * row_blocks * blocks * tiles_over(columns, kSide);
  launch<kernel>(
      {.grid = dim3(static_cast<unsigned>(grid)), .block = dim3(plain_tiles::kThreads), .stream = stream}, p);
}

}  // namespace

template <class scalar_t>
void elastic_linear_backward_input_cuda(const ElasticLinearBackwardParams<scalar_t>& p, CUstream_st* stream) {
  if (p.T == 0 || p.kx == 0) return;
  if constexpr (sizeof(scalar_t) == 2) {
    const auto fits = [&](const scalar_t* dy, const scalar_t* weight, int64_t stride) {
      return blocks_aligned(dy, p.dy_stride, p.out_blocks, p.out_features) &&
             blocks_aligned(weight, stride, p.in_blocks, p.kw);
    };
    const bool aligned =
        fits(p.dy, p.weight, p.weight_stride) && (!p.dy2 || fits(p.dy2, p.weight2, p.weight2_stride));
    run<elastic_linear_backward_input_kernel<scalar_t, 64, true>,
        elastic_linear_backward_input_kernel<scalar_t, 128, true>,
        elastic_linear_backward_input_kernel<scalar_t, 64, false>>(p.T, 1, p.in_blocks, p.kx, aligned, p,
                                                                   stream);
  } else {
    run_plain<elastic_linear_backward_input_plain_kernel<scalar_t>>(p.T, 1, p.in_blocks, p.kx, p, stream);
  }
}

template <class scalar_t>
void elastic_linear_backward_weight_cuda(const ElasticLinearBackwardParams<scalar_t>& p,
                                         CUstream_st* stream) {
  if (p.nw == 0 || p.kw == 0) return;
  if constexpr (sizeof(scalar_t) == 2) {
    const bool aligned = blocks_aligned(p.dy, p.dy_stride, p.out_blocks, p.out_features) &&
                         blocks_aligned(p.x, p.x_stride, p.in_blocks, p.kx);
    run<elastic_linear_backward_weight_kernel<scalar_t, 64, true>,
        elastic_linear_backward_weight_kernel<scalar_t, 128, true>,
        elastic_linear_backward_weight_kernel<scalar_t, 64, false>>(p.nw, p.out_blocks, p.in_blocks, p.kw,
                                                                    aligned, p, stream);
  } else {
    run_plain<elastic_linear_backward_weight_plain_kernel<scalar_t>>(p.nw, p.out_blocks, p.in_blocks, p.kw, p,
                                                                     stream);
  }
}

template <class scalar_t>
void elastic_linear_backward_bias_cuda(const ElasticLinearBackwardParams<scalar_t>& p, CUstream_st* stream) {
  if (p.nw == 0) return;
  launch<elastic_linear_backward_bias_kernel<scalar_t>>(
      {.grid = dim3(static_cast<unsigned>(p.out_blocks * tiles_over(p.nw, kBiasColumns))),
       .block = dim3(kBiasThreads),
       .stream = stream},
      p);
}

#define FLEXTRON_ELASTIC_LINEAR_BACKWARD(scalar_t)                                                \
  template void elastic_linear_backward_input_cuda(const ElasticLinearBackwardParams<scalar_t>&,  \
                                                   CUstream_st*);                                 \
  template void elastic_linear_backward_weight_cuda(const ElasticLinearBackwardParams<scalar_t>&, \
                                                    CUstream_st*);                                \
  template void elastic_linear_backward_bias_cuda(const ElasticLinearBackwardParams<scalar_t>&, CUstream_st*);
FLEXTRON_ELASTIC_LINEAR_BACKWARD(float)
FLEXTRON_ELASTIC_LINEAR_BACKWARD(double)
FLEXTRON_ELASTIC_LINEAR_BACKWARD(bf16)
FLEXTRON_ELASTIC_LINEAR_BACKWARD(fp16)

}  // namespace flextron
