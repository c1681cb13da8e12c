// route on any GPU. Three kernels on one stream, no host in between, no atomic whose order matters:
//   1. a block per kRouteTokens tokens: their choices, and how many of each
//   2. one block: where every (block, choice) pair's tokens begin, and the buckets' offsets
//   3. a block per kRouteTokens tokens: each token's rank among its block's equals, and so its place
#include "kernels/device/launch.cuh"
#include "kernels/route.h"

namespace flextron {
namespace {

// A thread owns a token. Counts go through shared memory, C at a time; integer sums do not depend on their
// order.
template <class scalar_t>
__global__ __launch_bounds__(kRouteTokens) void route_choices_kernel(const RouteParams<scalar_t> p) {
  int* const count = &dynamic_shared<int>();  // [C]
  for (int64_t c = threadIdx.x; c < p.C; c += kRouteTokens) count[c] = 0;
  __syncthreads();
  const int64_t t = blockIdx.x * kRouteTokens + threadIdx.x;
  if (t < p.T) {
    p.choice[t] = route_choice(p, t);
    atomicAdd(&count[p.choice[t]], 1);
  }
  __syncthreads();
  for (int64_t c = threadIdx.x; c < p.C; c += kRouteTokens) p.counts[blockIdx.x * p.C + c] = count[c];
}

// A thread owns a choice: it turns its column of counts into starts relative to its bucket, then adds the
// bucket's offset, which thread 0 sums over the choices (few).
template <class scalar_t>
__global__ __launch_bounds__(kRouteTokens) void route_offsets_kernel(const RouteParams<scalar_t> p,
                                                                     int64_t blocks) {
  for (int64_t c = threadIdx.x; c < p.C; c += kRouteTokens) {
    int64_t total = 0;
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t count = p.counts[b * p.C + c];
      p.counts[b * p.C + c] = total;
      total += count;
    }
    p.offsets[p.C - c] = total;  // bucket C-1-c ends there, once summed
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    p.offsets[0] = 0;
    for (int64_t i = 1; i <= p.C; ++i) p.offsets[i] += p.offsets[i - 1];
  }
  __syncthreads();
  for (int64_t c = threadIdx.x; c < p.C; c += kRouteTokens)
    for (int64_t b = 0; b < blocks; ++b) p.counts[b * p.C + c] += p.offsets[p.C - 1 - c];
}

struct BlockChoices {
  int64_t choice[kRouteTokens];
};

// A thread owns a token and counts the equals before it in its block, in shared memory.
template <class scalar_t>
__global__ __launch_bounds__(kRouteTokens) void route_order_kernel(const RouteParams<scalar_t> p) {
  auto& choice = static_shared<BlockChoices>().choice;
  const int64_t t = blockIdx.x * kRouteTokens + threadIdx.x;
  choice[threadIdx.x] = t < p.T ? p.choice[t] : -1;
  __syncthreads();
  if (t >= p.T) return;
  const int64_t mine = choice[threadIdx.x];
  int64_t rank = 0;
  for (unsigned other = 0; other < threadIdx.x; ++other) rank += choice[other] == mine;
  p.order[p.counts[blockIdx.x * p.C + mine] + rank] = t;
}

}  // namespace

template <class scalar_t>
void route_cuda(const RouteParams<scalar_t>& p, CUstream_st* stream) {
  const int64_t blocks = route_blocks(p.T);
  const dim3 grid(static_cast<unsigned>(blocks)), block(kRouteTokens);
  if (blocks > 0) launch<route_choices_kernel<scalar_t>>({grid, block, stream, p.C * sizeof(int)}, p);
  launch<route_offsets_kernel<scalar_t>>({dim3(1), block, stream}, p, blocks);
  if (blocks > 0) launch<route_order_kernel<scalar_t>>({grid, block, stream}, p);
}

template void route_cuda(const RouteParams<float>&, CUstream_st*);
template void route_cuda(const RouteParams<double>&, CUstream_st*);

}  // namespace flextron
