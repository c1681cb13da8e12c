// From tensors to the numbers that core/executor.h chooses an executor by.
#pragma once

#include <initializer_list>

#include "core/executor.h"
#include "ops/asked_kernel.h"
#include "ops/machine.h"

namespace flextron {

// Whether the CPU's own GEMM reads plain weights of the dtype of x: rows of adjacent elements. float64, which
// is there for gradcheck, it does not have. A weight may be null.
inline bool fits_panels(const Tensor& x, std::initializer_list<const Tensor*> weights) {
  if (x.scalar_type() == ScalarType::Double) return false;
  for (const Tensor* const weight : weights)
    if (weight && weight->size(1) > 1 && weight->stride(1) != 1) return false;
  return true;
}

// `weight`: one of them, whole: its width is no matter. `trains`: a gradient, or the forward that keeps what
// it needs.
inline GemmCall gemm_call(const Tensor& x, const Tensor& weight, bool has_extent, bool fits_panels,
                          bool trains) {
  const bool on_gpu = runs_on_gpu(x);
  const std::string asked = asked_kernel();
  const bool is_open = !on_gpu && fits_panels && asked != "tile" && asked != "vendor";
  return {.on_gpu = on_gpu,
          .extents_on_device = on_gpu && has_extent,
          .fits_panels = fits_panels,
          .own_preferred =
              is_open && own_gemm_is_chosen(x.scalar_type(), x.size(0), weight.numel(), has_extent, trains),
          .tokens = x.size(0),
          .element_size = static_cast<int64_t>(x.element_size()),
          .asked = asked};
}

}  // namespace flextron
