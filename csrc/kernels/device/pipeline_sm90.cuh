// A GEMM on Hopper without its operands and its epilogue. elastic_linear and the hidden layer of elastic_mlp
// share it.
//
// A block has three warpgroups. One thread of the first is the producer: it fills a ring of stages with tiles
// of A and B, kDepth features deep, through TMA. The other two are the consumers: each multiplies what is in
// the ring into its registers, and hands its part of the result to TMA through shared memory. Stores of one
// tile and loads for later ones go on while the next tile is computed.
//
// A tile has 128 rows, 64 for each consumer, or 64 rows, of which each consumer has half of the columns. The
// lines of an operand run along the depth, or along its side (Major::kMN). In the second case a stage holds
// boxes of 64 of the side, one after the other, each kDepth lines deep.
#pragma once

#include <algorithm>
#include <type_traits>

#include "kernels/device/copy.cuh"
#include "kernels/device/launch.cuh"
#include "kernels/device/mma.cuh"
#include "kernels/device/sync.cuh"
#include "kernels/device/tensor_map.h"
#include "kernels/device/tma.cuh"
#include "kernels/device/wgmma.cuh"

namespace flextron::pipeline {

constexpr int kWarpgroup = 128, kConsumers = 2 * kWarpgroup, kThreads = 3 * kWarpgroup;
constexpr int kProducerRegisters = 40,
              kConsumerRegisters = 232;           // 168 a thread in all, what a block is given
constexpr int kConsumerRows = 64;                 // of wgmma
constexpr int kDepth = 64;                        // elements of a line of A and B
constexpr int kLine = 128, kPieces = kLine / 16;  // its bytes, the width of the swizzle
constexpr int kEightLines = 8 * kLine;

// Barriers of each consumer, and of both.
constexpr int kBarrierOfConsumer = 1, kBarrierOfConsumers = 3;

// A tile's rows, the rows of B that it is multiplied with, and how many of these make one column of the
// result.
template <class scalar, int rows, int columns, int columns_of_output, Major major_a = Major::kK,
          Major major_b = Major::kK>
struct Shape {
  static_assert((rows == 128 || rows == 64) && (columns_of_output == 1 || columns_of_output == 2));
  using scalar_t = scalar;
  static constexpr Major kMajorA = major_a, kMajorB = major_b;
  static constexpr int kRows = rows, kColumns = columns, kOutputs = columns / columns_of_output;
  static constexpr int kAcross = 128 / rows;  // consumers side by side
  static constexpr int kOwnColumns = columns / kAcross, kOwnOutputs = kOutputs / kAcross;  // of a consumer
  static constexpr int kSums = kOwnColumns * kConsumerRows / kWarpgroup;                   // of a thread
  static constexpr int kBiases = (kOwnColumns + kWarpgroup - 1) / kWarpgroup;  // that a thread brings
  static constexpr int kPart = std::min(kOwnOutputs, 64);                      // outputs stored at once
  static constexpr int kOutBuffers = std::min(kOwnOutputs / kPart, 2);         // one fills as one drains
  static constexpr int kPartValues = kPart * kConsumerRows / kWarpgroup;       // of them, a thread's
  static constexpr Swizzle kStoreSwizzle = kPart == 64 ? Swizzle::k128 : Swizzle::k64;
  static constexpr int kStages = 192 * 1024 / ((rows + columns) * kLine);
};

// Tiles come first: each is a multiple of 1024 bytes, and so is its address.
template <class S>
struct Shared {
  using scalar_t = typename S::scalar_t;
  scalar_t a[S::kStages][S::kRows][kDepth];
  scalar_t b[S::kStages][S::kColumns][kDepth];
  scalar_t out[2][S::kOutBuffers][kConsumerRows][S::kPart];
  float bias[2][S::kOwnColumns];
  Mbarrier full[S::kStages], empty[S::kStages];
};

// The stage a role has come to, and the parity of that stage's phase.
template <class S>
struct Ring {
  int stage = 0;
  unsigned parity = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == S::kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// What a thread is among the consumers, and what of a tile is its.
template <class S>
struct Consumer {
  const int thread = static_cast<int>(threadIdx.x) - kWarpgroup;
  const int index = thread / kWarpgroup, member = thread % kWarpgroup, lane = thread % 32;
  const int row = S::kAcross == 1 ? index * kConsumerRows : 0;  // its consumer's first of the tile, and below
  const int column = S::kAcross == 1 ? 0 : index * S::kOwnColumns;
  const int output = S::kAcross == 1 ? 0 : index * S::kOwnOutputs;
  const int upper_row = row + member / 32 * 16 + lane / 4;  // of the tile; its other row is 8 below
  // Where its sum (or value of a part) i lies: columns of eight are four sums, two of each row.
  __device__ __forceinline__ int column_of(int i) const { return i / 4 * 8 + lane % 4 * 2 + i % 2; }
  __device__ __forceinline__ static int row_of(int i) { return i / 2 % 2; }  // 0: upper_row, 1: the other
};

// Barriers of the ring, by one thread; then all meet.
template <class S>
__device__ __forceinline__ void start(Shared<S>& shared) {
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < S::kStages; ++stage) {
      mbarrier_init(shared.full[stage], 1);
      mbarrier_init(shared.empty[stage], kConsumers / 32);
    }
    fence_mbarrier_init();
  }
  __syncthreads();
}

// The producer. `loads` walks over the stages of all tiles: next() goes to the next, load_a(tile, barrier)
// and load_b(tile, barrier) ask for both tiles of it. Only A may come from the launch ahead: the ring's first
// round of B is asked for before that has ended.
template <class S, class Loads>
__device__ __forceinline__ void produce(Shared<S>& shared, Loads loads) {
  constexpr int kBytes = sizeof(shared.a[0]) + sizeof(shared.b[0]);
  Loads early = loads;
  for (int stage = 0; stage < S::kStages && early.next(); ++stage) {
    mbarrier_arrive_expect(shared.full[stage], kBytes);
    early.load_b(shared.b[stage], shared.full[stage]);
  }
  grid_dependency_wait();
  Ring<S> ring;
  for (bool first_round = true; loads.next();) {
    Mbarrier& full = shared.full[ring.stage];
    if (!first_round) {
      mbarrier_wait(shared.empty[ring.stage], ring.parity ^ 1);
      mbarrier_arrive_expect(full, kBytes);
      loads.load_b(shared.b[ring.stage], full);
    }
    loads.load_a(shared.a[ring.stage], full);
    ring.advance();
    first_round &= ring.parity == 0;
  }
  grid_launch_dependents();
}

// Two elements of `word`, of which `kept` stay and the others become zeros.
__device__ __forceinline__ uint32_t first_of_two(uint32_t word, int kept) {
  return kept >= 2 ? word : kept == 1 ? word & 0xffff : 0;
}

// Zeros behind the first `kept(row)` elements of every one of `rows` rows. Each of `threads` threads owns a
// 16-byte piece of every (threads / 8)-th row.
template <int threads, class scalar_t, class Kept>
__device__ __forceinline__ void clear_behind(scalar_t (*tile)[kDepth], int rows, int thread, Kept kept) {
  const int piece = thread % kPieces;
  for (int row = thread / kPieces; row < rows; row += threads / kPieces) {
    const int left = kept(row) - 8 * piece;
    if (left >= 8) continue;
    char* const at = reinterpret_cast<char*>(tile) + swizzled(row * kLine + piece * 16, Swizzle::k128);
    uint4 words = load_shared(reinterpret_cast<uint4*>(at));
    words.x = first_of_two(words.x, left);
    words.y = first_of_two(words.y, left - 2);
    words.z = first_of_two(words.z, left - 4);
    words.w = first_of_two(words.w, left - 6);
    store_shared(reinterpret_cast<uint4*>(at), words);
  }
}

// The same of a whole tile, by the consumers.
template <class scalar_t, int rows, class Kept>
__device__ __forceinline__ void clear_behind(scalar_t (&tile)[rows][kDepth], int thread, Kept kept) {
  clear_behind<kConsumers>(tile, rows, thread, kept);
}

// The same of a tile whose lines run along the side: of line l, what is behind the first `kept(l)` elements.
template <class scalar_t, int side, class Kept>
__device__ __forceinline__ void clear_behind_of_side(scalar_t (&tile)[side][kDepth], int thread, Kept kept) {
  clear_behind(tile, thread, [&](int row) { return kept(row % kDepth) - row / kDepth * kDepth; });
}

// A tile whose lines run along the side, from (side, block, depth) on: a box of 64 after the other.
template <class scalar_t, int side>
__device__ __forceinline__ void load_side(scalar_t (&to)[side][kDepth], const TensorMap& map, Mbarrier& full,
                                          int first, int block, int depth) {
#pragma unroll
  for (int i = 0; i < side; i += kDepth) tma_load_3d(to[i], map, full, first + i, block, depth);
}

// A descriptor of the operand that begins there, and how far 16 of the depth lie from the next.
template <Major major>
__device__ __forceinline__ uint64_t operand(const void* tile) {
  return wgmma_descriptor(tile, Swizzle::k128, major == Major::kK ? 16 : kDepth * kLine, kEightLines);
}
template <Major major>
constexpr uint32_t kSixteenDeep = major == Major::kK ? 32 : 16 * kLine;

// The consumers' meeting after clear_behind, before the tensor cores read.
__device__ __forceinline__ void show_cleared() {
  fence_proxy_async();
  named_barrier_sync(kBarrierOfConsumers, kConsumers);
}

// sum = the consumer's part of A B^T over the ring's next `steps` stages. prepare(stage) may change a stage
// before it is read. Every warp gives a stage back by itself, when the products behind it have left it: one
// group of products is always under way.
template <class S, class Prepare>
__device__ __forceinline__ void multiply(Shared<S>& shared, const Consumer<S>& me, int steps, Ring<S>& ring,
                                         Registers<float, S::kSums>& sum, Prepare prepare) {
#pragma unroll
  for (int i = 0; i < S::kSums; ++i) sum[i] = 0;
  if (steps == 0) return;
  hold(sum);
  int previous = 0;
  for (int step = 0; step < steps; ++step) {
    mbarrier_wait(shared.full[ring.stage], ring.parity);
    prepare(ring.stage);
    const uint64_t a = operand<S::kMajorA>(shared.a[ring.stage][me.row]);
    const uint64_t b = operand<S::kMajorB>(shared.b[ring.stage][me.column]);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kDepth / 16; ++k)
      wgmma<typename S::scalar_t, S::kOwnColumns, S::kMajorA, S::kMajorB>(
          sum, wgmma_advance(a, k * kSixteenDeep<S::kMajorA>), wgmma_advance(b, k * kSixteenDeep<S::kMajorB>),
          1);
    wgmma_commit();
    wgmma_wait<1>();
    if (step > 0 && me.lane == 0) mbarrier_arrive(shared.empty[previous]);
    previous = ring.stage;
    ring.advance();
  }
  wgmma_wait<0>();
  hold(sum);
  if (me.lane == 0) mbarrier_arrive(shared.empty[previous]);
}

// A thread's biases of a tile, asked for before the products and used after them; bias(column) is of the
// consumer's.
template <class S, class Bias>
__device__ __forceinline__ Registers<float, S::kBiases> biases_of(const Consumer<S>& me, Bias bias) {
  Registers<float, S::kBiases> own;
#pragma unroll
  for (int i = 0; i < S::kBiases; ++i) {
    const int column = i * kWarpgroup + me.member;
    own[i] = column < S::kOwnColumns ? bias(column) : 0.0f;
  }
  return own;
}

// Puts them where bias_of finds them, before store(): its first barrier shows them.
template <class S>
__device__ __forceinline__ void put_biases(Shared<S>& shared, const Consumer<S>& me,
                                           const Registers<float, S::kBiases>& biases) {
#pragma unroll
  for (int i = 0; i < S::kBiases; ++i)
    if (const int c = i * kWarpgroup + me.member; c < S::kOwnColumns)
      store_shared(&shared.bias[me.index][c], biases[i]);
}

// Of sum i, a multiple of 4, and of the next: the biases of both columns, while store() computes.
template <class S>
__device__ __forceinline__ float2 bias_of(const Shared<S>& shared, const Consumer<S>& me, int i) {
  return load_shared(reinterpret_cast<const float2*>(&shared.bias[me.index][me.column_of(i)]));
}

// The consumer's part of the tile at (row, block, column) of the result, rounded, S::kPart columns at a time:
// compute(part, values) gives a thread's values of those, in the order of its sums.
template <class S, class Compute>
__device__ __forceinline__ void store(Shared<S>& shared, const Consumer<S>& me, const TensorMap& result,
                                      int row, int block, int column, Compute compute) {
  using scalar_t = typename S::scalar_t;
  // Where this lane's row of an 8 x 8 block lies: blocks 0 and 1 are the upper and lower rows, 2 and 3 the
  // same of the next 8 columns.
  const int line = me.member / 32 * 16 + me.lane / 8 % 2 * 8 + me.lane % 8, piece = me.lane / 16;
  constexpr int kLineBytes = S::kPart * sizeof(scalar_t);

#pragma unroll
  for (int part = 0; part < S::kOwnOutputs / S::kPart; ++part) {
    auto& out = shared.out[me.index][part % S::kOutBuffers];
    if (me.member == 0) tma_store_wait_read<S::kOutBuffers - 1>();
    named_barrier_sync(kBarrierOfConsumer + me.index, kWarpgroup);
    Registers<float, S::kPartValues> values;
    compute(part, values);
#pragma unroll
    for (int sixteen = 0; sixteen < S::kPart / 16; ++sixteen) {
      Registers<uint32_t, 4> blocks;
#pragma unroll
      for (int i = 0; i < 4; ++i)
        blocks[i] = pack<scalar_t>(values[8 * sixteen + 2 * i], values[8 * sixteen + 2 * i + 1]);
      stmatrix_x4(reinterpret_cast<char*>(out) +
                      swizzled(line * kLineBytes + (2 * sixteen + piece) * 16, S::kStoreSwizzle),
                  blocks);
    }
    fence_proxy_async();
    named_barrier_sync(kBarrierOfConsumer + me.index, kWarpgroup);
    if (me.member == 0) {
      tma_store_3d(result, out, column + me.output + part * S::kPart, block, row + me.row);
      tma_store_commit();
    }
  }
}

// ---- on the host ----

// Rows of `blocks` blocks of `features`; boxes of `box_features` of a block by `box_rows`.
template <class scalar_t>
TensorMap tensor_map(const scalar_t* data, int64_t features, int64_t blocks, int64_t rows,
                     int64_t block_stride, int64_t row_stride, int box_features, int box_rows,
                     Swizzle swizzle) {
  const auto bytes = [](int64_t elements) { return static_cast<uint64_t>(elements) * sizeof(scalar_t); };
  return make_tensor_map<3>(
      {.data = data,
       .size = {static_cast<uint64_t>(features), static_cast<uint64_t>(blocks), static_cast<uint64_t>(rows)},
       .stride = {bytes(blocks > 1 ? block_stride : row_stride), bytes(row_stride)},
       .box = {static_cast<uint32_t>(box_features), 1, static_cast<uint32_t>(box_rows)},
       .swizzle = swizzle},
      std::is_same_v<scalar_t, bf16>);
}
// Of A or B, of one whose lines run along its side, and of a result.
template <class scalar_t>
TensorMap operand_map(const scalar_t* data, int64_t features, int64_t blocks, int64_t rows,
                      int64_t block_stride, int64_t row_stride, int box_rows) {
  return tensor_map(data, features, blocks, rows, block_stride, row_stride, kDepth, box_rows, Swizzle::k128);
}
template <class scalar_t>
TensorMap side_map(const scalar_t* data, int64_t features, int64_t blocks, int64_t rows, int64_t block_stride,
                   int64_t row_stride) {
  return tensor_map(data, features, blocks, rows, block_stride, row_stride, kDepth, kDepth, Swizzle::k128);
}
template <class S>
TensorMap result_map(const typename S::scalar_t* data, int64_t features, int64_t blocks, int64_t rows) {
  return tensor_map(data, features, blocks, rows, features, blocks * features, S::kPart, kConsumerRows,
                    S::kStoreSwizzle);
}

// What TMA requires of an operand, and of numbers that become its coordinates.
template <class scalar_t>
bool address_fits(const scalar_t* data) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0;
}
template <class scalar_t>
bool stride_fits(int64_t elements) {
  return elements > 0 && elements % (16 / sizeof(scalar_t)) == 0;
}
inline bool size_fits(int64_t elements) {
  constexpr int64_t kMost = INT32_MAX / 2;  // a coordinate and a tile more stay within an int
  return elements > 0 && elements <= kMost;
}

// A block per multiprocessor, or per tile where those are fewer. `dependent`: may start before the launch
// ahead ends.
template <class S, auto kernel, class Params>
void launch_blocks(int64_t tiles, const Params& params, CUstream_st* stream, bool dependent = false) {
  static_assert(sizeof(Shared<S>) <= 227 * 1024);  // what a block may have
  launch<kernel>({.grid = dim3(static_cast<unsigned>(std::min<int64_t>(tiles, multiprocessors()))),
                  .block = dim3(kThreads),
                  .stream = stream,
                  .dynamic_shared = sizeof(Shared<S>),
                  .programmatic = dependent},
                 params);
}

}  // namespace flextron::pipeline
