// prefix_gate on any GPU. A block owns a token; its threads stride over the features.
#include "kernels/device/launch.cuh"
#include "kernels/prefix_gate.h"

namespace flextron {
namespace {

constexpr int kThreads = kPrefixGateLanes;

template <class scalar_t>
__global__ __launch_bounds__(kThreads) void prefix_gate_kernel(const PrefixGateParams<scalar_t> p) {
  const int64_t t = blockIdx.x;
  for (int64_t n = threadIdx.x; n < p.N; n += kThreads) p.y[t * p.N + n] = prefix_gate_at(p, t, n);
}

template <class scalar_t>
struct PrefixGateSums {
  accumulate_t<scalar_t> lane[kThreads];
};

// A thread owns a partial sum. Shared memory: the sums, 4 or 8 bytes a thread.
template <class scalar_t>
__global__ __launch_bounds__(kThreads) void prefix_gate_backward_kernel(
    const PrefixGateBackwardParams<scalar_t> p) {
  auto& sum = static_shared<PrefixGateSums<scalar_t>>().lane;
  const int64_t t = blockIdx.x;
  const int lane = static_cast<int>(threadIdx.x);
  sum[lane] = prefix_gate_partial(p, t, lane);
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (lane < half) sum[lane] += sum[lane + half];
  }
  if (lane == 0) p.dgate[t] = static_cast<float>(sum[0]);
}

}  // namespace

template <class scalar_t>
void prefix_gate_cuda(const PrefixGateParams<scalar_t>& p, CUstream_st* stream) {
  if (p.T == 0) return;
  launch<prefix_gate_kernel<scalar_t>>({dim3(static_cast<unsigned>(p.T)), dim3(kThreads), stream}, p);
}

template <class scalar_t>
void prefix_gate_backward_cuda(const PrefixGateBackwardParams<scalar_t>& p, CUstream_st* stream) {
  if (p.T == 0) return;
  launch<prefix_gate_backward_kernel<scalar_t>>({dim3(static_cast<unsigned>(p.T)), dim3(kThreads), stream},
                                                p);
}

#define FLEXTRON_PREFIX_GATE(scalar_t)                                             \
  template void prefix_gate_cuda(const PrefixGateParams<scalar_t>&, CUstream_st*); \
  template void prefix_gate_backward_cuda(const PrefixGateBackwardParams<scalar_t>&, CUstream_st*);
FLEXTRON_PREFIX_GATE(float)
FLEXTRON_PREFIX_GATE(double)
FLEXTRON_PREFIX_GATE(bf16)
FLEXTRON_PREFIX_GATE(fp16)

}  // namespace flextron
