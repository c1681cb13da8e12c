// What packed_linear and packed_mlp share: the checks of panels, and the parameters that follow from them.
#pragma once

#include "ops/elastic_gemm.h"

namespace flextron {

inline void check_rows(const char* op, const Tensor& x) {
  check_dim(op, "x", x, 2);
  const ScalarType dtype = x.scalar_type();
  if (dtype != ScalarType::Float && dtype != ScalarType::BFloat16 && dtype != ScalarType::Half)
    fail(op, ": x must be float32, bfloat16 or float16, got ", toString(dtype));
  if (!x.is_cpu()) fail(op, ": x must be on cpu, got ", device_text(x.device()));
}

// Panels of the dtype of x, or int8 with scales.
inline void check_panels(const char* op, const char* name, const Tensor& panels, const char* scales_name,
                         const std::optional<Tensor>& scales, const Tensor& x) {
  check_dim(op, name, panels, 4);
  check_device(op, name, panels, x.device());
  if (panels.size(3) != kPanel) fail(op, ": ", name, ".size(3) must be ", kPanel, ", got ", panels.size(3));
  if (!panels.is_contiguous()) fail(op, ": ", name, " must be contiguous, got strides");
  if (panels.scalar_type() != ScalarType::Char) {
    check_dtype(op, name, panels, x.scalar_type());
    if (scales) fail(op, ": ", scales_name, " must be None unless ", name, " are int8, got a tensor");
    return;
  }
  if (!scales) fail(op, ": ", scales_name, " must be given with int8 ", name, ", got None");
  check_shape(op, scales_name, *scales, {panels.size(0), panels.size(1), kPanel});
  check_dtype(op, scales_name, *scales, ScalarType::Float);
  check_device(op, scales_name, *scales, x.device());
  if (!scales->is_contiguous()) fail(op, ": ", scales_name, " must be contiguous, got strides");
}

// A bias has the features of all blocks, of each at least those used.
inline void check_packed_bias(const char* op, const std::optional<Tensor>& bias, int64_t blocks,
                              int64_t features, const Tensor& x) {
  if (!bias) return;
  check_dim(op, "bias", *bias, 1);
  check_dtype(op, "bias", *bias, x.scalar_type());
  check_device(op, "bias", *bias, x.device());
  const int64_t size = bias->size(0);
  if (blocks == 0 || size % blocks != 0 || size / blocks < features)
    fail(op, ": bias.size(0) must be a multiple of ", blocks, " blocks and at least ", blocks * features,
         ", got ", size);
}

// The fields that follow from the panels of a layer.
inline ElasticGemmParams on_panels(const Tensor& panels, const std::optional<Tensor>& scales,
                                   int64_t in_blocks) {
  ElasticGemmParams p = no_gemm();
  p.layout = GemmLayout::kPanels;
  p.weight_dtype = gemm_dtype(panels);
  p.weight[0] = panels.const_data_ptr();
  p.in_blocks = in_blocks;
  p.in_stride = panels.size(2) / in_blocks;
  p.out_blocks = panels.size(0);
  p.out_stride = panels.size(1);
  p.scales = scales ? static_cast<const float*>(scales->const_data_ptr()) : nullptr;
  return p;
}

}  // namespace flextron
