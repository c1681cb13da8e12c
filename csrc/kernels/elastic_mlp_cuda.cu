// elastic_mlp on any GPU: the hidden neurons in one kernel for bf16 and fp16, and the passes between GEMMs, a
// block per row, for float and double and for all gradients.
#include "kernels/device/launch.cuh"
#include "kernels/device/mma.cuh"
#include "kernels/device/tile.cuh"
#include "kernels/elastic_linear_tiles.h"
#include "kernels/elastic_linear_views.cuh"
#include "kernels/elastic_mlp.h"
#include "kernels/elastic_mlp_values.cuh"
#include "kernels/tuning.h"

namespace flextron {
namespace {

// ---- the hidden neurons ----

// A tile of h: 128 neurons, or 64 where there is a gate. Its B then is 16 rows of w_gate, the same 16 of
// w_up, and so on: the part of a warp holds both sums of 16 neurons, a thread's both of each of its own.
template <class T, bool kGated>
struct Hidden {
  static constexpr int kNeurons = kGated ? tiles::kColumns / 2 : tiles::kColumns;
  static constexpr int kOwn = kGated ? tiles::kWarpColumns / 2 : tiles::kWarpColumns;  // of a warp

  struct X : TokenRows<T> {
    __device__ __forceinline__ void enter(int) {}
  };
  struct Weight {
    using scalar_t = T;
    static constexpr bool kDeep = true;
    const T *up, *gate;  // the tile's first neuron
    int64_t up_stride, gate_stride;
    int neurons, inputs;

    __device__ __forceinline__ void enter(int) {}
    static __device__ __forceinline__ int neuron(int l) { return kGated ? l / 32 * 16 + l % 16 : l; }
    __device__ __forceinline__ const T* line(int l) const {
      return kGated && l % 32 < 16 ? gate + neuron(l) * gate_stride : up + neuron(l) * up_stride;
    }
    __device__ __forceinline__ int count(int l) const { return neuron(l) < neurons ? inputs : 0; }
  };
  struct Out : TileOut<T> {
    int64_t first_row;
    int first_neuron;
    Extent extent;
    __device__ __forceinline__ int kept(int m) const { return extent.at(first_row + m) - first_neuron; }
  };

  X x;
  Weight weight;
  Out out;

  __device__ __forceinline__ Hidden(const ElasticMlpHiddenParams<T>& p, int rows) {
    const Tile tile = tile_of(blockIdx.x, tiles_over(p.T, rows), 1, tiles_over(p.width, kNeurons));
    const int64_t first_row = int64_t{tile.row} * rows;
    const int first = tile.column * kNeurons;
    const Extent extent{p.extent, p.per_token, p.width};
    x = {{p.x, p.x_stride, 0, first_row, p.T, {nullptr, false, p.K}}};
    weight = {p.w_up + first * p.w_up_stride,
              kGated ? p.w_gate + first * p.w_gate_stride : nullptr,
              p.w_up_stride,
              p.w_gate_stride,
              extent.at(first_row) - first,
              static_cast<int>(p.K)};
    out = {{p.h + first_row * p.width + first, p.width, static_cast<int>(p.T - first_row),
            static_cast<int>(p.width - first), whole_pieces(p.h, p.width)},
           first_row,
           first,
           extent};
  }
};

// values *= s: what gate_scale adds for a neuron, in its order. They belong to row t and to neurons `first`
// and its neighbour, then to those 8 further, and so on.
template <class scalar_t, int N>
__device__ __forceinline__ void scale(const ElasticMlpHiddenParams<scalar_t>& p, int64_t t, int first,
                                      Registers<float, N>& values) {
  Registers<float, N> scales;
#pragma unroll
  for (int v = 0; v < N; ++v) scales[v] = 0;
  for (int c = 0; c < p.C; ++c) {
    const int end = static_cast<int>(p.choices[c]) - first;
    if (end <= 0) continue;
    const float gate = load_global(p.gate + t * p.gate_stride + c);
#pragma unroll
    for (int v = 0; v < N; ++v)
      if (v / 2 * 8 + v % 2 < end) scales[v] += gate;
  }
#pragma unroll
  for (int v = 0; v < N; ++v) values[v] *= scales[v];
}

// kAligned: every row of x and of the weights starts at a multiple of 16 bytes.
template <class scalar_t, bool kGated, int kRows, bool kAligned>
__global__ __launch_bounds__(tiles::kThreads,
                             2) void elastic_mlp_hidden_kernel(const ElasticMlpHiddenParams<scalar_t> p) {
  using Problem = Hidden<scalar_t, kGated>;
  constexpr int kEights = Problem::kOwn / 8, kValues = 2 * kEights;
  const Problem tile(p, kRows);
  if (tile.weight.neurons <= 0) return;
  auto& shared = dynamic_shared<tiles::Shared<kRows>>();
  tiles::Sums<kRows> sum;
  tiles::multiply<kAligned>(shared, tile.x, tile.weight, 1, static_cast<int>(p.K), sum);

  const tiles::Place<kRows> me;
  const int column = me.column / tiles::kWarpColumns * Problem::kOwn, own = me.lane % 4 * 2;
  const auto bias_of = [&](const scalar_t* bias, int v) {
    const int neuron = column + v / 2 * 8 + own + v % 2;
    return bias && neuron < tile.weight.neurons
               ? static_cast<float>(load_global(bias + tile.out.first_neuron + neuron))
               : 0.0f;
  };
#pragma unroll
  for (int m = 0; m < sum.kCount; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      Registers<float, kValues> values;
#pragma unroll
      for (int v = 0; v < kValues; ++v)
        values[v] = sum[m][v / 2][2 * half + v % 2] + bias_of(kGated ? p.b_gate : p.b_up, v);
      activate_all<scalar_t>(p.activation, values);
      if constexpr (kGated) {
#pragma unroll
        for (int v = 0; v < kValues; ++v)
          values[v] *= sum[m][kEights + v / 2][2 * half + v % 2] + bias_of(p.b_up, v);
      }
      const int row = me.row + 16 * m + 8 * half + me.lane / 4;
      if (p.gate && row < tile.out.rows)
        scale(p, tile.out.first_row + row, tile.out.first_neuron + column + own, values);
#pragma unroll
      for (int v = 0; v < kValues; ++v) sum[m][v / 2][2 * half + v % 2] = values[v];
    }
  tiles::put<scalar_t, Problem::kNeurons, Problem::kOwn>(shared, column, [&](int m, int n, int half) {
    return make_float2(sum[m][n][2 * half], sum[m][n][2 * half + 1]);
  });
  __syncthreads();
  tiles::store<Problem::kNeurons>(shared, tile.out);
}

template <class scalar_t, bool kGated, int kRows, bool kAligned>
void run(const ElasticMlpHiddenParams<scalar_t>& p, CUstream_st* stream) {
  const int64_t grid =
      tiles_over(p.T, kRows) * int64_t{tiles_over(p.width, Hidden<scalar_t, kGated>::kNeurons)};
  launch<elastic_mlp_hidden_kernel<scalar_t, kGated, kRows, kAligned>>(
      {.grid = dim3(static_cast<unsigned>(grid)),
       .block = dim3(tiles::kThreads),
       .stream = stream,
       .dynamic_shared = sizeof(tiles::Shared<kRows>)},
      p);
}

template <class scalar_t, bool kGated>
void run(const ElasticMlpHiddenParams<scalar_t>& p, CUstream_st* stream) {
  if (!rows_aligned(p)) return run<scalar_t, kGated, 64, false>(p, stream);
  elastic_linear_tile_rows(p.T) == 64 ? run<scalar_t, kGated, 64, true>(p, stream)
                                      : run<scalar_t, kGated, 128, true>(p, stream);
}

// ---- between GEMMs ----

constexpr int kRowThreads = 256;

template <class scalar_t>
__device__ __forceinline__ int neurons_of(const ElasticMlpRowsParams<scalar_t>& p, int64_t t) {
  return static_cast<int>(extent_at(p.extent, p.per_token, t, p.width));
}

// f(c, first, last, s) for each block of constant gate in the row: neurons [first, last) are scaled by s, the
// sum of gates c and later.
template <class scalar_t, class F>
__device__ __forceinline__ void for_each_block(const ElasticMlpRowsParams<scalar_t>& p, int64_t t,
                                               const F& f) {
  using real = accumulate_t<scalar_t>;
  const int neurons = neurons_of(p, t);
  for (int c = 0; c < p.C; ++c) {
    real s = p.gate ? 0 : 1;
    if (p.gate)
      for (int later = c; later < p.C; ++later) s += load_global(p.gate + t * p.gate_stride + later);
    const int first = c == 0 ? 0 : static_cast<int>(p.choices[c - 1]);
    f(c, first, min(neurons, static_cast<int>(p.choices[c])), s);
  }
}

// Neighbouring elements of a row that a thread takes at once, widened: 16 bytes, or a double.
template <class scalar_t>
constexpr int kPiece = sizeof(scalar_t) == 8 ? 1 : 16 / sizeof(scalar_t);
template <class scalar_t>
using Piece = Registers<accumulate_t<scalar_t>, kPiece<scalar_t>>;

// `count` elements from there on, in one access where that is a whole, aligned piece; zeros behind them.
template <class scalar_t>
__device__ __forceinline__ Piece<scalar_t> load_piece(const scalar_t* from, int count, bool whole) {
  Piece<scalar_t> piece;
  if (sizeof(scalar_t) < 8 && whole) {
    const uint4 bits = load_global(reinterpret_cast<const uint4*>(from));
    const Registers<uint32_t, 4> words{{bits.x, bits.y, bits.z, bits.w}};
#pragma unroll
    for (int i = 0; i < kPiece<scalar_t>; ++i) {
      if constexpr (sizeof(scalar_t) == 2)
        piece[i] = float(bits_as<scalar_t>(static_cast<uint16_t>(words[i / 2] >> i % 2 * 16)));
      else if constexpr (sizeof(scalar_t) == 4)
        piece[i] = bits_as<float>(words[i]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kPiece<scalar_t>; ++i)
      piece[i] = i < count ? static_cast<accumulate_t<scalar_t>>(load_global(from + i)) : 0;
  }
  return piece;
}
template <class scalar_t>
__device__ __forceinline__ void store_piece(scalar_t* to, const Piece<scalar_t>& piece, int count,
                                            bool whole) {
  if (sizeof(scalar_t) < 8 && whole) {
    Registers<uint32_t, 4> words;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (sizeof(scalar_t) == 2)
        words[i] = pack<scalar_t>(piece[2 * i], piece[2 * i + 1]);
      else if constexpr (sizeof(scalar_t) == 4)
        words[i] = bits_as<uint32_t>(piece[i]);
    }
    store_global(reinterpret_cast<uint4*>(to), make_uint4(words[0], words[1], words[2], words[3]));
  } else {
#pragma unroll
    for (int i = 0; i < kPiece<scalar_t>; ++i)
      if (i < count) store_global(to + i, static_cast<scalar_t>(piece[i]));
  }
}

// f(first, count, whole) for this thread's pieces of neurons [first, last), none of which crosses a multiple
// of its size.
template <class scalar_t, class F>
__device__ __forceinline__ void for_each_piece(int first, int last, bool aligned, const F& f) {
  constexpr int kSize = kPiece<scalar_t>;
  for (int piece = first / kSize + threadIdx.x; piece * kSize < last; piece += kRowThreads) {
    const int begin = max(first, piece * kSize), count = min(last, (piece + 1) * kSize) - begin;
    f(begin, count, aligned && count == kSize);
  }
}

template <class scalar_t>
__global__ __launch_bounds__(kRowThreads,
                             4) void elastic_mlp_rows_kernel(const ElasticMlpRowsParams<scalar_t> p) {
  using real = accumulate_t<scalar_t>;
  const int64_t t = blockIdx.x, row = t * p.width;
  const bool aligned = whole_pieces(p.u, p.width) && (!p.g || whole_pieces(p.g, p.width));
  for_each_block(p, t, [&](int, int first, int last, real s) {
    for_each_piece<scalar_t>(first, last, aligned, [&](int j, int count, bool whole) {
      auto u = load_piece(p.u + row + j, count, whole);
      auto h = p.g ? load_piece(p.g + row + j, count, whole) : u;
      activate_all<scalar_t>(p.activation, h);
#pragma unroll
      for (int i = 0; i < kPiece<scalar_t>; ++i) u[i] = p.g ? h[i] * u[i] * s : h[i] * s;
      store_piece(p.h + row + j, u, count, whole);
    });
  });
}

// The sum of all threads' values, in one order whatever the values; thread 0 has it.
template <class real>
__device__ __forceinline__ real sum_of_block(real (&shared)[kRowThreads], real value) {
  store_shared(&shared[threadIdx.x], value);
#pragma unroll
  for (int half = kRowThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) {
      value += load_shared(&shared[threadIdx.x + half]);
      store_shared(&shared[threadIdx.x], value);
    }
  }
  __syncthreads();
  return value;
}

template <class scalar_t>
__global__ __launch_bounds__(kRowThreads, 2) void elastic_mlp_rows_backward_kernel(
    const ElasticMlpRowsParams<scalar_t> p) {
  using real = accumulate_t<scalar_t>;
  struct Shared {
    real sum[kRowThreads];
  };
  auto& shared = static_shared<Shared>();
  const int64_t t = blockIdx.x, row = t * p.width;
  const bool aligned = whole_pieces(p.u, p.width) && (!p.g || whole_pieces(p.g, p.width));
  real reached = 0;  // of h * dh up to the current block: choice c reaches every neuron below d_c
  for_each_block(p, t, [&](int c, int first, int last, real s) {
    real sum = 0;
    for_each_piece<scalar_t>(first, last, aligned, [&](int j, int count, bool whole) {
      auto u = load_piece(p.u + row + j, count, whole), dh = load_piece(p.dh + row + j, count, whole);
      auto g = p.g ? load_piece(p.g + row + j, count, whole) : u;
      Piece<scalar_t> act, slope;
      with_activation(p.activation, [&]<Activation activation>() {
#pragma unroll
        for (int i = 0; i < kPiece<scalar_t>; ++i) {
          act[i] = activate_as<scalar_t, activation>(g[i]);
          slope[i] = activate_derivative_as<scalar_t, activation>(g[i]);
        }
      });
#pragma unroll
      for (int i = 0; i < kPiece<scalar_t>; ++i) {
        const real up = u[i], dscaled = dh[i], h = p.g ? act[i] * up : act[i];
        sum += h * dscaled;  // 0 behind the last: dh is
        dh[i] = s * h;
        u[i] = p.g ? s * dscaled * act[i] : s * dscaled * slope[i];
        g[i] = s * dscaled * up * slope[i];
      }
      store_piece(p.h + row + j, dh, count, whole);
      store_piece(p.du + row + j, u, count, whole);
      if (p.g) store_piece(p.dg + row + j, g, count, whole);
    });
    if (!p.dgate) return;
    reached += sum_of_block(shared.sum, sum);
    if (threadIdx.x == 0) store_global(p.dgate + t * p.C + c, reached);
  });
}

}  // namespace

template <class scalar_t>
void elastic_mlp_hidden_cuda(const ElasticMlpHiddenParams<scalar_t>& p, CUstream_st* stream) {
  if (p.T == 0 || p.width == 0) return;
  p.w_gate ? run<scalar_t, true>(p, stream) : run<scalar_t, false>(p, stream);
}

template <class scalar_t>
void elastic_mlp_rows_cuda(const ElasticMlpRowsParams<scalar_t>& p, CUstream_st* stream) {
  if (p.T == 0 || p.width == 0) return;
  launch<elastic_mlp_rows_kernel<scalar_t>>(
      {.grid = dim3(static_cast<unsigned>(p.T)), .block = dim3(kRowThreads), .stream = stream}, p);
}

template <class scalar_t>
void elastic_mlp_rows_backward_cuda(const ElasticMlpRowsParams<scalar_t>& p, CUstream_st* stream) {
  if (p.T == 0 || (p.width == 0 && !p.dgate)) return;
  launch<elastic_mlp_rows_backward_kernel<scalar_t>>(
      {.grid = dim3(static_cast<unsigned>(p.T)), .block = dim3(kRowThreads), .stream = stream}, p);
}

template void elastic_mlp_hidden_cuda(const ElasticMlpHiddenParams<bf16>&, CUstream_st*);
template void elastic_mlp_hidden_cuda(const ElasticMlpHiddenParams<fp16>&, CUstream_st*);
template void elastic_mlp_rows_cuda(const ElasticMlpRowsParams<float>&, CUstream_st*);
template void elastic_mlp_rows_cuda(const ElasticMlpRowsParams<double>&, CUstream_st*);
template void elastic_mlp_rows_cuda(const ElasticMlpRowsParams<bf16>&, CUstream_st*);
template void elastic_mlp_rows_cuda(const ElasticMlpRowsParams<fp16>&, CUstream_st*);
template void elastic_mlp_rows_backward_cuda(const ElasticMlpRowsParams<float>&, CUstream_st*);
template void elastic_mlp_rows_backward_cuda(const ElasticMlpRowsParams<double>&, CUstream_st*);
template void elastic_mlp_rows_backward_cuda(const ElasticMlpRowsParams<bf16>&, CUstream_st*);
template void elastic_mlp_rows_backward_cuda(const ElasticMlpRowsParams<fp16>&, CUstream_st*);

}  // namespace flextron
