// The gradients of head_attention on any GPU, for float, double and 16-bit types with a larger D. Smaller
// heads go to the tensor cores (head_attention_backward_pairs.cuh).
#include <cmath>

#include "kernels/head_attention_backward_pairs.cuh"

namespace flextron {
namespace {

using namespace attention;

// 32 own rows by 32 that pass, by 256 threads: a thread has rows y and y + 16, columns x and x + 16 of the
// scores, and every 16th column of the sums from x on. The elements of D go through shared memory 32 at a
// time; of the results a block has `width` elements of D at most, the others are other blocks' (blockIdx.y).
constexpr int kPlainRows = 32;
constexpr int kPlainThreads = 256;

template <class real>
struct PlainShared {
  static constexpr int kWidth = sizeof(real) == 8 ? 64 : 128;
  using Chunk = real[32][kPlainRows + 1];  // [element][row]
  // A warp writes to two rows of scores: their banks differ.
  using Scores = real[kPlainRows][kPlainRows + 16];
  union {
    Chunk chunk[4];  // of both pairs
    real passing[kPlainRows][kWidth];
  };
  Scores p, ds;
};

template <class real>
constexpr int kPlainColumns = PlainShared<real>::kWidth / 16;  // of a thread
template <class real>
using PlainSums = Registers<Registers<real, kPlainColumns<real>>, 2>;

template <class scalar_t>
struct PlainKeys {
  const HeadAttentionBackwardCall<scalar_t>& call;
  OwnKeys keys;
  QueryWalk<kPlainRows> walk;

  __device__ __forceinline__ bool next() { return walk.next(call, keys); }
  __device__ __forceinline__ Pair<scalar_t> own(int r) const { return key_pair(call, keys, r); }
  __device__ __forceinline__ int passing_rows() const {
    return min(walk.T - walk.block * kPlainRows, kPlainRows);
  }
  __device__ __forceinline__ Pair<scalar_t> passing(int r) const {
    return query_pair(call, walk.query(call, r).t, walk.head);
  }
};

template <class real, class scalar_t>
__device__ __forceinline__ real element(const scalar_t* row, int64_t d, int64_t D) {
  return row && d < D ? static_cast<real>(load_global(row + d)) : real(0);
}

// sums += values times columns from `column` on of the `count` rows that pass; those of a tile are summed
// apart.
template <class real, class Rows>
__device__ __forceinline__ void add_plain_products(PlainSums<real>& sums, PlainShared<real>& shared,
                                                   const typename PlainShared<real>::Scores& values,
                                                   int64_t column, int64_t D, int count, const Rows& rows) {
  constexpr int kWidth = PlainShared<real>::kWidth;
  const int width = static_cast<int>(min(D - column, int64_t{kWidth}));
  __syncthreads();
  for (int i = threadIdx.x; i < count * kWidth; i += kPlainThreads)
    if (i % kWidth < width)
      store_shared(&shared.passing[i / kWidth][i % kWidth],
                   element<real>(rows(i / kWidth), column + i % kWidth, D));
  __syncthreads();
  const int y = threadIdx.x / 16, x = threadIdx.x % 16;
  PlainSums<real> of_tile{};
#pragma unroll 4
  for (int r = 0; r < count; ++r) {
    const real near = values[y][r], far = values[y + 16][r];
#pragma unroll
    for (int c = 0; c < kPlainColumns<real>; ++c) {
      if (x + 16 * c >= width) continue;
      const real other = shared.passing[r][x + 16 * c];
      of_tile[0][c] = std::fma(near, other, of_tile[0][c]);
      of_tile[1][c] = std::fma(far, other, of_tile[1][c]);
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int c = 0; c < kPlainColumns<real>; ++c) sums[half][c] += of_tile[half][c];
}

template <class real, class scalar_t, class Row>
__device__ __forceinline__ void store_plain(const PlainSums<real>& sums, real factor, int64_t column,
                                            int64_t D, const Row& row_of) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    scalar_t* const row = row_of(threadIdx.x / 16 + 16 * half);
#pragma unroll
    for (int c = 0; c < kPlainColumns<real>; ++c) {
      const int64_t d = column + threadIdx.x % 16 + 16 * c;
      if (row && d < D) store_global(row + d, static_cast<scalar_t>(sums[half][c] * factor));
    }
  }
}

template <class real>
using PlainScores = Registers<Registers<real, 2>, 2>;

// sums += own rows times those that pass, over `count` elements of D.
template <class real>
__device__ __forceinline__ void add_plain_scores(PlainScores<real>& sums,
                                                 const typename PlainShared<real>::Chunk& own,
                                                 const typename PlainShared<real>::Chunk& passing,
                                                 int count) {
  const int y = threadIdx.x / 16, x = threadIdx.x % 16;
  PlainScores<real> of_chunk{};
#pragma unroll 8
  for (int d = 0; d < count; ++d) {
    const Registers<real, 2> mine{{own[d][y], own[d][y + 16]}};
    const Registers<real, 2> theirs{{passing[d][x], passing[d][x + 16]}};
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int j = 0; j < 2; ++j) of_chunk[i][j] = std::fma(mine[i], theirs[j], of_chunk[i][j]);
  }
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int j = 0; j < 2; ++j) sums[i][j] += of_chunk[i][j];
}

template <BackwardPart kPart, class scalar_t, class Own, class real = accumulate_t<scalar_t>>
__device__ __forceinline__ void compute_plain(PlainShared<real>& shared,
                                              const HeadAttentionBackwardCall<scalar_t>& call, Own own) {
  constexpr bool kKeys = kPart == BackwardPart::kKeys, kDelta = kPart == BackwardPart::kDelta;
  const int y = threadIdx.x / 16, x = threadIdx.x % 16;
  const int64_t column = int64_t{blockIdx.y} * shared.kWidth;

  // The two queries of a thread: its rows, or its columns of every tile.
  Registers<int64_t, 2> place;
  Registers<int, 2> keys;
  Registers<real, 2> lse, delta;
  const auto read = [&](const Query& query, int64_t head, int i) {
    place[i] = query.t < 0 ? -1 : query.t * call.H + head;
    keys[i] = query.keys;
    lse[i] = query.t < 0 ? 0 : load_global(call.lse + place[i]);
    delta[i] = kDelta || query.t < 0 ? 0 : load_global(call.delta + place[i]);
  };
  if constexpr (!kKeys) {
#pragma unroll
    for (int i = 0; i < 2; ++i) read(own.query(y + 16 * i), own.head, i);
  }

  PlainSums<real> of_ds{}, of_p{};
  Registers<real, 2> sum{{0, 0}}, whole{{0, 0}};  // of P dP and of P, and of the sink's share: lse is rounded
  bool passed = false;
  for (; own.next(); passed = true) {
    const int rows = own.passing_rows();
    PlainScores<real> s{}, dp{};
    for (int64_t begin = 0; begin < call.D; begin += 32) {
      const int count = static_cast<int>(min(call.D - begin, int64_t{32})), d = threadIdx.x % 32;
      __syncthreads();
      for (int r = threadIdx.x / 32; d < count && r < kPlainRows; r += kPlainThreads / 32) {
        const Pair<scalar_t> mine = own.own(r), theirs = own.passing(r);
        store_shared(&shared.chunk[0][d][r], element<real>(mine.first, begin + d, call.D));
        store_shared(&shared.chunk[1][d][r], element<real>(mine.second, begin + d, call.D));
        store_shared(&shared.chunk[2][d][r], element<real>(theirs.first, begin + d, call.D));
        store_shared(&shared.chunk[3][d][r], element<real>(theirs.second, begin + d, call.D));
      }
      __syncthreads();
      add_plain_scores<real>(s, shared.chunk[0], shared.chunk[2], count);
      add_plain_scores<real>(dp, shared.chunk[1], shared.chunk[3], count);
    }

    int low = 0;
    if constexpr (kKeys) {
#pragma unroll
      for (int j = 0; j < 2; ++j) read(own.walk.query(call, x + 16 * j), own.walk.head, j);
      low = own.walk.low();
    }
    Registers<real, 2> of_tile{{0, 0}}, p_of_tile{{0, 0}};
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int row = y + 16 * i, passing = x + 16 * j, query = kKeys ? j : i;
        int key = row;
        if constexpr (!kKeys) key = own.at + passing;
        const bool visible = key >= low && sees(keys[query], key, call.window);
        real exponent = std::fma(s[i][j], call.scale, -lse[query]), slope = 1;
        if (call.softcap != real(0)) {
          const real share = std::tanh(s[i][j] * call.cap_scale);
          exponent = std::fma(call.softcap, share, -lse[query]);
          if (!kDelta) slope = (1 - share) * (1 + share);
        }
        const real p = visible ? exp_of(exponent) : real(0);
        const real ds = visible ? p * (dp[i][j] - delta[query]) * slope : real(0);
        store_shared(&shared.p[row][passing], p);
        store_shared(&shared.ds[row][passing], ds);
        of_tile[i] += ds;
        p_of_tile[i] += p;
      }
#pragma unroll
    for (int i = 0; i < 2; ++i) sum[i] += of_tile[i], whole[i] += p_of_tile[i];
    if constexpr (!kDelta)
      add_plain_products<real>(of_ds, shared, shared.ds, column, call.D, rows,
                               [&](int r) { return own.passing(r).first; });
    if constexpr (kKeys)
      add_plain_products<real>(of_p, shared, shared.p, column, call.D, rows,
                               [&](int r) { return own.passing(r).second; });
  }
  __syncthreads();

  if constexpr (kDelta) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      real total = sum[i], one = whole[i];
#pragma unroll
      for (int distance = 8; distance > 0; distance /= 2) {
        total += __shfl_xor_sync(~0u, total, distance);
        one += __shfl_xor_sync(~0u, one, distance);
      }
      if (call.sinks && place[i] >= 0) one += exp_of(load_global(call.sinks + own.head) - lse[i]);
      if (x == 0 && place[i] >= 0) store_global(call.delta + place[i], one == 0 ? real(0) : total / one);
    }
  } else if constexpr (!kKeys) {
    store_plain<real, scalar_t>(of_ds, call.scale, column, call.D, [&](int r) { return own.dq(r); });
  } else if (passed) {
    const auto store = [&](const PlainSums<real>& sums, real factor, const KeyView<scalar_t>& view) {
      if (view.data)
        store_plain<real, scalar_t>(sums, factor, column, call.D,
                                    [&](int r) { return own.keys.row(view, r); });
    };
    store(of_ds, call.scale, call.dk);
    store(of_p, real(1), call.dv);
  }
}

template <BackwardPart kPart, class scalar_t>
__global__ __launch_bounds__(kPlainThreads, 2) void head_attention_backward_plain_kernel(
    const HeadAttentionBackwardCall<scalar_t> call, const AttentionSchedule schedule) {
  auto& shared = dynamic_shared<PlainShared<accumulate_t<scalar_t>>>();
  if constexpr (kPart == BackwardPart::kKeys) {
    const int64_t items = key_items<kPlainRows>(call, schedule);
    for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
      PlainKeys<scalar_t> own{call, {}, {}};
      start(call, schedule, item, own.keys, own.walk);
      compute_plain<kPart>(shared, call, own);
    }
  } else {
    for_each_query_block<kPlainRows>(call, schedule,
                                     [&](auto own) { compute_plain<kPart>(shared, call, own); });
  }
}

// A block owns a head; its threads stride over the rows. Rows whose lse is -inf take no part: delta may be
// anything.
constexpr int kSinkThreads = 256;
template <class scalar_t>
__global__ __launch_bounds__(kSinkThreads) void head_attention_sinks_kernel(
    const HeadAttentionBackwardCall<scalar_t> call) {
  using real = accumulate_t<scalar_t>;
  struct Shared {
    real sums[kSinkThreads / 32];
  };
  auto& shared = static_shared<Shared>();
  const real sink = load_global(call.sinks + blockIdx.x);
  real sum = 0;
  for (int64_t t = threadIdx.x; t < call.T; t += kSinkThreads) {
    const int64_t place = t * call.H + blockIdx.x;
    const real lse = load_global(call.lse + place);
    if (lse != -static_cast<real>(INFINITY)) sum += exp_of(sink - lse) * load_global(call.delta + place);
  }
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
  if (threadIdx.x % 32 == 0) store_shared(&shared.sums[threadIdx.x / 32], sum);
  __syncthreads();
  if (threadIdx.x != 0) return;
  real all = 0;
  for (int warp = 0; warp < kSinkThreads / 32; ++warp) all += load_shared(&shared.sums[warp]);
  store_global(call.dsinks + blockIdx.x, -all);
}

// ---- launches ----

template <class scalar_t>
bool by_tensor_cores(const AttentionCall& call) {
  return sizeof(scalar_t) == 2 && call.D <= kMostHead;
}

template <BackwardPart kPart, class scalar_t>
void run(const HeadAttentionBackwardCall<scalar_t>& call, const AttentionSchedule& schedule,
         CUstream_st* stream) {
  if constexpr (sizeof(scalar_t) == 2)
    if (by_tensor_cores<scalar_t>(call)) return head_attention_backward_tiles<kPart>(call, schedule, stream);
  constexpr int kWidth = PlainShared<accumulate_t<scalar_t>>::kWidth;
  const int64_t parts = kPart == BackwardPart::kDelta ? 1 : (call.D + kWidth - 1) / kWidth;
  launch<head_attention_backward_plain_kernel<kPart, scalar_t>>(
      {.grid = dim3(static_cast<unsigned>(kBlocksEach * multiprocessors()), static_cast<unsigned>(parts)),
       .block = dim3(kPlainThreads),
       .stream = stream,
       .dynamic_shared = sizeof(PlainShared<accumulate_t<scalar_t>>)},
      call, schedule);
}

}  // namespace

template <class scalar_t>
int64_t head_attention_backward_rows(const HeadAttentionBackwardCall<scalar_t>& call) {
  return by_tensor_cores<scalar_t>(call) ? kBackwardTileRows : kPlainRows;
}
template <class scalar_t>
int64_t head_attention_backward_keys(const HeadAttentionBackwardCall<scalar_t>& call) {
  return by_tensor_cores<scalar_t>(call) ? kBackwardTileRows : kPlainRows;
}

template <class scalar_t>
void head_attention_backward_cuda(const HeadAttentionBackwardCall<scalar_t>& call,
                                  const AttentionSchedule& queries, const AttentionSchedule& keys,
                                  CUstream_st* stream) {
  if (call.T == 0 || call.heads == 0) return;
  run<BackwardPart::kDelta>(call, queries, stream);
  if (call.dsinks)
    launch<head_attention_sinks_kernel<scalar_t>>(
        {.grid = dim3(static_cast<unsigned>(call.H)), .block = dim3(kSinkThreads), .stream = stream}, call);
  if (call.dq) run<BackwardPart::kQueries>(call, queries, stream);
  if (call.dk.data || call.dv.data) run<BackwardPart::kKeys>(call, keys, stream);
}

#define FLEXTRON_INSTANCE(scalar_t)                                                              \
  template int64_t head_attention_backward_rows(const HeadAttentionBackwardCall<scalar_t>&);     \
  template int64_t head_attention_backward_keys(const HeadAttentionBackwardCall<scalar_t>&);     \
  template void head_attention_backward_cuda(const HeadAttentionBackwardCall<scalar_t>&,         \
                                             const AttentionSchedule&, const AttentionSchedule&, \
                                             CUstream_st*);
FLEXTRON_INSTANCE(float)
FLEXTRON_INSTANCE(double)
FLEXTRON_INSTANCE(bf16)
FLEXTRON_INSTANCE(fp16)
#undef FLEXTRON_INSTANCE

}  // namespace flextron
