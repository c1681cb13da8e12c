// A row's place is the number of rows before it: those of a greater extent, and its equals that came earlier.
#include "kernels/device/copy.cuh"
#include "kernels/device/launch.cuh"
#include "kernels/sort_rows.h"

namespace flextron {
namespace {

constexpr int kThreads = 256, kLanes = 8, kRows = kThreads / kLanes;  // lanes of a row; rows of a block

// A row's lanes share the rows that it is compared with.
__global__ __launch_bounds__(kThreads) void sort_rows_kernel(const SortRowsParams p) {
  int64_t* const extent = &dynamic_shared<int64_t>();  // [T]
  const int T = static_cast<int>(p.T);
  for (int t = threadIdx.x; t < T; t += kThreads) store_shared(extent + t, load_global(p.extent + t));
  __syncthreads();
  const int t = blockIdx.x * kRows + threadIdx.x / kLanes;
  const int64_t own = t < T ? load_shared(extent + t) : 0;
  int before = 0;
#pragma unroll 8
  for (int other = threadIdx.x % kLanes; other < T; other += kLanes) {
    const int64_t theirs = load_shared(extent + other);
    before += theirs > own || (theirs == own && other < t);
  }
#pragma unroll
  for (int lane = 1; lane < kLanes; lane *= 2) before += __shfl_xor_sync(~0u, before, lane);
  if (t >= T || threadIdx.x % kLanes != 0) return;
  store_global(p.sorted + before, own);
  store_global(p.order + before, static_cast<int64_t>(t));
  store_global(p.place + t, static_cast<int64_t>(before));
}

}  // namespace

void sort_rows_cuda(const SortRowsParams& p, CUstream_st* stream) {
  if (p.T == 0) return;
  launch<sort_rows_kernel>({.grid = dim3(static_cast<unsigned>((p.T + kRows - 1) / kRows)),
                            .block = dim3(kThreads),
                            .stream = stream,
                            .dynamic_shared = p.T * sizeof(int64_t)},
                           p);
}

}  // namespace flextron
