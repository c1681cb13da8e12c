// elastic_mlp's hidden neurons on Hopper, bf16 and fp16: h = s * act(x w_gate^T + b_gate) * (x w_up^T +
// b_up), or s * act(x w_up^T + b_up), in one kernel (device/pipeline_sm90.cuh).
//
// Blocks walk over the tiles of h that any row needs (elastic_linear_tiles.h); other tiles stay as they are.
// A consumer's part of B is some rows of w_gate, and behind them as many of w_up: one thread then holds both
// sums of a neuron and multiplies them by itself. Neurons of a tile that a row does not use may be NaN until
// the end, since every neuron has a column of its own.
#include "kernels/device/pipeline_sm90.cuh"
#include "kernels/elastic_linear.h"
#include "kernels/elastic_linear_tiles.h"
#include "kernels/elastic_mlp.h"
#include "kernels/elastic_mlp_values.cuh"
#include "kernels/tuning.h"

namespace flextron {
namespace {

// B is w_gate's and w_up's rows side by side, or w_up's alone.
template <class scalar_t, int rows, int columns, bool gated>
struct Shape : pipeline::Shape<scalar_t, rows, columns, gated ? 2 : 1> {
  static constexpr bool kGated = gated;
};

template <class scalar_t>
struct Operands : ElasticMlpHiddenParams<scalar_t> {
  TensorMap x_map, gate_map, up_map, h_map;
};

template <class scalar_t>
__device__ __forceinline__ int neurons(const Operands<scalar_t>& p, int row) {
  return static_cast<int>(extent_at(p.extent, p.per_token, row, p.width));
}

// The producer's way: all features, kDepth at a time, of the tiles that are needed.
template <class S, class Tiles>
struct Loads {
  const Operands<typename S::scalar_t>& p;
  Tiles tiles;
  Tile tile{};
  int i = INT32_MAX / 2;  // no tile yet

  __device__ __forceinline__ bool next() {
    i += pipeline::kDepth;
    if (i < p.K) return true;
    i = 0;
    return tiles.next(tile) && tile.needed;
  }
  __device__ __forceinline__ void load_a(void* to, Mbarrier& full) const {
    tma_load_3d(to, p.x_map, full, i, 0, tile.row * S::kRows);
  }
  __device__ __forceinline__ void load_b(typename S::scalar_t (&to)[S::kColumns][pipeline::kDepth],
                                         Mbarrier& full) const {
    const int neuron = tile.column * S::kOutputs;
    if constexpr (!S::kGated) {
      tma_load_3d(to, p.up_map, full, i, 0, neuron);
    } else {
#pragma unroll
      for (int part = 0; part < S::kAcross; ++part) {
        auto* const own = to + part * S::kOwnColumns;
        tma_load_3d(own, p.gate_map, full, i, 0, neuron + part * S::kOwnOutputs);
        tma_load_3d(own + S::kOwnOutputs, p.up_map, full, i, 0, neuron + part * S::kOwnOutputs);
      }
    }
  }
};

// values *= s. What gate_scale adds for a neuron, in its order, but each entry of the gate is read once for
// all the neurons of the part, which begins at neuron `first`.
template <class S>
__device__ __forceinline__ void scale(const Operands<typename S::scalar_t>& p,
                                      const pipeline::Consumer<S>& me, int row, int first,
                                      Registers<float, S::kPartValues>& values) {
  Registers<float, S::kPartValues> scales;
#pragma unroll
  for (int v = 0; v < S::kPartValues; ++v) scales[v] = 0;
  for (int c = 0; c < p.C; ++c) {
    const int end = static_cast<int>(p.choices[c]) - first;
    if (end <= 0) continue;
    Registers<float, 2> gate;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int t = row + me.upper_row + 8 * half;
      gate[half] = t < p.T ? load_global(p.gate + t * p.gate_stride + c) : 0.0f;
    }
#pragma unroll
    for (int v = 0; v < S::kPartValues; ++v)
      if (me.column_of(v) < end) scales[v] += gate[me.row_of(v)];
  }
#pragma unroll
  for (int v = 0; v < S::kPartValues; ++v) values[v] *= scales[v];
}

template <class S, class Tiles>
__device__ __forceinline__ void consume(const Operands<typename S::scalar_t>& p, pipeline::Shared<S>& shared,
                                        Tiles tiles) {
  const pipeline::Consumer<S> me;
  pipeline::Ring<S> ring;
  for (Tile tile; tiles.next(tile) && tile.needed;) {
    const int row = tile.row * S::kRows, column = tile.column * S::kOutputs;
    const auto biases = pipeline::biases_of(me, [&](int c) {
      const auto* const bias = S::kGated && c < S::kOwnOutputs ? p.b_gate : p.b_up;
      const int n = column + me.output + c % S::kOwnOutputs;
      return bias && n < neurons(p, row) ? static_cast<float>(load_global(bias + n)) : 0.0f;
    });
    Registers<float, S::kSums> sum;
    pipeline::multiply(shared, me, tiles_over(p.K, pipeline::kDepth), ring, sum, [](int) {});

    // Zeros beyond each row's extent.
    Registers<int, 2> kept;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int t = row + me.upper_row + 8 * half;
      kept[half] = t < p.T ? neurons(p, t) - column - me.output : 0;
    }
    pipeline::put_biases(shared, me, biases);
    pipeline::store(shared, me, p.h_map, row, 0, column,
                    [&](int part, Registers<float, S::kPartValues>& values) {
                      const int first = part * S::kPartValues;
                      const auto with_bias = [&](int s, int v) {
                        const float2 bias = pipeline::bias_of(shared, me, s + v / 4 * 4);
                        return sum[s + v] + (v % 2 == 0 ? bias.x : bias.y);
                      };
#pragma unroll
                      for (int v = 0; v < S::kPartValues; ++v) values[v] = with_bias(first, v);
                      activate_all<typename S::scalar_t>(p.activation, values);
                      if constexpr (S::kGated) {
#pragma unroll
                        for (int v = 0; v < S::kPartValues; ++v)
                          values[v] *= with_bias(S::kSums / 2 + first, v);
                      }
                      if (p.gate) scale<S>(p, me, row, column + me.output + part * S::kPart, values);
#pragma unroll
                      for (int v = 0; v < S::kPartValues; ++v)
                        if (me.column_of(first + v) >= kept[me.row_of(v)]) values[v] = 0;
                    });
  }
  if (me.member == 0) tma_store_wait_read<0>();
}

template <class S>
__global__ void __launch_bounds__(pipeline::kThreads, 1)
    elastic_mlp_hidden_kernel(const __grid_constant__ Operands<typename S::scalar_t> p) {
  auto& shared = dynamic_shared<pipeline::Shared<S>>();
  pipeline::start(shared);
  const auto needed = [&p](int row) { return tiles_over(neurons(p, row * S::kRows), S::kOutputs); };
  TileSequence tiles(tiles_over(p.T, S::kRows), 1, tiles_over(p.width, S::kOutputs), needed, blockIdx.x,
                     gridDim.x);
  if (threadIdx.x < pipeline::kWarpgroup) {
    fewer_registers<pipeline::kProducerRegisters>();
    if (threadIdx.x == 0) {
      prefetch_tensor_map(p.x_map);
      if constexpr (S::kGated) prefetch_tensor_map(p.gate_map);
      prefetch_tensor_map(p.up_map);
      prefetch_tensor_map(p.h_map);
      pipeline::produce(shared, Loads<S, decltype(tiles)>{p, tiles});
    }
  } else {
    more_registers<pipeline::kConsumerRegisters>();
    consume(p, shared, tiles);
  }
}

template <class S>
void run(const ElasticMlpHiddenParams<typename S::scalar_t>& p, CUstream_st* stream) {
  const auto weight_map = [&](const auto* weight, int64_t stride) {
    return pipeline::operand_map(weight, p.K, 1, p.width, 0, stride,
                                 S::kGated ? S::kOwnOutputs : S::kColumns);
  };
  Operands<typename S::scalar_t> operands{p, {}, {}, {}, {}};
  operands.x_map = pipeline::operand_map(p.x, p.K, 1, p.T, 0, p.x_stride, S::kRows);
  if (S::kGated) operands.gate_map = weight_map(p.w_gate, p.w_gate_stride);
  operands.up_map = weight_map(p.w_up, p.w_up_stride);
  operands.h_map = pipeline::result_map<S>(p.h, p.width, 1, p.T);
  const int64_t tiles = int64_t{tiles_over(p.T, S::kRows)} * tiles_over(p.width, S::kOutputs);
  pipeline::launch_blocks<S, elastic_mlp_hidden_kernel<S>>(tiles, operands, stream);
}

// Tiles as elastic_linear's, of the columns that B has.
template <class scalar_t, bool gated>
void run(const ElasticMlpHiddenParams<scalar_t>& p, CUstream_st* stream) {
  const TileSides tile = hopper_tile_sides(p.T, gated ? 2 * p.width : p.width, 1, multiprocessors());
  if (tile.rows == 64) return run<Shape<scalar_t, 64, 128, gated>>(p, stream);
  if (tile.columns == 128) return run<Shape<scalar_t, 128, 128, gated>>(p, stream);
  run<Shape<scalar_t, 128, 256, gated>>(p, stream);
}

}  // namespace

template <class scalar_t>
bool elastic_mlp_hidden_fits_sm90(const ElasticMlpHiddenParams<scalar_t>& p) {
  using namespace pipeline;
  return size_fits(p.T) && size_fits(p.K) && size_fits(p.width) && address_fits(p.x) &&
         address_fits(p.w_up) && address_fits(p.h) && stride_fits<scalar_t>(p.x_stride) &&
         stride_fits<scalar_t>(p.w_up_stride) && stride_fits<scalar_t>(p.width) &&
         (!p.w_gate || (address_fits(p.w_gate) && stride_fits<scalar_t>(p.w_gate_stride)));
}

template <class scalar_t>
void elastic_mlp_hidden_sm90(const ElasticMlpHiddenParams<scalar_t>& p, CUstream_st* stream) {
  p.w_gate ? run<scalar_t, true>(p, stream) : run<scalar_t, false>(p, stream);
}

#define FLEXTRON_ELASTIC_MLP_SM90(scalar_t)                                            \
  template bool elastic_mlp_hidden_fits_sm90(const ElasticMlpHiddenParams<scalar_t>&); \
  template void elastic_mlp_hidden_sm90(const ElasticMlpHiddenParams<scalar_t>&, CUstream_st*);
FLEXTRON_ELASTIC_MLP_SM90(bf16)
FLEXTRON_ELASTIC_MLP_SM90(fp16)

}  // namespace flextron
