// The schedules of head_attention's kernels: one block of threads lists what there is to do, longest first.
//
// All blocks of all sequences are candidates; where a sequence's begin goes through the room for `first`. A
// warp takes neighbouring candidates, so that (length class, warp, place in the warp) is a stable order:
// their numbers are counted, summed, and each candidate finds its place.
#include "kernels/device/launch.cuh"
#include "kernels/head_attention_cuda.h"

namespace flextron {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;

struct Queries {
  AttentionCall call;
  int64_t rows;
  __device__ int64_t blocks(int64_t b) const { return query_blocks(sequence_of(call, b), rows); }
  __device__ AttentionWork work(int64_t b, int64_t block) const { return query_work(call, b, block, rows); }
};
struct Keys {
  AttentionCall call;
  int64_t rows;
  __device__ int64_t blocks(int64_t b) const { return key_blocks(sequence_of(call, b), rows); }
  __device__ AttentionWork work(int64_t b, int64_t block) const { return key_work(call, b, block, rows); }
};

struct Shared {
  int counts[kLengthClasses][kWarps];
  int64_t of_warps[kWarps];
};

// The sum of the values of the threads before this one; `all` is that of all threads.
__device__ int64_t sum_before(int64_t value, Shared& shared, int64_t& all) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int64_t sum = value;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int64_t other = __shfl_up_sync(~0u, sum, distance);
    if (lane >= distance) sum += other;
  }
  if (lane == 31) shared.of_warps[warp] = sum;
  __syncthreads();
  int64_t before = 0;
  all = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) before += shared.of_warps[w];
    all += shared.of_warps[w];
  }
  __syncthreads();
  return before + sum - value;
}

// out[0 .. count]: the sums of f(0), ..., f(i - 1); returns the last.
template <class F>
__device__ int64_t sums_of(int64_t count, int64_t* out, Shared& shared, const F& f) {
  int64_t base = 0;
  for (int64_t begin = 0; begin < count; begin += kThreads) {
    const int64_t i = begin + threadIdx.x;
    int64_t all;
    const int64_t before = sum_before(i < count ? f(i) : 0, shared, all);
    if (i < count) out[i] = base + before;
    base += all;
  }
  if (threadIdx.x == 0) out[count] = base;
  __syncthreads();
  return base;
}

template <class Blocks>
__global__ __launch_bounds__(kThreads, 1) void head_attention_schedule_kernel(const Blocks of, int64_t room,
                                                                              AttentionBlock* blocks,
                                                                              int64_t* first,
                                                                              int64_t* count) {
  auto& shared = static_shared<Shared>();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t B = of.call.B;

  const int64_t found = sums_of(B, first, shared, [&](int64_t b) { return of.blocks(b); });
  const int64_t candidates = found < room ? found : room;
  const auto work_of = [&](int64_t candidate) {
    int64_t low = 0, high = B;  // first[low] <= candidate < first[high]
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (first[middle] <= candidate ? low : high) = middle;
    }
    return of.work(low, candidate - first[low]);
  };

  const int64_t share = (candidates + kThreads - 1) / kThreads * 32;  // of a warp
  const int64_t begin = warp * share, end = begin + share < candidates ? begin + share : candidates;
  for (int i = threadIdx.x; i < kLengthClasses * kWarps; i += kThreads)
    shared.counts[i / kWarps][i % kWarps] = 0;
  __syncthreads();
  for (int64_t i = begin + lane; i < end; i += 32) {
    const AttentionWork work = work_of(i);
    if (work.items > 0) atomicAdd(&shared.counts[length_class(work.length)][warp], 1);
  }
  __syncthreads();

  // A thread's class, longest first, and where its warps begin in it.
  static_assert(kThreads == kLengthClasses);
  auto& mine = shared.counts[kLengthClasses - 1 - threadIdx.x];
  int64_t sum = 0, listed;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) sum += mine[w];
  int64_t at = sum_before(sum, shared, listed);
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    const int here = mine[w];
    mine[w] = static_cast<int>(at);
    at += here;
  }
  __syncthreads();

  for (int64_t i = begin; i < end; i += 32) {  // the same rounds for the whole warp
    const AttentionWork work = i + lane < end ? work_of(i + lane) : AttentionWork{};
    const int length = work.items > 0 ? length_class(work.length) : -1;
    int before = 0, after = 0;  // lanes of the same class
#pragma unroll
    for (int other = 0; other < 32; ++other) {
      const bool same = __shfl_sync(~0u, length, other) == length;
      before += same && other < lane;
      after += same && other > lane;
    }
    const int place = length >= 0 ? shared.counts[length][warp] + before : 0;
    __syncwarp();
    if (length >= 0) {
      blocks[place] = work.block;
      if (after == 0) shared.counts[length][warp] = place + 1;
    }
    __syncwarp();
  }
  __syncthreads();

  sums_of(listed, first, shared,
          [&](int64_t i) { return of.work(blocks[i].sequence, blocks[i].block).items; });
  if (threadIdx.x == 0) *count = listed;
}

template <class Blocks>
AttentionSchedule run(const Blocks& of, int64_t blocks, int64_t* room, CUstream_st* stream) {
  auto* const list = reinterpret_cast<AttentionBlock*>(room);
  int64_t *const first = room + 3 * blocks, *const count = first + blocks + 1;
  launch<head_attention_schedule_kernel<Blocks>>({.grid = dim3(1), .block = dim3(kThreads), .stream = stream},
                                                 of, blocks, list, first, count);
  return {list, first, count};
}

__global__ __launch_bounds__(kThreads) void head_attention_order_keys_kernel(const AttentionCall call,
                                                                             int64_t* keys) {
  const int64_t t = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (t >= call.T) return;
  int64_t b = 0, end = call.B + 1;  // the last of cu_seqlens_q[0 .. B] that is not beyond t
  while (call.cu_seqlens_q && end - b > 1) {
    const int64_t middle = (b + end) / 2;
    (call.cu_seqlens_q[middle] <= t ? b : end) = middle;
  }
  keys[t] = (call.B - b) * (call.heads + 1) + units_of(call, b, t);
}

}  // namespace

AttentionSchedule head_attention_query_schedule_cuda(const AttentionCall& call, int64_t rows, int64_t blocks,
                                                     int64_t* room, CUstream_st* stream) {
  return run(Queries{call, rows}, blocks, room, stream);
}

AttentionSchedule head_attention_key_schedule_cuda(const AttentionCall& call, int64_t rows, int64_t blocks,
                                                   int64_t* room, CUstream_st* stream) {
  return run(Keys{call, rows}, blocks, room, stream);
}

void head_attention_order_keys_cuda(const AttentionCall& call, int64_t* keys, CUstream_st* stream) {
  if (call.T == 0) return;
  const dim3 grid(static_cast<unsigned>((call.T + kThreads - 1) / kThreads));
  launch<head_attention_order_keys_kernel>({.grid = grid, .block = dim3(kThreads), .stream = stream}, call,
                                           keys);
}

}  // namespace flextron
