// elastic_linear on Hopper, bf16 and fp16: y = x W^T + bias by wgmma, with loads and stores by TMA
// (device/pipeline_sm90.cuh). Blocks walk over tiles of y in the order of elastic_linear_tiles.h.
//
// Producer and consumers each read the extents here. A tile that no row needs is neither loaded nor
// multiplied, and the features of a row tile end with those of its widest row. The tensor maps give zeros for
// features and rows outside the tensors. If an extent on the device ends inside a stage, the consumers write
// zeros into the rest of the stage, for both operands: 0 x NaN is NaN.
#include "kernels/device/pipeline_sm90.cuh"
#include "kernels/elastic_linear.h"
#include "kernels/elastic_linear_tiles.h"
#include "kernels/tuning.h"

namespace flextron {
namespace {

using pipeline::kDepth;

template <class scalar_t, int rows, int columns>
using Shape = pipeline::Shape<scalar_t, rows, columns, 1>;

// The tensor maps of x, the weight and y: blocks of in_features or out_features in rows.
template <class scalar_t>
struct Operands : ElasticLinearParams<scalar_t> {
  TensorMap x_map, weight_map, y_map;
};

template <class scalar_t>
__device__ __forceinline__ int inputs(const Operands<scalar_t>& p, int row) {
  return static_cast<int>(in_extent_at(p, row));
}
template <class scalar_t>
__device__ __forceinline__ int outputs(const Operands<scalar_t>& p, int row) {
  return static_cast<int>(out_extent_at(p, row));
}

// The producer's way: the features of each block, kDepth at a time, tile after tile.
template <class S, class Tiles>
struct Loads {
  const Operands<typename S::scalar_t>& p;
  Tiles tiles;
  Tile tile{};
  int widest = 0, block = 0, i = 0;

  __device__ __forceinline__ bool next() {
    i += kDepth;
    if (i < widest) return true;
    i = 0;
    if (widest > 0 && ++block < p.in_blocks) return true;
    block = 0;
    do {
      if (!tiles.next(tile) || !tile.needed) return false;
      widest = inputs(p, tile.row * S::kRows);
    } while (widest == 0);
    return true;
  }
  __device__ __forceinline__ void load_a(void* to, Mbarrier& full) const {
    tma_load_3d(to, p.x_map, full, i, block, tile.row * S::kRows);
  }
  __device__ __forceinline__ void load_b(void* to, Mbarrier& full) const {
    const int row = tile.block * static_cast<int>(p.nw) + tile.column * S::kColumns;
    tma_load_3d(to, p.weight_map, full, i, block, row);
  }
};

template <class S, class Tiles>
__device__ __forceinline__ void consume(const Operands<typename S::scalar_t>& p, pipeline::Shared<S>& shared,
                                        Tiles tiles) {
  const pipeline::Consumer<S> me;
  pipeline::Ring<S> ring;
  for (Tile tile; tiles.next(tile);) {
    const int row = tile.row * S::kRows, column = tile.column * S::kColumns;
    const int last_row = static_cast<int>(row + S::kRows < p.T ? row + S::kRows : p.T) - 1;
    const auto biases = pipeline::biases_of(me, [&](int c) {
      const int n = column + me.column + c;
      return p.bias && n < outputs(p, row) ? static_cast<float>(load_global(p.bias + tile.block * p.nw + n))
                                           : 0.0f;
    });

    const int widest = inputs(p, row), narrowest = inputs(p, last_row);
    // Where x and the weight end, the tensor maps give the zeros.
    const int ragged_from = narrowest < p.in_features ? narrowest / kDepth * kDepth : narrowest;
    const int steps = tile.needed ? tiles_over(widest, kDepth) * static_cast<int>(p.in_blocks) : 0;
    Registers<float, S::kSums> sum;
    int i = 0;
    pipeline::multiply(shared, me, steps, ring, sum, [&](int stage) {
      if (i >= ragged_from) {
        pipeline::clear_behind(shared.a[stage], me.thread,
                               [&](int r) { return row + r < p.T ? inputs(p, row + r) - i : 0; });
        if (i + kDepth > widest)
          pipeline::clear_behind(shared.b[stage], me.thread, [&](int) { return widest - i; });
        pipeline::show_cleared();
      }
      i = i + kDepth < widest ? i + kDepth : 0;
    });

    // Zeros beyond each row's extent.
    Registers<int, 2> kept;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int t = row + me.upper_row + 8 * half;
      kept[half] = t < p.T ? outputs(p, t) - column - me.output : 0;
    }
    pipeline::put_biases(shared, me, biases);
    pipeline::store(shared, me, p.y_map, row, tile.block, column,
                    [&](int part, Registers<float, S::kPartValues>& values) {
#pragma unroll
                      for (int v = 0; v < S::kPartValues; v += 4) {
                        const int s = part * S::kPartValues + v;
                        const float2 bias = pipeline::bias_of(shared, me, s);
#pragma unroll
                        for (int k = 0; k < 4; ++k)
                          values[v + k] = me.column_of(s + k) < kept[me.row_of(k)]
                                              ? sum[s + k] + (k % 2 == 0 ? bias.x : bias.y)
                                              : 0.0f;
                      }
                    });
  }
  if (me.member == 0) tma_store_wait_read<0>();
}

template <class S>
__global__ void __launch_bounds__(pipeline::kThreads, 1)
    elastic_linear_kernel(const __grid_constant__ Operands<typename S::scalar_t> p) {
  auto& shared = dynamic_shared<pipeline::Shared<S>>();
  pipeline::start(shared);
  const auto needed = [&p](int row) { return tiles_over(outputs(p, row * S::kRows), S::kColumns); };
  TileSequence tiles(tiles_over(p.T, S::kRows), p.out_blocks, tiles_over(p.out_features, S::kColumns), needed,
                     blockIdx.x, gridDim.x);
  if (threadIdx.x < pipeline::kWarpgroup) {
    fewer_registers<pipeline::kProducerRegisters>();
    if (threadIdx.x == 0) {
      prefetch_tensor_map(p.x_map);
      prefetch_tensor_map(p.weight_map);
      prefetch_tensor_map(p.y_map);
      pipeline::produce(shared, Loads<S, decltype(tiles)>{p, tiles});
    }
  } else {
    more_registers<pipeline::kConsumerRegisters>();
    grid_dependency_wait();
    consume(p, shared, tiles);
  }
}

template <class S>
void run(const ElasticLinearParams<typename S::scalar_t>& p, CUstream_st* stream, bool dependent) {
  const int64_t weight_rows = (p.out_blocks - 1) * p.nw + p.out_features;
  const Operands<typename S::scalar_t> operands{
      p, pipeline::operand_map(p.x, p.in_features, p.in_blocks, p.T, p.kx, p.x_stride, S::kRows),
      pipeline::operand_map(p.weight, p.in_features, p.in_blocks, weight_rows, p.kw, p.weight_stride,
                            S::kColumns),
      pipeline::result_map<S>(p.y, p.out_features, p.out_blocks, p.T)};
  const int64_t tiles = p.out_blocks * tiles_over(p.T, S::kRows) * tiles_over(p.out_features, S::kColumns);
  pipeline::launch_blocks<S, elastic_linear_kernel<S>>(tiles, operands, stream, dependent);
}

}  // namespace

template <class scalar_t>
bool elastic_linear_fits_sm90(const ElasticLinearParams<scalar_t>& p) {
  using namespace pipeline;
  return size_fits(p.T) && size_fits(p.in_features) && size_fits(p.out_features) && size_fits(p.in_blocks) &&
         size_fits(p.out_blocks) && size_fits(p.out_blocks * p.nw) && address_fits(p.x) &&
         address_fits(p.weight) && address_fits(p.y) && stride_fits<scalar_t>(p.x_stride) &&
         stride_fits<scalar_t>(p.weight_stride) && stride_fits<scalar_t>(p.out_features) &&
         (p.in_blocks == 1 || (stride_fits<scalar_t>(p.kx) && stride_fits<scalar_t>(p.kw)));
}

template <class scalar_t>
void elastic_linear_sm90(const ElasticLinearParams<scalar_t>& p, CUstream_st* stream, bool dependent) {
  const TileSides tile = hopper_tile_sides(p.T, p.out_features, p.out_blocks, multiprocessors());
  if (tile.rows == 64) return run<Shape<scalar_t, 64, 128>>(p, stream, dependent);
  if (tile.columns == 128) return run<Shape<scalar_t, 128, 128>>(p, stream, dependent);
  run<Shape<scalar_t, 128, 256>>(p, stream, dependent);
}

#define FLEXTRON_ELASTIC_LINEAR_SM90(scalar_t)                                  \
  template bool elastic_linear_fits_sm90(const ElasticLinearParams<scalar_t>&); \
  template void elastic_linear_sm90(const ElasticLinearParams<scalar_t>&, CUstream_st*, bool);
FLEXTRON_ELASTIC_LINEAR_SM90(bf16)
FLEXTRON_ELASTIC_LINEAR_SM90(fp16)

}  // namespace flextron
