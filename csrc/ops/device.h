// Where an op runs: torch's own thread pool on the CPU, torch's current stream on a GPU.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include <utility>

#include "ops/checks.h"
#include "ops/team.h"

#ifdef FLEXTRON_WITH_CUDA
// Weak: a CPU-only torch does not have it, and the library must load there.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                                   void** stream);
#endif

struct CUstream_st;  // cudaStream_t, without the CUDA headers

namespace flextron {

#ifdef FLEXTRON_EMULATE
namespace emulator {
void synchronize();
}
#endif

// Whether CUDA kernels compute what the tensor goes into; a build for the emulator has no others.
inline bool runs_on_gpu([[maybe_unused]] const Tensor& t) {
#ifdef FLEXTRON_EMULATE
  return true;
#else
  return !t.is_cpu();
#endif
}

// Calls cuda(stream) on the tensor's device. In a build without CUDA the generic lambda `cuda` is never
// instantiated, so its launcher need not exist. Emulated kernels have run when this returns, others need not
// have.
template <class Cuda>
void on_gpu_of([[maybe_unused]] const char* op, [[maybe_unused]] const Tensor& t,
               [[maybe_unused]] Cuda&& cuda) {
#if defined(FLEXTRON_EMULATE)
  cuda(static_cast<CUstream_st*>(nullptr));
  emulator::synchronize();
#else
#ifdef FLEXTRON_WITH_CUDA
  if (t.is_cuda() && aoti_torch_get_current_cuda_stream != nullptr) {
    const torch::stable::accelerator::DeviceGuard guard(t.get_device_index());
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
    return cuda(static_cast<CUstream_st*>(stream));
  }
#endif
  fail(op, ": device must be one this build has kernels for, got ", device_text(t.device()));
#endif
}

// Calls cpu() for a tensor on the CPU, cuda(stream) on the tensor's device otherwise.
template <class Cpu, class Cuda>
void on_device_of(const char* op, const Tensor& t, Cpu&& cpu, Cuda&& cuda) {
  if (runs_on_gpu(t)) return on_gpu_of(op, t, cuda);
  cpu();
}

// f(begin, end) over [0, count) on torch's threads; `cost` is roughly how many elementary operations one
// index takes, a multiply-add of a GEMM being one.
template <class F>
void parallel_for(int64_t count, int64_t cost, const F& f) {
  constexpr int64_t kPart = 32768;  // operations that a thread gets at least: torch's own figure
  if (count <= 0) return;
  const int64_t each = cost > 0 ? cost : 1, grain = kPart / each + 1;
  if (Team* const team = Team::led()) return team->share(count, grain, f);
  if (count < kOneThreadsWork / each) return f(int64_t{0}, count);
  torch::stable::parallel_for(0, count, grain, f);
}

}  // namespace flextron
