// One block's tile of a product of two 16-bit matrices, kRows x kColumns, by the tensor cores: C[m, n] +=
// A[m, k] B[n, k]. The operands go through shared memory in a ring of kStages stages of kDepth each; any GPU
// of sm_80 and up.
//
// An operand lies in memory in lines of neighbouring elements, and a view says which of them count:
//
//   static constexpr bool kDeep         lines run along the depth, and line l is row l of the tile; else they
//   run along
//                                       the tile's side, and line l is at depth l
//   void enter(int part)                from here on line() speaks of this part of the depth: 0, then 1, ...
//   const scalar_t* line(int l) const   where a line begins
//   int count(int l) const              how many of its elements count, from its beginning; the others are
//   zeros, and
//                                       nothing is read of them. Where lines run along the depth, the same in
//                                       all parts
//
// All products of an element of C are added in the order of the depth, whatever the tile, and what does not
// count enters as zeros: an element does not depend on the others of its tile.
#pragma once

#include "kernels/device/copy.cuh"
#include "kernels/device/mma.cuh"

namespace flextron::tiles {

// Eight warps, two by four, each with kRows / 2 x 32 of the tile: 64 sums a thread where kRows is 128.
constexpr int kThreads = 256;
constexpr int kColumns = 128;
constexpr int kWarpColumns = 32;
constexpr int kDepth = 32;  // of a stage
constexpr int kStages = 4;  // 64 KiB: two blocks still share a multiprocessor of 164 KiB
constexpr int kEights = kWarpColumns / 8;

// Where 16-byte piece `piece` of a line of kPieces lies: pieces that one access reads together, eight lines'
// at one place or a line's eight, differ in their banks.
template <int kPieces>
__device__ __forceinline__ int place(int line, int piece) {
  constexpr int kLinesPerTurn = kPieces < 8 ? 8 / kPieces : 1, kTurns = kPieces < 8 ? kPieces : 8;
  return line * kPieces + (piece ^ (line / kLinesPerTurn % kTurns));
}

template <int kRows>
union Shared {
  struct {
    uint4 a[kRows * kDepth / 8], b[kColumns * kDepth / 8];
  } ring[kStages];
  uint4 out[kRows * kColumns / 8];
};

template <int kRows>
using Sums = Registers<Registers<Registers<float, 4>, kEights>, kRows / 2 / 16>;

// A thread's place: its warp's part of the tile begins at (row, column).
template <int kRows>
struct Place {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int row = warp / 4 * (kRows / 2), column = warp % 4 * kWarpColumns;
};

template <bool kAligned, class scalar_t>
__device__ __forceinline__ void copy(uint4* to, const scalar_t* from, int count) {
  count = min(max(count, 0), 8);
  if constexpr (kAligned)
    cp_async_16(to, from, count * static_cast<int>(sizeof(scalar_t)));
  else
    store_shared(to, gathered(from, count));
}

// A thread's share of one operand's stages: the same piece of every kLines-th line.
template <class View, int kSide, bool kDeep = View::kDeep>
struct Loader {
  using scalar_t = typename View::scalar_t;
  static constexpr int kPieces = (kDeep ? kDepth : kSide) / 8;
  static constexpr int kLines = kThreads / kPieces;
  static constexpr int kShare = (kDeep ? kSide : kDepth) / kLines;

  View view;
  Registers<const scalar_t*, kShare> source;  // the piece in the part's first stage
  Registers<int, kShare> limit;               // elements that count from there on

  __device__ __forceinline__ explicit Loader(const View& view_) : view(view_) {
    if constexpr (kDeep)
#pragma unroll
      for (int share = 0; share < kShare; ++share) limit[share] = view.count(line(share)) - 8 * piece();
  }

  static __device__ __forceinline__ int line(int share) { return threadIdx.x / kPieces + share * kLines; }
  static __device__ __forceinline__ int piece() { return threadIdx.x % kPieces; }

  __device__ __forceinline__ void enter(int part) {
    view.enter(part);
    if constexpr (kDeep)
#pragma unroll
      for (int share = 0; share < kShare; ++share) source[share] = view.line(line(share)) + 8 * piece();
  }

  // The stage that begins at this depth of the part.
  template <bool kAligned>
  __device__ __forceinline__ void load(uint4* stage, int depth) const {
#pragma unroll
    for (int share = 0; share < kShare; ++share) {
      uint4* const to = stage + place<kPieces>(line(share), piece());
      if constexpr (kDeep) {
        copy<kAligned>(to, source[share] + depth, limit[share] - depth);
      } else {
        const int l = depth + line(share);
        copy<kAligned>(to, view.line(l) + 8 * piece(), view.count(l) - 8 * piece());
      }
    }
  }
};

// 16 of the side from `at` on by 16 of the depth from 8 * `piece` on, as mma takes its A; for its B, two
// times 8 of the side.
template <bool kDeep, int kSide>
__device__ __forceinline__ void fragment_a(Registers<uint32_t, 4>& a, const uint4* stage, int at, int piece,
                                           int lane) {
  if constexpr (kDeep)
    ldmatrix_x4(a, &stage[place<kDepth / 8>(at + lane % 16, piece + lane / 16)]);
  else
    ldmatrix_x4_trans(a,
                      &stage[place<kSide / 8>(8 * piece + lane / 16 * 8 + lane % 8, at / 8 + lane / 8 % 2)]);
}
template <bool kDeep, int kSide>
__device__ __forceinline__ void fragment_b(Registers<uint32_t, 4>& b, const uint4* stage, int at, int piece,
                                           int lane) {
  if constexpr (kDeep)
    ldmatrix_x4(b, &stage[place<kDepth / 8>(at + lane / 16 * 8 + lane % 8, piece + lane / 8 % 2)]);
  else
    ldmatrix_x4_trans(b,
                      &stage[place<kSide / 8>(8 * piece + lane / 8 % 2 * 8 + lane % 8, at / 8 + lane / 16)]);
}

// The products over `parts` times `depth`. kAligned: every line begins at a multiple of 16 bytes. Shared
// memory is free to all afterwards.
template <bool kAligned, int kRows, class A, class B>
__device__ __forceinline__ void multiply(Shared<kRows>& shared, const A& a_view, const B& b_view, int parts,
                                         int depth, Sums<kRows>& sum) {
  using scalar_t = typename A::scalar_t;
  constexpr int kSixteens = Sums<kRows>::kCount;
  const Place<kRows> me;
  Loader<A, kRows> a_loader(a_view);
  Loader<B, kColumns> b_loader(b_view);
  const int steps = (depth + kDepth - 1) / kDepth * parts;

  int fetched = 0, part = -1, at = depth;
  const auto fetch = [&] {
    if (fetched < steps) {
      if (at >= depth) {
        at = 0;
        ++part;
        a_loader.enter(part);
        b_loader.enter(part);
      }
      auto& stage = shared.ring[fetched % kStages];
      a_loader.template load<kAligned>(stage.a, at);
      b_loader.template load<kAligned>(stage.b, at);
      at += kDepth;
      ++fetched;
    }
    cp_async_commit();
  };

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
    for (int piece = 0; piece < kDepth / 8; piece += 2) {
      Registers<Registers<uint32_t, 4>, kSixteens> a;
      Registers<Registers<uint32_t, 4>, kEights / 2> b;
#pragma unroll
      for (int m = 0; m < kSixteens; ++m)
        fragment_a<A::kDeep, kRows>(a[m], stage.a, me.row + 16 * m, piece, me.lane);
#pragma unroll
      for (int n = 0; n < kEights / 2; ++n)
        fragment_b<B::kDeep, kColumns>(b[n], stage.b, me.column + 16 * n, piece, me.lane);
#pragma unroll
      for (int m = 0; m < kSixteens; ++m)
#pragma unroll
        for (int n = 0; n < kEights; ++n)
          mma_m16n8k16<scalar_t>(sum[m][n], a[m], b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
    }
  }
  __syncthreads();
}

// Rounds a thread's sums, neighbours in a row two by two, into the tile that store() takes, kWidth wide. Of
// the warp's part, kOwn columns from `column` on are written: values(m, n, half) are those of row 16 m + 8
// half + lane / 4, columns 8 n + lane % 4 * 2 and the next.
template <class scalar_t, int kWidth, int kOwn, int kRows, class Values>
__device__ __forceinline__ void put(Shared<kRows>& shared, int column, const Values& values) {
  const Place<kRows> me;
#pragma unroll
  for (int n = 0; n < kOwn / 8; ++n)
#pragma unroll
    for (int m = 0; m < Sums<kRows>::kCount; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint4* const to =
            &shared.out[place<kWidth / 8>(me.row + 16 * m + 8 * half + me.lane / 4, column / 8 + n)];
        const float2 both = values(m, n, half);
        store_shared(reinterpret_cast<uint32_t*>(to) + me.lane % 4, pack<scalar_t>(both.x, both.y));
      }
}

// Where a tile goes:
//   scalar_t* row(int m) const   its row m; null where there is none
//   int width                    columns that there are from the tile's first on
//   int kept(int m) const        columns that are written as they are; zeros from there to the width
//   bool pieces                  every row and the width are whole pieces of 16 bytes
template <int kWidth, int kRows, class Out>
__device__ __forceinline__ void store(const Shared<kRows>& shared, const Out& out) {
  constexpr int kPieces = kWidth / 8;
  for (int i = threadIdx.x; i < kRows * kPieces; i += kThreads) {
    const int m = i / kPieces, column = i % kPieces * 8;
    auto* const row = out.row(m);
    if (row == nullptr || column >= out.width) continue;
    const uint4 piece = load_shared(&shared.out[place<kPieces>(m, i % kPieces)]);
    const int kept = out.kept(m) - column;
    Registers<uint32_t, 4> words{{piece.x, piece.y, piece.z, piece.w}};
#pragma unroll
    for (int j = 0; j < 4; ++j) words[j] = 2 * j + 1 < kept ? words[j] : 2 * j < kept ? words[j] & 0xffff : 0;
    if (out.pieces) {
      store_global(reinterpret_cast<uint4*>(row + column),
                   make_uint4(words[0], words[1], words[2], words[3]));
      continue;
    }
#pragma unroll
    for (int j = 0; j < 8; ++j)
      if (column + j < out.width)
        store_global(reinterpret_cast<uint16_t*>(row + column) + j,
                     static_cast<uint16_t>(words[j / 2] >> (j % 2 * 16)));
  }
}

// The whole tile: products, plus bias(n) in column n, rounded and stored.
template <bool kAligned, int kRows, class A, class B, class Bias, class Out>
__device__ __forceinline__ void compute(Shared<kRows>& shared, const A& a, const B& b, int parts, int depth,
                                        const Bias& bias, const Out& out) {
  using scalar_t = typename A::scalar_t;
  Sums<kRows> sum;
  multiply<kAligned>(shared, a, b, parts, depth, sum);
  const Place<kRows> me;
  Registers<float2, kEights> biases;
#pragma unroll
  for (int n = 0; n < kEights; ++n) {
    const int column = me.column + 8 * n + me.lane % 4 * 2;
    biases[n] = make_float2(bias(column), bias(column + 1));
  }
  put<scalar_t, kColumns, kWarpColumns>(shared, me.column, [&](int m, int n, int half) {
    return make_float2(sum[m][n][2 * half] + biases[n].x, sum[m][n][2 * half + 1] + biases[n].y);
  });
  __syncthreads();
  store<kColumns>(shared, out);
}

}  // namespace flextron::tiles
