// head_attention on any GPU by plain arithmetic, for float, double and head sizes above 128. Smaller heads of
// 16-bit types go to the tensor cores (head_attention_items.cuh).
#include <cmath>

#include "kernels/head_attention_items.cuh"

namespace flextron {
namespace {

using namespace attention;

// 32 queries by 32 keys by 128 columns of the result. Wider heads make more items, each of which computes the
// scores anew. A thread has two queries, the scores of two keys, and eight columns; 16 neighbouring threads
// share the queries.
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
  const int first_key = shared.queries.first_key(call.window) / kPlainKeys * kPlainKeys;
  for (int begin = first_key; begin < all_keys; begin += kPlainKeys) {
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
      for (int c = 0; c < 2; ++c) {
        if (call.softcap == A(0))
          scores[r][c] *= call.scale;
        else
          scores[r][c] = call.softcap * std::tanh(scores[r][c] * call.cap_scale);
        if (!sees(seen, begin + two + c, call.window)) scores[r][c] = A(-INFINITY);
      }
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
    A share = 1;
    if (call.sinks)
      share = add_sink(load_global(call.sinks + item.head), most[r], sum[r], [](A x) { return std::exp(x); });
    if (two == 0 && first_column == 0) write_lse(call, t, item.head, most[r] + std::log(sum[r]));
    scalar_t* const to = call.out + (t * call.H + item.head) * call.D;
#pragma unroll
    for (int n = 0; n < kPlainEights; ++n)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int64_t column = first_column + 32 * n + two + c;
        if (column < call.D)
          store_global(to + column, scalar_t(sum[r] == 0 ? A(0) : out[r][n][c] * share / sum[r]));
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

}  // namespace

template <class scalar_t>
int64_t head_attention_rows(const HeadAttentionCall<scalar_t>& call) {
  return kTensorCores<scalar_t> && call.D <= attention::kMostHead ? kAttentionTileRows : kPlainRows;
}

template <class scalar_t>
void head_attention_cuda(const HeadAttentionCall<scalar_t>& call, const AttentionSchedule& queries,
                         CUstream_st* stream) {
  if (call.T == 0 || call.heads == 0) return;
  if constexpr (kTensorCores<scalar_t>) {
    if (call.D <= attention::kMostHead) return head_attention_tiles(call, queries, stream);
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
