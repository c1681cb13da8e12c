// elastic_linear on any GPU. A block owns one tile of y and reads the extents itself: a tile beyond its
// widest row's outputs is zeros and reads nothing, a row tile's inputs end with its widest row's.
//
// Both kernels add a row's products in one order, whatever the tile, and what lies behind an extent enters
// them as zeros: a row's result does not depend on the rows beside it.
#include <cmath>

#include "kernels/device/copy.cuh"
#include "kernels/device/launch.cuh"
#include "kernels/device/mma.cuh"
#include "kernels/elastic_linear.h"
#include "kernels/elastic_linear_tiles.h"

namespace flextron {
namespace {

constexpr int kThreads = 256;

template <class scalar_t>
__device__ __forceinline__ int inputs_of(const ElasticLinearParams<scalar_t>& p, int64_t t) {
  return static_cast<int>(in_extent_at(p, t));
}
template <class scalar_t>
__device__ __forceinline__ int outputs_of(const ElasticLinearParams<scalar_t>& p, int64_t t) {
  return static_cast<int>(out_extent_at(p, t));
}

// ---- bf16 and fp16: tensor cores
// ---------------------------------------------------------------------------

// Eight warps, two by four, each with kRows / 2 x 32 of a tile of kRows x 128: 64 sums a thread where kRows
// is 128.
constexpr int kColumns = 128;
constexpr int kWarpColumns = 32;
constexpr int kDepth = 32;           // inputs of a stage: rows of 64 bytes
constexpr int kPieces = kDepth / 8;  // of 16 bytes, in such a row
constexpr int kLoadRows = kThreads / kPieces;
constexpr int kStages = 4;  // 64 KiB: two blocks still share a multiprocessor of 164 KiB

// Where 16-byte piece `piece` of a stage's row lies: rows that one access reads together differ in their
// banks.
__device__ __forceinline__ int input_place(int row, int piece) {
  return row * kPieces + (piece ^ (row / 2 % kPieces));
}
// The same in the tile of y, whose rows are 16 pieces.
__device__ __forceinline__ int output_place(int row, int piece) {
  return row * (kColumns / 8) + (piece ^ (row % 8));
}

template <int kRows>
union Shared {
  struct {
    uint4 x[kRows * kPieces], weight[kColumns * kPieces];
  } ring[kStages];
  uint4 y[kRows * kColumns / 8];
};

// The first `count` elements from there on in 16 bytes, zeros behind them; at any address.
template <class scalar_t>
__device__ __forceinline__ uint4 gathered(const scalar_t* from, int count) {
  Registers<uint32_t, 4> words;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t low = 2 * i < count ? load_global(from + 2 * i).bits : 0;
    const uint32_t high = 2 * i + 1 < count ? load_global(from + 2 * i + 1).bits : 0;
    words[i] = low | high << 16;
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

// A thread's share of one operand's tiles: the same 16-byte piece of every 64th row.
template <class scalar_t, int rows>
struct Operand {
  static constexpr int kShare = rows / kLoadRows;
  Registers<const scalar_t*, kShare> source;  // the piece in the row's first tile
  Registers<int, kShare> limit;               // elements that count from there on, in each block

  // The tile `at` elements further, `i` within its block.
  template <bool kAligned>
  __device__ __forceinline__ void load(uint4* tile, int64_t at, int i) const {
#pragma unroll
    for (int share = 0; share < kShare; ++share) {
      uint4* const to = tile + input_place(threadIdx.x / kPieces + share * kLoadRows, threadIdx.x % kPieces);
      const scalar_t* const from = source[share] + at;
      const int count = min(max(limit[share] - i, 0), 8);
      if constexpr (kAligned)
        cp_async_16(to, from, count * static_cast<int>(sizeof(scalar_t)));
      else
        store_shared(to, gathered(from, count));
    }
  }
};

// kAligned: every row of every block starts at a multiple of 16 bytes in x and in weight.
template <class scalar_t, int kRows, bool kAligned>
__global__ __launch_bounds__(kThreads, 2) void elastic_linear_kernel(const ElasticLinearParams<scalar_t> p) {
  constexpr int kSixteens = kRows / 2 / 16, kEights = kWarpColumns / 8;
  auto& shared = dynamic_shared<Shared<kRows>>();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_row = warp / 4 * (kRows / 2), warp_column = warp % 4 * kWarpColumns;

  const Tile tile =
      tile_of(blockIdx.x, tiles_over(p.T, kRows), p.out_blocks, tiles_over(p.out_features, kColumns));
  const int64_t first_row = int64_t{tile.row} * kRows;
  const int first_column = tile.column * kColumns;
  const int widest_in = inputs_of(p, first_row), widest_out = outputs_of(p, first_row);
  const int steps =
      first_column < widest_out ? tiles_over(widest_in, kDepth) * static_cast<int>(p.in_blocks) : 0;

  Operand<scalar_t, kRows> x;
  Operand<scalar_t, kColumns> weight;
  const int piece = threadIdx.x % kPieces * 8;
#pragma unroll
  for (int share = 0; share < x.kShare; ++share) {
    const int64_t t = first_row + threadIdx.x / kPieces + share * kLoadRows;
    x.source[share] = p.x + t * p.x_stride + piece;
    x.limit[share] = t < p.T ? inputs_of(p, t) - piece : 0;
  }
#pragma unroll
  for (int share = 0; share < weight.kShare; ++share) {
    const int n = first_column + threadIdx.x / kPieces + share * kLoadRows;
    weight.source[share] = p.weight + (tile.block * p.nw + n) * p.weight_stride + piece;
    weight.limit[share] = n < widest_out ? widest_in - piece : 0;
  }

  int fetched = 0, fetched_in_block = 0;
  int64_t x_block = 0, weight_block = 0;
  const auto fetch = [&] {
    if (fetched < steps) {
      auto& stage = shared.ring[fetched % kStages];
      x.template load<kAligned>(stage.x, x_block + fetched_in_block, fetched_in_block);
      weight.template load<kAligned>(stage.weight, weight_block + fetched_in_block, fetched_in_block);
      ++fetched;
      fetched_in_block += kDepth;
      if (fetched_in_block >= widest_in) {
        fetched_in_block = 0;
        x_block += p.kx;
        weight_block += p.kw;
      }
    }
    cp_async_commit();
  };

  Registers<Registers<Registers<float, 4>, kEights>, kSixteens> sum;
#pragma unroll
  for (int m = 0; m < kSixteens; ++m)
#pragma unroll
    for (int n = 0; n < kEights; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[m][n][i] = 0;

  for (int ahead = 0; ahead < kStages - 1; ++ahead) fetch();
  for (int step = 0; step < steps; ++step) {
    cp_async_wait<kStages - 2>();
    __syncthreads();  // the stage is there for all, and all have left the one that is fetched next
    fetch();
    const auto& stage = shared.ring[step % kStages];
#pragma unroll
    for (int k = 0; k < kPieces; k += 2) {
      Registers<Registers<uint32_t, 4>, kSixteens> a;
      Registers<Registers<uint32_t, 4>, kEights / 2> b;
#pragma unroll
      for (int m = 0; m < kSixteens; ++m)
        ldmatrix_x4(a[m], &stage.x[input_place(warp_row + 16 * m + lane % 16, k + lane / 16)]);
#pragma unroll
      for (int n = 0; n < kEights / 2; ++n)
        ldmatrix_x4(
            b[n],
            &stage.weight[input_place(warp_column + 16 * n + lane / 16 * 8 + lane % 8, k + lane / 8 % 2)]);
#pragma unroll
      for (int m = 0; m < kSixteens; ++m)
#pragma unroll
        for (int n = 0; n < kEights; ++n)
          mma_m16n8k16<scalar_t>(sum[m][n], a[m], b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
    }
  }

  // Bias and rounding, into shared memory; from there whole pieces go to y.
  __syncthreads();
#pragma unroll
  for (int n = 0; n < kEights; ++n) {
    const int column = first_column + warp_column + 8 * n + lane % 4 * 2;
    Registers<float, 2> bias;
#pragma unroll
    for (int i = 0; i < 2; ++i)
      bias[i] =
          p.bias && column + i < widest_out ? float(load_global(p.bias + tile.block * p.nw + column + i)) : 0;
#pragma unroll
    for (int m = 0; m < kSixteens; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint4* const to =
            &shared.y[output_place(warp_row + 16 * m + 8 * half + lane / 4, warp_column / 8 + n)];
        store_shared(reinterpret_cast<uint32_t*>(to) + lane % 4,
                     pack<scalar_t>(sum[m][n][2 * half] + bias[0], sum[m][n][2 * half + 1] + bias[1]));
      }
  }
  __syncthreads();

  const bool whole_pieces = p.out_features % 8 == 0 && reinterpret_cast<uintptr_t>(p.y) % 16 == 0;
  for (int i = threadIdx.x; i < kRows * kColumns / 8; i += kThreads) {
    const int row = i / (kColumns / 8), column = first_column + i % (kColumns / 8) * 8;
    const int64_t t = first_row + row;
    if (t >= p.T || column >= p.out_features) continue;
    const uint4 piece = load_shared(&shared.y[output_place(row, i % (kColumns / 8))]);
    const int kept = outputs_of(p, t) - column;
    Registers<uint32_t, 4> words{{piece.x, piece.y, piece.z, piece.w}};
#pragma unroll
    for (int j = 0; j < 4; ++j) words[j] = 2 * j + 1 < kept ? words[j] : 2 * j < kept ? words[j] & 0xffff : 0;
    scalar_t* const to = p.y + (t * p.out_blocks + tile.block) * p.out_features + column;
    if (whole_pieces) {
      store_global(reinterpret_cast<uint4*>(to), make_uint4(words[0], words[1], words[2], words[3]));
      continue;
    }
#pragma unroll
    for (int j = 0; j < 8; ++j)
      if (column + j < p.out_features)
        store_global(reinterpret_cast<uint16_t*>(to) + j,
                     static_cast<uint16_t>(words[j / 2] >> (j % 2 * 16)));
  }
}

// ---- float and double
// --------------------------------------------------------------------------------------

// A thread owns four rows by four columns of a 64 x 64 tile, two neighbours and the two 32 further. Tiles of
// 16 inputs go through shared memory one at a time, inputs outermost. Each is summed apart and then added: at
// 4096 inputs the error in float is 1.15 times the vendor's on the CPU, and 4.4 times when every product is
// added to the one before.
constexpr int kPlainTile = 64, kPlainDepth = 16;
// Two words more than a tile: a warp writes 16 inputs of two rows into different banks.
constexpr int kPlainPitch = kPlainTile + 2;

template <class scalar_t>
struct PlainShared {
  alignas(16) scalar_t x[kPlainDepth][kPlainPitch];
  alignas(16) scalar_t weight[kPlainDepth][kPlainPitch];
};

template <class scalar_t>
struct alignas(2 * sizeof(scalar_t)) Pair {
  scalar_t first, second;
};

template <class scalar_t>
__device__ __forceinline__ Registers<scalar_t, 4> four_of(const scalar_t* line, int at) {
  const auto near = load_shared(reinterpret_cast<const Pair<scalar_t>*>(line + at));
  const auto far = load_shared(reinterpret_cast<const Pair<scalar_t>*>(line + at + kPlainTile / 2));
  return {{near.first, near.second, far.first, far.second}};
}

template <class scalar_t>
__device__ __forceinline__ Registers<Registers<scalar_t, 4>, 4> zeros() {
  Registers<Registers<scalar_t, 4>, 4> sums;
#pragma unroll
  for (int m = 0; m < 4; ++m)
#pragma unroll
    for (int n = 0; n < 4; ++n) sums[m][n] = 0;
  return sums;
}

template <class scalar_t>
__global__ __launch_bounds__(kThreads) void elastic_linear_plain_kernel(
    const ElasticLinearParams<scalar_t> p) {
  auto& shared = static_shared<PlainShared<scalar_t>>();
  const Tile tile =
      tile_of(blockIdx.x, tiles_over(p.T, kPlainTile), p.out_blocks, tiles_over(p.out_features, kPlainTile));
  const int64_t first_row = int64_t{tile.row} * kPlainTile;
  const int first_column = tile.column * kPlainTile;
  const int widest_in = inputs_of(p, first_row), widest_out = outputs_of(p, first_row);
  const int blocks = first_column < widest_out ? static_cast<int>(p.in_blocks) : 0;

  const int row = threadIdx.x / 16 * 2, column = threadIdx.x % 16 * 2;
  auto sum = zeros<scalar_t>();

  // Each thread brings one input of every 16th row of both tiles.
  const int own = threadIdx.x % kPlainDepth;
  for (int block = 0; block < blocks; ++block)
    for (int first = 0; first < widest_in; first += kPlainDepth) {
      const int i = first + own;
      for (int r = threadIdx.x / kPlainDepth; r < kPlainTile; r += kThreads / kPlainDepth) {
        const int64_t t = first_row + r;
        const int n = first_column + r;
        const bool has_x = t < p.T && i < inputs_of(p, t), has_weight = n < widest_out && i < widest_in;
        store_shared(&shared.x[own][r],
                     has_x ? load_global(p.x + t * p.x_stride + block * p.kx + i) : scalar_t(0));
        store_shared(
            &shared.weight[own][r],
            has_weight ? load_global(p.weight + (tile.block * p.nw + n) * p.weight_stride + block * p.kw + i)
                       : scalar_t(0));
      }
      __syncthreads();
      auto part = zeros<scalar_t>();
#pragma unroll
      for (int k = 0; k < kPlainDepth; ++k) {
        const auto a = four_of(shared.x[k], row), b = four_of(shared.weight[k], column);
#pragma unroll
        for (int m = 0; m < 4; ++m)
#pragma unroll
          for (int n = 0; n < 4; ++n) part[m][n] = std::fma(a[m], b[n], part[m][n]);
      }
#pragma unroll
      for (int m = 0; m < 4; ++m)
#pragma unroll
        for (int n = 0; n < 4; ++n) sum[m][n] += part[m][n];
      __syncthreads();
    }

#pragma unroll
  for (int n = 0; n < 4; ++n) {
    const int to_column = first_column + column + n / 2 * (kPlainTile / 2) + n % 2;
    if (to_column >= p.out_features) continue;
    const scalar_t bias =
        p.bias && to_column < widest_out ? load_global(p.bias + tile.block * p.nw + to_column) : scalar_t(0);
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      const int64_t t = first_row + row + m / 2 * (kPlainTile / 2) + m % 2;
      if (t < p.T)
        store_global(p.y + (t * p.out_blocks + tile.block) * p.out_features + to_column,
                     to_column < outputs_of(p, t) ? sum[m][n] + bias : scalar_t(0));
    }
  }
}

// ---- launches
// ----------------------------------------------------------------------------------------------

template <class scalar_t>
unsigned grid_of(const ElasticLinearParams<scalar_t>& p, int rows, int columns) {
  return static_cast<unsigned>(tiles_over(p.T, rows) * p.out_blocks * tiles_over(p.out_features, columns));
}

template <class scalar_t>
bool is_aligned(const ElasticLinearParams<scalar_t>& p) {
  const auto bytes = [](int64_t elements) { return elements * static_cast<int64_t>(sizeof(scalar_t)); };
  const auto starts = [&](const scalar_t* data, int64_t stride, int64_t block) {
    return reinterpret_cast<uintptr_t>(data) % 16 == 0 && bytes(stride) % 16 == 0 &&
           (p.in_blocks == 1 || bytes(block) % 16 == 0);
  };
  return starts(p.x, p.x_stride, p.kx) && starts(p.weight, p.weight_stride, p.kw);
}

template <class scalar_t, int kRows, bool kAligned>
void run(const ElasticLinearParams<scalar_t>& p, CUstream_st* stream) {
  launch<elastic_linear_kernel<scalar_t, kRows, kAligned>>({.grid = dim3(grid_of(p, kRows, kColumns)),
                                                            .block = dim3(kThreads),
                                                            .stream = stream,
                                                            .dynamic_shared = sizeof(Shared<kRows>)},
                                                           p);
}

}  // namespace

template <class scalar_t>
void elastic_linear_cuda(const ElasticLinearParams<scalar_t>& p, CUstream_st* stream) {
  if (p.T == 0 || p.out_features == 0) return;
  if constexpr (sizeof(scalar_t) == 2) {
    if (!is_aligned(p)) return run<scalar_t, 64, false>(p, stream);
    elastic_linear_tile_rows(p.T) == 64 ? run<scalar_t, 64, true>(p, stream)
                                        : run<scalar_t, 128, true>(p, stream);
  } else {
    launch<elastic_linear_plain_kernel<scalar_t>>(
        {.grid = dim3(grid_of(p, kPlainTile, kPlainTile)), .block = dim3(kThreads), .stream = stream}, p);
  }
}

template void elastic_linear_cuda(const ElasticLinearParams<float>&, CUstream_st*);
template void elastic_linear_cuda(const ElasticLinearParams<double>&, CUstream_st*);
template void elastic_linear_cuda(const ElasticLinearParams<bf16>&, CUstream_st*);
template void elastic_linear_cuda(const ElasticLinearParams<fp16>&, CUstream_st*);

}  // namespace flextron
