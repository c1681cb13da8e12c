// head_attention_decode on any GPU for float, double and 16-bit types with D above 128, and the sum over
// chunks. Smaller heads go to the tensor cores (head_attention_decode_units.cuh).
#include <cmath>

#include "kernels/device/copy.cuh"
#include "kernels/device/sync.cuh"
#include "kernels/head_attention_decode_units.cuh"

namespace flextron {
namespace {

using namespace attention_decode;

constexpr int kPlainRows = 16, kPlainKeys = 32, kPlainDepth = 32, kPlainColumns = kThreads;

template <class acc_t>
struct PlainShared {
  // One more: a column's elements are in different banks.
  acc_t q[kPlainRows][kPlainDepth + 1], k[kPlainKeys][kPlainDepth + 1], weight[kPlainKeys][kPlainRows + 1];
  acc_t shrink[kPlainRows], factor[kPlainRows];
  int64_t q_at[kPlainRows], row_at[kPlainRows];  // in q; in [T, H]
  int64_t k_at[kPlainKeys], v_at[kPlainKeys];
  Unit unit;  // at work; not in every thread's registers
};

// A unit has 128 columns of the output; a warp 4 rows of the scores, a lane one key; a thread one column.
template <class scalar_t>
__global__ __launch_bounds__(kThreads) void head_attention_decode_plain_kernel(
    const HeadAttentionCall<scalar_t> call, accumulate_t<scalar_t>* const partial, const Partials partials) {
  using acc_t = accumulate_t<scalar_t>;
  constexpr int kRowsOfWarp = kPlainRows / kWarps;
  auto& shared = static_shared<PlainShared<acc_t>>();
  const int lane = threadIdx.x % 32, first = threadIdx.x / 32 * kRowsOfWarp;
  const int parts = static_cast<int>((call.D + kPlainColumns - 1) / kPlainColumns);
  const acc_t scale = scale_of(call);

  grid_launch_dependents();
  Units<kPlainRows> units(call, parts);
  for (;; __syncthreads()) {
    if (threadIdx.x < 32) {
      const Unit next = units.next();
      if (lane == 0) shared.unit = next;
    }
    __syncthreads();
    const Unit& unit = shared.unit;
    if (unit.rows == 0) break;
    const int64_t column = int64_t{unit.part} * kPlainColumns + threadIdx.x;
    Registers<int, kRowsOfWarp> seen;
    Registers<acc_t, kRowsOfWarp> maximum, sum;
#pragma unroll
    for (int r = 0; r < kRowsOfWarp; ++r) {
      seen[r] = first + r < unit.rows ? unit.seen(call.causal, first + r) : 0;
      maximum[r] = lowest<acc_t>();
      sum[r] = 0;
    }
    Registers<acc_t, kPlainRows> out;
#pragma unroll
    for (int r = 0; r < kPlainRows; ++r) out[r] = 0;
    if (const int row = threadIdx.x; row < unit.rows) {
      const int64_t t = unit.t(row), head = unit.head(call.M, row);
      shared.q_at[row] = t * call.q_stride_t + head * call.q_stride_h;
      shared.row_at[row] = t * call.H + head;
    }

    for (int key = 0; key < unit.keys; key += kPlainKeys) {
      const int keys = min(unit.keys - key, kPlainKeys);
      if (const int j = threadIdx.x % kPlainKeys; threadIdx.x < 2 * kPlainKeys && j < keys) {
        const bool of_k = threadIdx.x < kPlainKeys;
        const auto& view = of_k ? call.k : call.v;
        (of_k ? shared.k_at : shared.v_at)[j] =
            unit.group * view.group_stride +
            key_offset(call, unit.s, unit.key + key + j, view.page_stride, view.key_stride);
      }
      Registers<acc_t, kRowsOfWarp> score;
#pragma unroll
      for (int r = 0; r < kRowsOfWarp; ++r) score[r] = 0;
      for (int64_t depth = 0; depth < call.D; depth += kPlainDepth) {
        __syncthreads();
        const bool there = depth + lane < call.D;
        for (int j = threadIdx.x / 32; j < kPlainKeys; j += kWarps)
          shared.k[j][lane] =
              j < keys && there ? acc_t(load_global(call.k.data + shared.k_at[j] + depth + lane)) : acc_t(0);
        for (int row = threadIdx.x / 32; row < kPlainRows; row += kWarps)
          shared.q[row][lane] = row < unit.rows && there
                                    ? acc_t(load_global(call.q + shared.q_at[row] + depth + lane))
                                    : acc_t(0);
        __syncthreads();
        Registers<acc_t, kRowsOfWarp> part;
#pragma unroll
        for (int r = 0; r < kRowsOfWarp; ++r) part[r] = 0;
#pragma unroll 4
        for (int d = 0; d < kPlainDepth; ++d) {
          const acc_t k = shared.k[lane][d];
#pragma unroll
          for (int r = 0; r < kRowsOfWarp; ++r) part[r] = std::fma(shared.q[first + r][d], k, part[r]);
        }
#pragma unroll
        for (int r = 0; r < kRowsOfWarp; ++r) score[r] += part[r];
      }
      if (call.softcap != acc_t(0)) {
#pragma unroll
        for (int r = 0; r < kRowsOfWarp; ++r) score[r] = std::tanh(score[r] * call.cap_scale);
      }
#pragma unroll
      for (int r = 0; r < kRowsOfWarp; ++r) {
        const acc_t x = sees(seen[r], key + lane, call.window) ? score[r] * scale : lowest<acc_t>();
        acc_t top = x;
#pragma unroll
        for (int distance = 1; distance < 32; distance *= 2)
          top = fmax(top, __shfl_xor_sync(~0u, top, distance));
        top = fmax(top, maximum[r]);
        const acc_t base = base_of(top), shrink = exp2_of(maximum[r] - base), weight = exp2_of(x - base);
        maximum[r] = top;
        sum[r] = sum[r] * shrink + weight;
        shared.weight[lane][first + r] = weight;
        if (lane == 0) shared.shrink[first + r] = shrink;
      }
      __syncthreads();
      if (column < call.D) {
        Registers<acc_t, kPlainRows> part;
#pragma unroll
        for (int r = 0; r < kPlainRows; ++r) part[r] = 0;
#pragma unroll 1
        for (int j = 0; j < keys; ++j) {
          const acc_t v = acc_t(load_global(call.v.data + shared.v_at[j] + column));
#pragma unroll
          for (int r = 0; r < kPlainRows; ++r) part[r] = std::fma(shared.weight[j][r], v, part[r]);
        }
#pragma unroll
        for (int r = 0; r < kPlainRows; ++r) out[r] = std::fma(out[r], shared.shrink[r], part[r]);
      }
      __syncthreads();
    }

    const bool only = unit.chunks == 1;
#pragma unroll
    for (int r = 0; r < kRowsOfWarp; ++r) {
#pragma unroll
      for (int distance = 1; distance < 32; distance *= 2) sum[r] += __shfl_xor_sync(~0u, sum[r], distance);
      if (lane > 0 || first + r >= unit.rows) continue;
      acc_t share = 1;
      if (only) share = with_sink(call, shared.row_at[first + r] % call.H, maximum[r], sum[r]);
      shared.factor[first + r] = only && sum[r] != acc_t(0) ? share / sum[r] : acc_t(1);
      if (only || unit.part > 0) continue;
      acc_t* const to = partial + partials.at(shared.row_at[first + r], unit.chunk);
      store_global(to, maximum[r]);
      store_global(to + 1, sum[r]);
    }
    __syncthreads();
    if (column >= call.D) continue;
#pragma unroll
    for (int r = 0; r < kPlainRows; ++r) {
      if (r >= unit.rows) continue;
      const acc_t result = out[r] * shared.factor[r];
      const int64_t at = shared.row_at[r];
      if (only)
        store_global(call.out + at * call.D + column, scalar_t(result));
      else
        store_global(partial + partials.at(at, unit.chunk) + 4 + column, result);
    }
  }
}

// ---- chunks, added ----

// 16 bytes of sums.
template <class acc_t>
struct alignas(16) Wide {
  static constexpr int kCount = 16 / sizeof(acc_t);
  acc_t x[kCount];
};

constexpr int kCombineWarps = 8, kCombineThreads = 32 * kCombineWarps;

template <class acc_t>
struct CombineShared {
  Wide<acc_t> out[kCombineWarps][32];
  acc_t maximum[kCombineWarps], sum[kCombineWarps];
};

// A block owns a row; a warp an eighth of its chunks, all of which it asks for at once; a lane one of these
// chunks' shares, then neighbouring columns.
template <class scalar_t>
__global__ __launch_bounds__(kCombineThreads) void head_attention_decode_combine_kernel(
    const HeadAttentionCall<scalar_t> call, const accumulate_t<scalar_t>* const partial,
    const Partials partials) {
  using acc_t = accumulate_t<scalar_t>;
  using Sums = Wide<acc_t>;
  constexpr int kMost = 64 / kCombineWarps;  // chunks of a warp
  auto& shared = static_shared<CombineShared<acc_t>>();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  bool waited = false;
  for (int64_t row = blockIdx.x; row < call.T * call.H; row += gridDim.x) {
    const int64_t t = row / call.H, head = row % call.H, b = t / call.queries_each;
    if (!head_active(call, units_of(call, b, 0), head)) continue;
    const Work work = work_of(call, b);
    if (work.chunks == 1) continue;
    const int64_t keys = work.s.keys_end(call.causal, t - work.s.query) - work.s.k_start;
    const int chunks = static_cast<int>((max(keys, int64_t{0}) + work.chunk - 1) / work.chunk);
    const int each = (chunks + kCombineWarps - 1) / kCombineWarps, first = warp * each;
    const int mine = min(chunks - first, each);  // none: not above zero
    if (!waited) grid_dependency_wait();         // the lengths were there before
    waited = true;

    const acc_t* const from = partial + partials.at(row, first);
    acc_t share = lane < mine ? load_global(from + lane * partials.pitch) : lowest<acc_t>();
    acc_t sum = lane < mine ? load_global(from + lane * partials.pitch + 1) : acc_t(0);
    for (int64_t begin = 0; begin < call.D; begin += 32 * Sums::kCount) {
      const int64_t column = begin + lane * Sums::kCount;
      Registers<Sums, kMost> x;
#pragma unroll
      for (int chunk = 0; chunk < kMost; ++chunk)
        x[chunk] =
            chunk < mine && column < call.D
                ? load_global(reinterpret_cast<const Sums*>(from + chunk * partials.pitch + 4 + column))
                : Sums{};
      if (begin == 0) {
        acc_t maximum = share;
#pragma unroll
        for (int distance = 1; distance < 32; distance *= 2)
          maximum = fmax(maximum, __shfl_xor_sync(~0u, maximum, distance));
        share = exp2_of(share - base_of(maximum));
        sum *= share;
#pragma unroll
        for (int distance = 1; distance < 32; distance *= 2) sum += __shfl_xor_sync(~0u, sum, distance);
        if (lane == 0) shared.maximum[warp] = maximum, shared.sum[warp] = sum;
      }
      Sums out{};
#pragma unroll
      for (int chunk = 0; chunk < kMost; ++chunk) {
        const acc_t factor = __shfl_sync(~0u, share, chunk);
#pragma unroll
        for (int n = 0; n < Sums::kCount; ++n)
          if (chunk < mine) out.x[n] += factor * x[chunk].x[n];
      }
      store_shared(&shared.out[warp][lane], out);
      __syncthreads();

      // The warps' sums in their order, a column a thread.
      acc_t maximum = lowest<acc_t>(), total = 0, result = 0;
#pragma unroll
      for (int w = 0; w < kCombineWarps; ++w) maximum = fmax(maximum, shared.maximum[w]);
      const int place = threadIdx.x;
      if (place < 32 * Sums::kCount && begin + place < call.D) {
#pragma unroll
        for (int w = 0; w < kCombineWarps; ++w) {
          const acc_t factor = exp2_of(shared.maximum[w] - base_of(maximum));
          total += factor * shared.sum[w];
          result += factor * load_shared(&shared.out[w][0].x[0] + place);
        }
        const acc_t kept = with_sink(call, head, maximum, total);
        const acc_t divisor = total == acc_t(0) ? acc_t(1) : total;
        store_global(call.out + row * call.D + begin + place, scalar_t(result * kept / divisor));
      }
      __syncthreads();
    }
  }
  if (!waited) grid_dependency_wait();
}

// ---- launches ----

template <class scalar_t>
void run_plain(const HeadAttentionCall<scalar_t>& call, accumulate_t<scalar_t>* partial,
               const Partials& partials, CUstream_st* stream) {
  const int64_t parts = (call.D + kPlainColumns - 1) / kPlainColumns;
  launch<head_attention_decode_plain_kernel<scalar_t>>(
      {.grid = grid_of(call, kPlainRows, parts, partials.chunks, 8),
       .block = dim3(kThreads),
       .stream = stream},
      call, partial, partials);
}

}  // namespace

template <class scalar_t>
int64_t head_attention_decode_partial(const HeadAttentionCall<scalar_t>& call) {
  const int64_t chunks = most_chunks(call);
  return chunks == 1 ? 0 : call.T * call.H * chunks * Partials::of(call, chunks).pitch;
}

template <class scalar_t>
void head_attention_decode_cuda(const HeadAttentionCall<scalar_t>& call,
                                typename HeadAttentionCall<scalar_t>::acc_t* partial, CUstream_st* stream) {
  if (call.T == 0 || call.heads == 0) return;
  const auto partials = Partials::of(call, most_chunks(call));
  if constexpr (sizeof(scalar_t) == 2) {
    const bool few = call.queries_each * (call.by_group ? call.M : call.heads) <= 16;
    if (call.D > 128)
      run_plain(call, partial, partials, stream);
    else if (few && aligned(call.k) && aligned(call.v))
      attend_by_tiles<scalar_t, 1>(call, partial, partials, stream);
    else
      attend_by_tiles<scalar_t, 2>(call, partial, partials, stream);
  } else {
    run_plain(call, partial, partials, stream);
  }
  if (partials.chunks == 1) return;
  launch<head_attention_decode_combine_kernel<scalar_t>>(
      {.grid = dim3(static_cast<unsigned>(within(call.T * call.H, 1, int64_t{multiprocessors()} * 8))),
       .block = dim3(kCombineThreads),
       .stream = stream,
       .programmatic = cuda_arch() >= 90},
      call, partial, partials);
}

#define FLEXTRON_INSTANCES(scalar_t)                                                  \
  template int64_t head_attention_decode_partial(const HeadAttentionCall<scalar_t>&); \
  template void head_attention_decode_cuda(const HeadAttentionCall<scalar_t>&,        \
                                           HeadAttentionCall<scalar_t>::acc_t*, CUstream_st*)
FLEXTRON_INSTANCES(float);
FLEXTRON_INSTANCES(double);
FLEXTRON_INSTANCES(bf16);
FLEXTRON_INSTANCES(fp16);
#undef FLEXTRON_INSTANCES

}  // namespace flextron
