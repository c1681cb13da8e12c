// elastic_linear's gradients on Hopper, bf16 and fp16, by wgmma, with loads and stores by TMA
// (device/pipeline_sm90.cuh). Nothing is transposed: the tensor cores take operands whose lines run along
// their side.
//
//   dx = dy W          depth: a row tile's outputs, block after block, which end with its widest row's
//   dweight = dy^T x   depth: the rows that reach the tile's first row and column, which are the first ones
//
// If an extent or a block of the weight ends inside a stage, the consumers write zeros into the rest of it,
// in both operands: 0 x NaN is NaN.
#include "kernels/device/pipeline_sm90.cuh"
#include "kernels/elastic_linear.h"
#include "kernels/elastic_linear_tiles.h"
#include "kernels/tuning.h"

namespace flextron {
namespace {

using pipeline::kDepth;

template <class scalar_t>
struct Operands : ElasticLinearBackwardParams<scalar_t> {
  TensorMap dy_map, dy2_map, x_map, weight_map, weight2_map, result_map;
};

template <class scalar_t>
__device__ __forceinline__ int inputs(const Operands<scalar_t>& p, int row) {
  return static_cast<int>(extent_at(p.in_extent, p.per_token, row, p.in_features));
}
template <class scalar_t>
__device__ __forceinline__ int outputs(const Operands<scalar_t>& p, int row) {
  return static_cast<int>(extent_at(p.out_extent, p.per_token, row, p.out_features));
}

// ---- dx ----

template <class scalar_t, int rows, int columns>
struct InputShape : pipeline::Shape<scalar_t, rows, columns, 1, Major::kK, Major::kMN> {};

// The producer's way: the outputs of each block, kDepth at a time, of the second pair after the first's.
template <class S, class Tiles>
struct InputLoads {
  using scalar_t = typename S::scalar_t;
  const Operands<scalar_t>& p;
  Tiles tiles;
  Tile tile{};
  int widest = 0, part = 0, i = 0;

  __device__ __forceinline__ bool next() {
    i += kDepth;
    if (i < widest) return true;
    i = 0;
    if (widest > 0 && ++part < p.out_blocks * (p.dy2 ? 2 : 1)) return true;
    part = 0;
    do {
      if (!tiles.next(tile) || !tile.needed) return false;
      widest = outputs(p, tile.row * S::kRows);
    } while (widest == 0);
    return true;
  }
  __device__ __forceinline__ bool second() const { return part >= p.out_blocks; }
  __device__ __forceinline__ int block() const {
    return part - (second() ? static_cast<int>(p.out_blocks) : 0);
  }
  __device__ __forceinline__ void load_a(void* to, Mbarrier& full) const {
    tma_load_3d(to, second() ? p.dy2_map : p.dy_map, full, i, block(), tile.row * S::kRows);
  }
  __device__ __forceinline__ void load_b(scalar_t (&to)[S::kColumns][kDepth], Mbarrier& full) const {
    pipeline::load_side(to, second() ? p.weight2_map : p.weight_map, full, tile.column * S::kColumns,
                        tile.block, block() * static_cast<int>(p.nw) + i);
  }
};

template <class S>
__device__ __forceinline__ auto input_tiles(const Operands<typename S::scalar_t>& p) {
  const auto needed = [&p](int row) { return tiles_over(inputs(p, row * S::kRows), S::kColumns); };
  return TileSequence(tiles_over(p.T, S::kRows), p.in_blocks, tiles_over(p.kx, S::kColumns), needed,
                      blockIdx.x, gridDim.x);
}

// The consumer's part of a tile: of row r of the tile the first `kept(r)` columns count, zeros
// behind them.
template <class S, class Kept>
__device__ __forceinline__ void store(const Operands<typename S::scalar_t>& p, pipeline::Shared<S>& shared,
                                      const pipeline::Consumer<S>& me, int row, int block, int column,
                                      const Registers<float, S::kSums>& sum, Kept kept) {
  Registers<int, 2> columns;
#pragma unroll
  for (int half = 0; half < 2; ++half) columns[half] = kept(me.upper_row + 8 * half) - me.output;
  pipeline::store(shared, me, p.result_map, row, block, column,
                  [&](int part, Registers<float, S::kPartValues>& values) {
#pragma unroll
                    for (int v = 0; v < S::kPartValues; ++v) {
                      const int s = part * S::kPartValues + v;
                      values[v] = me.column_of(s) < columns[me.row_of(v)] ? sum[s] : 0.0f;
                    }
                  });
}

template <class S, class Tiles>
__device__ __forceinline__ void consume_input(const Operands<typename S::scalar_t>& p,
                                              pipeline::Shared<S>& shared, Tiles tiles) {
  const pipeline::Consumer<S> me;
  pipeline::Ring<S> ring;
  const int parts = static_cast<int>(p.out_blocks) * (p.dy2 ? 2 : 1);
  for (Tile tile; tiles.next(tile);) {
    const int row = tile.row * S::kRows, column = tile.column * S::kColumns;
    const int last_row = static_cast<int>(row + S::kRows < p.T ? row + S::kRows : p.T) - 1;
    const int widest = outputs(p, row), narrowest = outputs(p, last_row);
    // Where dy's blocks end, its tensor map gives the zeros.
    const int ragged_from = narrowest < p.out_features ? narrowest / kDepth * kDepth : INT32_MAX;
    const int steps = tile.needed ? tiles_over(widest, kDepth) * parts : 0;
    Registers<float, S::kSums> sum;
    int i = 0;
    pipeline::multiply(shared, me, steps, ring, sum, [&](int stage) {
      const bool ragged = i >= ragged_from, last = i + kDepth > widest;
      if (ragged)
        pipeline::clear_behind(shared.a[stage], me.thread,
                               [&](int r) { return row + r < p.T ? outputs(p, row + r) - i : 0; });
      if (last)
        pipeline::clear_behind_of_side(shared.b[stage], me.thread,
                                       [&](int l) { return i + l < widest ? S::kColumns : 0; });
      if (ragged || last) pipeline::show_cleared();
      i = last || i + kDepth == widest ? 0 : i + kDepth;
    });
    store(p, shared, me, row, tile.block, column, sum,
          [&](int r) { return row + r < p.T ? inputs(p, row + r) - column : 0; });
  }
  if (me.member == 0) tma_store_wait_read<0>();
}

template <class S>
__global__ void __launch_bounds__(pipeline::kThreads, 1)
    elastic_linear_backward_input_kernel(const __grid_constant__ Operands<typename S::scalar_t> p) {
  auto& shared = dynamic_shared<pipeline::Shared<S>>();
  pipeline::start(shared);
  const auto tiles = input_tiles<S>(p);
  if (threadIdx.x < pipeline::kWarpgroup) {
    fewer_registers<pipeline::kProducerRegisters>();
    if (threadIdx.x == 0) {
      prefetch_tensor_map(p.dy_map);
      prefetch_tensor_map(p.weight_map);
      prefetch_tensor_map(p.result_map);
      pipeline::produce(shared, InputLoads<S, decltype(input_tiles<S>(p))>{p, tiles});
    }
  } else {
    more_registers<pipeline::kConsumerRegisters>();
    consume_input(p, shared, tiles);
  }
}

// ---- dweight ----

template <class scalar_t, int rows, int columns>
struct WeightShape : pipeline::Shape<scalar_t, rows, columns, 1, Major::kMN, Major::kMN> {};

// Of T rows, in descending order where they differ, how many use feature i: the first ones.
__device__ __forceinline__ int rows_using(const int64_t* extent, bool per_token, int64_t T, int64_t features,
                                          int i) {
  if (i >= features) return 0;
  if (extent == nullptr || !per_token)
    return extent_at(extent, false, 0, features) > i ? static_cast<int>(T) : 0;
  int low = 0, high = static_cast<int>(T);
  while (low < high) {
    const int middle = (low + high) / 2;
    if (extent[middle] > i)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

// A tile's place in dweight and its rows of dy and x.
template <class S>
struct WeightTile {
  int output, input, out_block, in_block;  // its first of both
  int depth, whole;                        // rows that reach those, and rows that reach its last ones too

  __device__ __forceinline__ WeightTile(const Operands<typename S::scalar_t>& p, const Tile& tile)
      : output(tile.row * S::kRows), input(tile.column * S::kColumns) {
    const int in_blocks = static_cast<int>(p.in_blocks);
    out_block = tile.block / in_blocks;
    in_block = tile.block % in_blocks;
    const auto outputs_from = [&](int n) {
      return rows_using(p.out_extent, p.per_token, p.T, p.out_features, n);
    };
    const auto inputs_from = [&](int k) {
      return rows_using(p.in_extent, p.per_token, p.T, p.in_features, k);
    };
    const auto last = [](int first, int size, int64_t features) {
      return static_cast<int>(first + size < features ? first + size : features) - 1;
    };
    depth = min(outputs_from(output), inputs_from(input));
    whole = p.per_token ? min(outputs_from(last(output, S::kRows, p.out_features)),
                              inputs_from(last(input, S::kColumns, p.in_features)))
                        : depth;
  }
};

// The producer's way: the rows of dy and x, kDepth at a time, of the tiles that are needed.
template <class S, class Tiles>
struct WeightLoads {
  using scalar_t = typename S::scalar_t;
  const Operands<scalar_t>& p;
  Tiles tiles;
  int output = 0, input = 0, out_block = 0, in_block = 0, depth = 0, i = 0;

  __device__ __forceinline__ bool next() {
    i += kDepth;
    if (i < depth) return true;
    i = 0;
    Tile tile;
    if (!tiles.next(tile) || !tile.needed) return false;
    const WeightTile<S> of(p, tile);
    output = of.output;
    input = of.input;
    out_block = of.out_block;
    in_block = of.in_block;
    depth = of.depth;
    return true;
  }
  __device__ __forceinline__ void load_a(scalar_t (&to)[S::kRows][kDepth], Mbarrier& full) const {
    pipeline::load_side(to, p.dy_map, full, output, out_block, i);
  }
  __device__ __forceinline__ void load_b(scalar_t (&to)[S::kColumns][kDepth], Mbarrier& full) const {
    pipeline::load_side(to, p.x_map, full, input, in_block, i);
  }
};

// Rows of dweight and, of each, its columns as far as the widest row of x and dy reaches.
template <class S>
__device__ __forceinline__ auto weight_tiles(const Operands<typename S::scalar_t>& p) {
  const auto needed = [&p](int row) {
    return row * S::kRows < outputs(p, 0) ? tiles_over(inputs(p, 0), S::kColumns) : 0;
  };
  return TileSequence(tiles_over(p.nw, S::kRows), p.out_blocks * p.in_blocks, tiles_over(p.kw, S::kColumns),
                      needed, blockIdx.x, gridDim.x);
}

template <class S, class Tiles>
__device__ __forceinline__ void consume_weight(const Operands<typename S::scalar_t>& p,
                                               pipeline::Shared<S>& shared, Tiles tiles) {
  const pipeline::Consumer<S> me;
  pipeline::Ring<S> ring;
  for (Tile tile; tiles.next(tile);) {
    const WeightTile<S> of(p, tile);
    const int steps = tile.needed ? tiles_over(of.depth, kDepth) : 0;
    Registers<float, S::kSums> sum;
    int i = 0;
    pipeline::multiply(shared, me, steps, ring, sum, [&](int stage) {
      // Where the tensors end, their maps give the zeros.
      if (i + kDepth > of.whole && of.whole < p.T) {
        pipeline::clear_behind_of_side(shared.a[stage], me.thread, [&](int l) {
          return i + l < of.depth ? outputs(p, i + l) - of.output : 0;
        });
        pipeline::clear_behind_of_side(shared.b[stage], me.thread, [&](int l) {
          return i + l < of.depth ? inputs(p, i + l) - of.input : 0;
        });
        pipeline::show_cleared();
      }
      i += kDepth;
    });
    const int rows = steps > 0 ? outputs(p, 0) - of.output : 0;
    const int columns = inputs(p, 0) - of.input;
    store(p, shared, me, of.out_block * static_cast<int>(p.nw) + of.output, of.in_block, of.input, sum,
          [&](int r) { return r < rows ? columns : 0; });
  }
  if (me.member == 0) tma_store_wait_read<0>();
}

template <class S>
__global__ void __launch_bounds__(pipeline::kThreads, 1)
    elastic_linear_backward_weight_kernel(const __grid_constant__ Operands<typename S::scalar_t> p) {
  auto& shared = dynamic_shared<pipeline::Shared<S>>();
  pipeline::start(shared);
  const auto tiles = weight_tiles<S>(p);
  if (threadIdx.x < pipeline::kWarpgroup) {
    fewer_registers<pipeline::kProducerRegisters>();
    if (threadIdx.x == 0) {
      prefetch_tensor_map(p.dy_map);
      prefetch_tensor_map(p.x_map);
      prefetch_tensor_map(p.result_map);
      pipeline::produce(shared, WeightLoads<S, decltype(weight_tiles<S>(p))>{p, tiles});
    }
  } else {
    more_registers<pipeline::kConsumerRegisters>();
    consume_weight(p, shared, tiles);
  }
}

// ---- on the host ----

template <class S>
void run_input(const ElasticLinearBackwardParams<typename S::scalar_t>& p, CUstream_st* stream) {
  using namespace pipeline;
  Operands<typename S::scalar_t> operands{p, {}, {}, {}, {}, {}, {}};
  const auto gradient = [&](const auto* dy) {
    return operand_map(dy, p.out_features, p.out_blocks, p.T, p.out_features, p.dy_stride, S::kRows);
  };
  const auto weight = [&](const auto* data, int64_t stride) {
    const int64_t rows = (p.out_blocks - 1) * p.nw + p.out_features;
    return side_map(data, p.in_features, p.in_blocks, rows, p.kw, stride);
  };
  operands.dy_map = gradient(p.dy);
  operands.weight_map = weight(p.weight, p.weight_stride);
  if (p.dy2) {
    operands.dy2_map = gradient(p.dy2);
    operands.weight2_map = weight(p.weight2, p.weight2_stride);
  }
  operands.result_map = result_map<S>(p.dx, p.kx, p.in_blocks, p.T);
  const int64_t tiles = p.in_blocks * tiles_over(p.T, S::kRows) * tiles_over(p.kx, S::kColumns);
  launch_blocks<S, elastic_linear_backward_input_kernel<S>>(tiles, operands, stream);
}

template <class S>
void run_weight(const ElasticLinearBackwardParams<typename S::scalar_t>& p, CUstream_st* stream) {
  using namespace pipeline;
  Operands<typename S::scalar_t> operands{p, {}, {}, {}, {}, {}, {}};
  operands.dy_map = side_map(p.dy, p.out_features, p.out_blocks, p.T, p.out_features, p.dy_stride);
  operands.x_map = side_map(p.x, p.in_features, p.in_blocks, p.T, p.kx, p.x_stride);
  operands.result_map = result_map<S>(p.dweight, p.kw, p.in_blocks, p.out_blocks * p.nw);
  const int64_t tiles =
      p.out_blocks * p.in_blocks * tiles_over(p.nw, S::kRows) * tiles_over(p.kw, S::kColumns);
  launch_blocks<S, elastic_linear_backward_weight_kernel<S>>(tiles, operands, stream);
}

template <class scalar_t>
bool sizes_fit(const ElasticLinearBackwardParams<scalar_t>& p) {
  using namespace pipeline;
  return size_fits(p.T) && size_fits(p.in_features) && size_fits(p.out_features) && size_fits(p.in_blocks) &&
         size_fits(p.out_blocks) && size_fits(p.out_blocks * p.nw);
}

// Rows of `blocks` blocks, `block` apart.
template <class scalar_t>
bool rows_fit(const scalar_t* data, int64_t stride, int64_t blocks, int64_t block) {
  using namespace pipeline;
  return address_fits(data) && stride_fits<scalar_t>(stride) && (blocks == 1 || stride_fits<scalar_t>(block));
}

}  // namespace

template <class scalar_t>
bool elastic_linear_backward_input_fits_sm90(const ElasticLinearBackwardParams<scalar_t>& p) {
  const auto pair_fits = [&](const scalar_t* dy, const scalar_t* weight, int64_t weight_stride) {
    return rows_fit(dy, p.dy_stride, p.out_blocks, p.out_features) &&
           rows_fit(weight, weight_stride, p.in_blocks, p.kw);
  };
  return sizes_fit(p) && pair_fits(p.dy, p.weight, p.weight_stride) &&
         (!p.dy2 || pair_fits(p.dy2, p.weight2, p.weight2_stride)) && rows_fit(p.dx, p.kx, 1, 0);
}

// A tile must not reach from one block of dweight's rows into the next.
template <class scalar_t>
bool elastic_linear_backward_weight_fits_sm90(const ElasticLinearBackwardParams<scalar_t>& p) {
  return sizes_fit(p) && rows_fit(p.dy, p.dy_stride, p.out_blocks, p.out_features) &&
         rows_fit(p.x, p.x_stride, p.in_blocks, p.kx) && rows_fit(p.dweight, p.kw, 1, 0) &&
         (p.out_blocks == 1 || p.nw % pipeline::kConsumerRows == 0);
}

template <class scalar_t>
void elastic_linear_backward_input_sm90(const ElasticLinearBackwardParams<scalar_t>& p, CUstream_st* stream) {
  const TileSides tile = hopper_tile_sides(p.T, p.kx, p.in_blocks, multiprocessors());
  if (tile.rows == 64) return run_input<InputShape<scalar_t, 64, 128>>(p, stream);
  if (tile.columns == 128) return run_input<InputShape<scalar_t, 128, 128>>(p, stream);
  run_input<InputShape<scalar_t, 128, 256>>(p, stream);
}

template <class scalar_t>
void elastic_linear_backward_weight_sm90(const ElasticLinearBackwardParams<scalar_t>& p,
                                         CUstream_st* stream) {
  const TileSides tile = hopper_tile_sides(p.nw, p.kw, p.out_blocks * p.in_blocks, multiprocessors());
  if (tile.rows == 64 || (p.out_blocks > 1 && p.nw % 128 != 0))
    return run_weight<WeightShape<scalar_t, 64, 128>>(p, stream);
  if (tile.columns == 128) return run_weight<WeightShape<scalar_t, 128, 128>>(p, stream);
  run_weight<WeightShape<scalar_t, 128, 256>>(p, stream);
}

#define FLEXTRON_ELASTIC_LINEAR_BACKWARD_SM90(scalar_t)                                                 \
  template bool elastic_linear_backward_input_fits_sm90(const ElasticLinearBackwardParams<scalar_t>&);  \
  template bool elastic_linear_backward_weight_fits_sm90(const ElasticLinearBackwardParams<scalar_t>&); \
  template void elastic_linear_backward_input_sm90(const ElasticLinearBackwardParams<scalar_t>&,        \
                                                   CUstream_st*);                                       \
  template void elastic_linear_backward_weight_sm90(const ElasticLinearBackwardParams<scalar_t>&,       \
                                                    CUstream_st*);
FLEXTRON_ELASTIC_LINEAR_BACKWARD_SM90(bf16)
FLEXTRON_ELASTIC_LINEAR_BACKWARD_SM90(fp16)

}  // namespace flextron
