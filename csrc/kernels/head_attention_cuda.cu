// head_attention on any GPU. Blocks of threads walk over the schedule's items, longest first: an item is a
// block of one sequence's queries for one head, and the keys that its latest query sees go past it.
//
// 16-bit types up to a head size of 128: tensor cores. A warp has 16 or 32 of the 128 queries, in registers
// with their results; keys and values come through shared memory, 64 at a time, the next while these are
// computed with. A warp leaves out keys that none of its queries sees. Everything else: plain arithmetic.
#include <algorithm>
#include <cmath>

#include "kernels/device/attention_tile.cuh"
#include "kernels/device/launch.cuh"
#include "kernels/head_attention_cuda.h"

namespace flextron {
namespace {

using attention::Query;

struct Item {
  CallSequence sequence;
  int64_t b, head, first;  // the block's first place among the sequence's queries
};

__device__ Item item_of(const AttentionCall& call, const AttentionSchedule& schedule, int64_t item,
                        int64_t rows) {
  const AttentionItemPlace place = item_at(schedule, item);
  const AttentionBlock& block = schedule.blocks[place.block];
  return {sequence_of(call, block.sequence), block.sequence, head_at(call, block.units, place.item),
          block.block * rows};
}

// A block of queries: found by one thread each, known to all.
template <int kRows>
struct Queries {
  int64_t t[kRows];
  int keys[kRows];

  __device__ __forceinline__ void find(const AttentionCall& call, const Item& item) {
    for (int i = threadIdx.x; i < kRows; i += blockDim.x) {
      const Query query = attention::query_at(call, item.sequence, item.b, item.head, item.first + i);
      t[i] = query.t;
      keys[i] = query.keys;
    }
  }

  // Of the `count` queries from `row` on; the whole warp asks.
  __device__ __forceinline__ int most_keys(int row, int count) const {
    int most = 0;
    for (int i = row + threadIdx.x % 32; i < row + count; i += 32) most = max(most, keys[i]);
    for (int distance = 16; distance > 0; distance /= 2)
      most = max(most, __shfl_xor_sync(~0u, most, distance));
    return most;
  }
  __device__ __forceinline__ int least_keys(int row, int count) const {
    int least = keys[row];
    for (int i = row + threadIdx.x % 32; i < row + count; i += 32) least = min(least, keys[i]);
    for (int distance = 16; distance > 0; distance /= 2)
      least = min(least, __shfl_xor_sync(~0u, least, distance));
    return least;
  }
};

template <class scalar_t>
__device__ __forceinline__ void write_lse(const HeadAttentionCall<scalar_t>& call, int64_t t, int64_t head,
                                          accumulate_t<scalar_t> lse) {
  if (call.lse) store_global(call.lse + t * call.H + head, lse);
}

// ---- tensor cores ----

constexpr int kRows = 128, kKeys = 64;

template <int kHead>
struct Shape {
  static constexpr int kSixteens = kHead == 64 ? 2 : 1;  // of queries, a warp
  static constexpr int kThreads = kRows / kSixteens / 16 * 32;
  static constexpr int kBlocks = kHead == 64 ? 2 : 1;  // of a multiprocessor
  using Tile = attention::Tile<kKeys, kHead>;
  struct Shared {
    Queries<kRows> queries;
    alignas(16) Tile k[2], v[2];
  };
};

// A warp's 16 queries.
template <int kHead>
struct Warp16 {
  Registers<Registers<uint32_t, 4>, kHead / 16> q;
  Registers<Registers<float, 4>, kHead / 8> out;
  attention::Softmax softmax;
};

template <class scalar_t, int kHead, bool kAligned>
__device__ void attend(const HeadAttentionCall<scalar_t>& call, const Item& item,
                       typename Shape<kHead>::Shared& shared) {
  using S = Shape<kHead>;
  constexpr int kSixteens = S::kSixteens, kEights = kKeys / 8;
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 * kSixteens;
  const int D = static_cast<int>(call.D);
  const CallSequence& s = item.sequence;
  const int64_t group = item.head / call.M;
  const scalar_t* const q = call.q + item.head * call.q_stride_h;

  shared.queries.find(call, item);
  __syncthreads();
  const int all_keys = shared.queries.most_keys(0, kRows);
  const int warp_keys = shared.queries.most_keys(row, 16 * kSixteens);
  const int least_keys = shared.queries.least_keys(row, 16 * kSixteens);

  Registers<Warp16<kHead>, kSixteens> mine;
#pragma unroll
  for (int m = 0; m < kSixteens; ++m) {
    Registers<const scalar_t*, 2> from;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int place = row + 16 * m + 8 * half + lane / 4;
      const int64_t t = shared.queries.t[place];
      from[half] = t < 0 ? nullptr : q + t * call.q_stride_t;
    }
#pragma unroll
    for (int step = 0; step < kHead / 16; ++step)
      attention::load_a<kAligned>(mine[m].q[step], from[0], from[1], step, D, lane);
    attention::clear(mine[m].out);
    mine[m].softmax.clear();
  }

  const auto load = [&](auto& tile, const KeyView<const scalar_t>& view, int begin) {
    attention::load_rows<kAligned, S::kThreads>(tile, D, [&](int r) -> const scalar_t* {
      if (begin + r >= all_keys) return nullptr;
      return view.data + key_offset(call, s, s.k_start + begin + r, view.page_stride, view.key_stride) +
             group * view.group_stride;
    });
  };
  const auto fetch = [&](int begin) {
    if (begin < all_keys) {
      const int stage = begin / kKeys % 2;
      load(shared.k[stage], call.k, begin);
      load(shared.v[stage], call.v, begin);
    }
    cp_async_commit();
  };

  const float scale = call.scale * 1.4426950408889634f;  // log2(e)
  fetch(0);
  for (int begin = 0; begin < all_keys; begin += kKeys) {
    cp_async_wait<0>();
    __syncthreads();  // these keys are there for all, and all have left those that are fetched over
    fetch(begin + kKeys);
    if (begin >= warp_keys) continue;
    const auto& k = shared.k[begin / kKeys % 2];
    const auto& v = shared.v[begin / kKeys % 2];

    Registers<Registers<Registers<float, 4>, kEights>, kSixteens> scores;
#pragma unroll
    for (int m = 0; m < kSixteens; ++m) attention::clear(scores[m]);
#pragma unroll
    for (int step = 0; step < kHead / 16; ++step)
#pragma unroll
      for (int n = 0; n < kEights; n += 2) {
        Registers<uint32_t, 4> b;
        attention::fragment_b(b, k, 8 * n, step, lane);
#pragma unroll
        for (int m = 0; m < kSixteens; ++m) {
          mma_m16n8k16<scalar_t>(scores[m][n], mine[m].q[step], b[0], b[1]);
          mma_m16n8k16<scalar_t>(scores[m][n + 1], mine[m].q[step], b[2], b[3]);
        }
      }

#pragma unroll
    for (int m = 0; m < kSixteens; ++m) {
#pragma unroll
      for (int n = 0; n < kEights; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) scores[m][n][i] *= scale;
      if (begin + kKeys > least_keys) {
        const int* const seen = &shared.queries.keys[row + 16 * m + lane / 4];
        const int from = begin + lane % 4 * 2, first = seen[0] - from, second = seen[8] - from;
#pragma unroll
        for (int n = 0; n < kEights; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i)
            if (8 * n + i % 2 >= (i < 2 ? first : second)) scores[m][n][i] = -INFINITY;
      }
      mine[m].softmax.step(scores[m], mine[m].out);
    }

#pragma unroll
    for (int step = 0; step < kKeys / 16; ++step) {
      Registers<Registers<uint32_t, 4>, kSixteens> p;
#pragma unroll
      for (int m = 0; m < kSixteens; ++m)
        p[m] = attention::as_a<scalar_t>(scores[m][2 * step], scores[m][2 * step + 1]);
#pragma unroll
      for (int n = 0; n < kHead / 8; n += 2) {
        Registers<uint32_t, 4> b;
        attention::fragment_b_transposed(b, v, 16 * step, n / 2, lane);
#pragma unroll
        for (int m = 0; m < kSixteens; ++m) {
          mma_m16n8k16<scalar_t>(mine[m].out[n], p[m], b[0], b[1]);
          mma_m16n8k16<scalar_t>(mine[m].out[n + 1], p[m], b[2], b[3]);
        }
      }
    }
  }

  const bool pairs = D % 2 == 0;
#pragma unroll
  for (int m = 0; m < kSixteens; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float sum = attention::sum_of_row(mine[m].softmax.sum[half]);
      const int64_t t = shared.queries.t[row + 16 * m + 8 * half + lane / 4];
      if (t < 0) continue;
      if (lane % 4 == 0)
        write_lse(call, t, item.head, mine[m].softmax.max[half] * 0.6931471805599453f + std::log(sum));
      const float inverse = sum == 0 ? 0 : 1 / sum;
      scalar_t* const out = call.out + (t * call.H + item.head) * D;
#pragma unroll
      for (int n = 0; n < kHead / 8; ++n) {
        const int column = 8 * n + lane % 4 * 2;
        const uint32_t both =
            pack<scalar_t>(mine[m].out[n][2 * half] * inverse, mine[m].out[n][2 * half + 1] * inverse);
        if (pairs && column < D) {
          store_global(reinterpret_cast<uint32_t*>(out + column), both);
        } else {
          auto* const to = reinterpret_cast<uint16_t*>(out + column);
          if (column < D) store_global(to, static_cast<uint16_t>(both));
          if (column + 1 < D) store_global(to + 1, static_cast<uint16_t>(both >> 16));
        }
      }
    }
}

// kAligned: every head of every row of q, k and v begins at a multiple of 16 bytes.
template <class scalar_t, int kHead, bool kAligned>
__global__ __launch_bounds__(Shape<kHead>::kThreads, Shape<kHead>::kBlocks) void head_attention_kernel(
    const HeadAttentionCall<scalar_t> call, const AttentionSchedule schedule) {
  auto& shared = dynamic_shared<typename Shape<kHead>::Shared>();
  const int64_t items = schedule.first[*schedule.count];
  for (int64_t i = blockIdx.x; i < items; i += gridDim.x) {
    attend<scalar_t, kHead, kAligned>(call, item_of(call, schedule, i, kRows), shared);
    __syncthreads();
  }
}

// ---- plain arithmetic ----

// 32 queries by 32 keys by 128 columns of the result; wider heads are as many items more, each with scores of
// its own. A thread has two queries, with two keys' scores and eight columns; 16 neighbouring threads share
// them.
constexpr int kPlainRows = 32, kPlainKeys = 32, kPlainColumns = 128, kPlainDepth = 16, kPlainThreads = 256;
constexpr int kPlainEights = kPlainColumns / 32;

template <class A>
struct alignas(2 * sizeof(A)) Two {
  A first, second;
};

template <class A>
__device__ __forceinline__ Two<A> two_of(const A* from) {
  return load_shared(reinterpret_cast<const Two<A>*>(from));
}

// Two words more than a line: a warp writes 16 of the depth of two rows into different banks.
template <class A>
struct PlainShared {
  Queries<kPlainRows> queries;
  alignas(16) A p[kPlainRows][kPlainKeys + 2];
  union {
    struct {
      A q[kPlainDepth][kPlainRows + 2], k[kPlainDepth][kPlainKeys + 2];
    };
    A v[kPlainKeys][kPlainColumns];
  };
};

template <class A, class scalar_t>
__device__ __forceinline__ A widened(const scalar_t* from) {
  return static_cast<A>(load_global(from));
}

// `value` of the 16 threads that share queries, combined by f.
template <class A, class F>
__device__ __forceinline__ A over_row(A value, const F& f) {
#pragma unroll
  for (int distance = 1; distance < 16; distance *= 2)
    value = f(value, __shfl_xor_sync(~0u, value, distance));
  return value;
}

template <class scalar_t, class A = accumulate_t<scalar_t>>
__device__ void attend_plainly(const HeadAttentionCall<scalar_t>& call, const Item& item,
                               int64_t first_column, PlainShared<A>& shared) {
  const int row = threadIdx.x / 16 * 2, two = threadIdx.x % 16 * 2;
  const CallSequence& s = item.sequence;
  const int64_t group = item.head / call.M;
  const scalar_t* const q = call.q + item.head * call.q_stride_h;
  const auto key_at = [&](const KeyView<const scalar_t>& view, int key) {
    return view.data + key_offset(call, s, s.k_start + key, view.page_stride, view.key_stride) +
           group * view.group_stride;
  };

  shared.queries.find(call, item);
  __syncthreads();
  const int all_keys = shared.queries.most_keys(0, kPlainRows);

  A out[2][kPlainEights][2] = {}, most[2], sum[2] = {};
  most[0] = most[1] = -INFINITY;
  for (int begin = 0; begin < all_keys; begin += kPlainKeys) {
    A scores[2][2] = {};
    for (int64_t depth = 0; depth < call.D; depth += kPlainDepth) {
      __syncthreads();
      const int64_t d = depth + threadIdx.x % kPlainDepth;
      for (int r = threadIdx.x / kPlainDepth; r < kPlainRows; r += kPlainThreads / kPlainDepth) {
        const int64_t t = shared.queries.t[r];
        store_shared(&shared.q[threadIdx.x % kPlainDepth][r],
                     t >= 0 && d < call.D ? widened<A>(q + t * call.q_stride_t + d) : A(0));
      }
      for (int r = threadIdx.x / kPlainDepth; r < kPlainKeys; r += kPlainThreads / kPlainDepth)
        store_shared(&shared.k[threadIdx.x % kPlainDepth][r],
                     begin + r < all_keys && d < call.D ? widened<A>(key_at(call.k, begin + r) + d) : A(0));
      __syncthreads();
      A part[2][2] = {};
#pragma unroll 8
      for (int i = 0; i < kPlainDepth; ++i) {
        const Two<A> a = two_of(&shared.q[i][row]), b = two_of(&shared.k[i][two]);
        part[0][0] = std::fma(a.first, b.first, part[0][0]);
        part[0][1] = std::fma(a.first, b.second, part[0][1]);
        part[1][0] = std::fma(a.second, b.first, part[1][0]);
        part[1][1] = std::fma(a.second, b.second, part[1][1]);
      }
#pragma unroll
      for (int r = 0; r < 2; ++r)
#pragma unroll
        for (int c = 0; c < 2; ++c) scores[r][c] += part[r][c];
    }

#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int seen = shared.queries.keys[row + r];
#pragma unroll
      for (int c = 0; c < 2; ++c)
        scores[r][c] = begin + two + c < seen ? scores[r][c] * call.scale : A(-INFINITY);
      const A here =
          over_row(std::fmax(scores[r][0], scores[r][1]), [](A a, A b) { return std::fmax(a, b); });
      const A now = std::fmax(most[r], here), base = now == A(-INFINITY) ? A(0) : now;
      const A shrink = std::exp(most[r] - base);
#pragma unroll
      for (int c = 0; c < 2; ++c) scores[r][c] = std::exp(scores[r][c] - base);
      sum[r] = sum[r] * shrink + over_row(scores[r][0] + scores[r][1], [](A a, A b) { return a + b; });
      most[r] = now;
#pragma unroll
      for (int n = 0; n < kPlainEights; ++n) out[r][n][0] *= shrink, out[r][n][1] *= shrink;
    }
    __syncthreads();  // all have read the keys that the values take the place of
#pragma unroll
    for (int r = 0; r < 2; ++r)
      store_shared(reinterpret_cast<Two<A>*>(&shared.p[row + r][two]), Two<A>{scores[r][0], scores[r][1]});
    for (int i = threadIdx.x; i < kPlainKeys * kPlainColumns; i += kPlainThreads) {
      const int key = i / kPlainColumns, column = i % kPlainColumns;
      const bool there = begin + key < all_keys && first_column + column < call.D;
      store_shared(&shared.v[key][column],
                   there ? widened<A>(key_at(call.v, begin + key) + first_column + column) : A(0));
    }
    __syncthreads();
    A part[2][kPlainEights][2] = {};
#pragma unroll 2
    for (int key = 0; key < kPlainKeys; key += 2) {
      const Two<A> top = two_of(&shared.p[row][key]), bottom = two_of(&shared.p[row + 1][key]);
#pragma unroll
      for (int n = 0; n < kPlainEights; ++n) {
        const Two<A> v = two_of(&shared.v[key][32 * n + two]), w = two_of(&shared.v[key + 1][32 * n + two]);
        part[0][n][0] = std::fma(top.second, w.first, std::fma(top.first, v.first, part[0][n][0]));
        part[0][n][1] = std::fma(top.second, w.second, std::fma(top.first, v.second, part[0][n][1]));
        part[1][n][0] = std::fma(bottom.second, w.first, std::fma(bottom.first, v.first, part[1][n][0]));
        part[1][n][1] = std::fma(bottom.second, w.second, std::fma(bottom.first, v.second, part[1][n][1]));
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
      for (int n = 0; n < kPlainEights; ++n)
#pragma unroll
        for (int c = 0; c < 2; ++c) out[r][n][c] += part[r][n][c];
  }

#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int64_t t = shared.queries.t[row + r];
    if (t < 0) continue;
    if (two == 0 && first_column == 0) write_lse(call, t, item.head, most[r] + std::log(sum[r]));
    scalar_t* const to = call.out + (t * call.H + item.head) * call.D;
#pragma unroll
    for (int n = 0; n < kPlainEights; ++n)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int64_t column = first_column + 32 * n + two + c;
        if (column < call.D) store_global(to + column, scalar_t(sum[r] == 0 ? A(0) : out[r][n][c] / sum[r]));
      }
  }
}

template <class scalar_t>
__global__ __launch_bounds__(kPlainThreads, sizeof(scalar_t) == 8 ? 1 : 2) void head_attention_plain_kernel(
    const HeadAttentionCall<scalar_t> call, const AttentionSchedule schedule, int64_t parts) {
  auto& shared = static_shared<PlainShared<accumulate_t<scalar_t>>>();
  const int64_t items = schedule.first[*schedule.count] * parts;
  for (int64_t i = blockIdx.x; i < items; i += gridDim.x) {
    attend_plainly(call, item_of(call, schedule, i / parts, kPlainRows), i % parts * kPlainColumns, shared);
    __syncthreads();
  }
}

// ---- launches ----

template <class scalar_t>
constexpr bool kTensorCores = sizeof(scalar_t) == 2;

template <class scalar_t>
bool aligned(const HeadAttentionCall<scalar_t>& call) {
  const auto whole = [](const void* data, std::initializer_list<int64_t> strides) {
    return reinterpret_cast<uintptr_t>(data) % 16 == 0 &&
           std::all_of(strides.begin(), strides.end(), [](int64_t stride) { return stride % 8 == 0; });
  };
  const auto view = [&](const auto& keys) {
    return whole(keys.data, {keys.page_stride, keys.key_stride, keys.group_stride});
  };
  return whole(call.q, {call.q_stride_t, call.q_stride_h}) && view(call.k) && view(call.v);
}

// Blocks beyond the items leave at once; a long list is walked over.
dim3 grid_of(const AttentionCall& call, int64_t rows, int64_t parts) {
  constexpr int64_t kWaves = 64;
  const int64_t most = most_blocks(call.B, call.T, rows) * heads_of(call, call.heads) * parts;
  return dim3(static_cast<unsigned>(std::min(most, kWaves * multiprocessors())));
}

template <class scalar_t, int kHead, bool kAligned>
void run(const HeadAttentionCall<scalar_t>& call, const AttentionSchedule& schedule, CUstream_st* stream) {
  using S = Shape<kHead>;
  launch<head_attention_kernel<scalar_t, kHead, kAligned>>({.grid = grid_of(call, kRows, 1),
                                                            .block = dim3(S::kThreads),
                                                            .stream = stream,
                                                            .dynamic_shared = sizeof(typename S::Shared)},
                                                           call, schedule);
}

}  // namespace

template <class scalar_t>
int64_t head_attention_rows(const HeadAttentionCall<scalar_t>& call) {
  return kTensorCores<scalar_t> && call.D <= attention::kMostHead ? kRows : kPlainRows;
}

template <class scalar_t>
void head_attention_cuda(const HeadAttentionCall<scalar_t>& call, const AttentionSchedule& queries,
                         CUstream_st* stream) {
  if (call.T == 0 || call.heads == 0) return;
  if constexpr (kTensorCores<scalar_t>) {
    if (call.D <= attention::kMostHead)
      return dispatch_int(attention::HeadSizes{}, "head_attention", "head size", attention::tile_head(call.D),
                          [&](auto head) {
                            aligned(call) ? run<scalar_t, head, true>(call, queries, stream)
                                          : run<scalar_t, head, false>(call, queries, stream);
                          });
  }
  const int64_t parts = (call.D + kPlainColumns - 1) / kPlainColumns;
  launch<head_attention_plain_kernel<scalar_t>>(
      {.grid = grid_of(call, kPlainRows, parts), .block = dim3(kPlainThreads), .stream = stream}, call,
      queries, parts);
}

#define FLEXTRON_HEAD_ATTENTION(scalar_t)                                                         \
  template int64_t head_attention_rows(const HeadAttentionCall<scalar_t>&);                       \
  template void head_attention_cuda(const HeadAttentionCall<scalar_t>&, const AttentionSchedule&, \
                                    CUstream_st*);
FLEXTRON_HEAD_ATTENTION(float)
FLEXTRON_HEAD_ATTENTION(double)
FLEXTRON_HEAD_ATTENTION(bf16)
FLEXTRON_HEAD_ATTENTION(fp16)

}  // namespace flextron
