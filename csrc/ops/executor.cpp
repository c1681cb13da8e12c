// Which executor computes an op's GEMMs: a pure function of numbers, so that tests call it without a GPU.
#include "core/executor.h"

#include "kernels/tuning.h"

namespace flextron {
namespace {

Executor on_gpu(const GemmCall& call) {
  if (call.asked == "tile") return Executor::kTile;
  if (call.asked == "vendor" && !call.extents_on_device) return Executor::kViews;
  const bool streams = call.element_size == 2 && call.tokens <= kDecodeTokens;
  if (call.asked == "decode" && streams) return Executor::kStream;
  return gpu_prefers_streaming(call.tokens, call.element_size, call.extents_on_device) ? Executor::kStream
                                                                                       : Executor::kTile;
}

Executor on_cpu(const GemmCall& call) {
  if (!call.fits_panels || call.asked == "vendor") return Executor::kViews;
  return call.asked == "tile" || call.own_preferred ? Executor::kPanels : Executor::kViews;
}

}  // namespace

Executor executor_of(const GemmCall& call) { return call.on_gpu ? on_gpu(call) : on_cpu(call); }

Executor executor_of_weight_gradient(const GemmCall& call) {
  const bool preferred = cpu_prefers_own_weight_gradient(call.element_size);
  return call.asked == "tile" || preferred ? Executor::kPanels : Executor::kViews;
}

}  // namespace flextron
