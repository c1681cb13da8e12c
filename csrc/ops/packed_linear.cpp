// packed_linear: elastic_linear's forward on a CPU, for a weight that pack_linear has put in panels once.
//
// Formula and layout are in csrc/kernels/elastic_gemm.h. One packed copy serves every prefix of features and
// of inputs. There is no gradient: the panels are for inference.
#include "core/staircase.h"
#include "ops/elastic_gemm.h"
#include "ops/extents.h"
#include "ops/ops.h"
#include "ops/packed.h"

namespace flextron {

Tensor packed_linear(const Tensor& x, const Tensor& panels, const OptionalTensor& scales,
                     const OptionalTensor& bias, int64_t in_features, int64_t out_features,
                     const OptionalTensor& in_extent, const OptionalTensor& out_extent, int64_t in_blocks) {
  constexpr auto op = "packed_linear";
  const NoGrad guard;
  check_rows(op, x);
  check_panels(op, "panels", panels, "scales", scales, x);
  check_positive(op, "in_blocks", in_blocks);
  for (const auto& [name, size] : {std::pair{"x.size(1)", x.size(1)}, {"panels.size(2)", panels.size(2)}})
    if (size % in_blocks != 0)
      fail(op, ": ", name, " must be divisible by in_blocks (", in_blocks, "), got ", size);
  const int64_t kx = x.size(1) / in_blocks, kw = panels.size(2) / in_blocks, out_blocks = panels.size(0);
  check_range(op, "in_features", in_features, 0, std::min(kx, kw));
  check_range(op, "out_features", out_features, 0, panels.size(1) * kPanel);
  if (in_extent && out_extent) fail(op, ": in_extent must be None when out_extent is given, got both");
  const int64_t bias_block = check_packed_bias(op, bias, out_blocks, out_features, x);
  const Extents extents = in_extent ? read_extents(op, "in_extent", in_extent, x, in_features)
                                    : read_extents(op, "out_extent", out_extent, x, out_features);

  const std::vector<int64_t> shape{x.size(0), out_blocks * out_features};
  const Tensor y = out_extent ? zeros(x, shape) : empty(x, shape);
  if (y.numel() == 0) return y;
  const GemmSchedule schedule = gemm_schedule(
      extents.stairs.steps, [&](const Step& step) { return in_extent ? step.extent : in_features; },
      [&](const Step& step) { return out_extent ? step.extent : out_features; });
  const FloatRows rows = float_rows(x, extents.order);
  const OptionalTensor bias_ = bias ? OptionalTensor(torch::stable::contiguous(*bias)) : std::nullopt;
  ElasticGemmParams p = on_panels(panels, scales, in_blocks);
  p.a = rows.data;
  p.a_row = rows.stride;
  p.a_block = kx;
  p.features = out_extent ? extents.widest() : out_features;
  p.bias[0] = bias_ ? bias_->const_data_ptr() : nullptr;
  p.bias_block = bias_block;
  p.io = gemm_dtype(x);
  p.y = y.mutable_data_ptr();
  p.y_row = shape[1];
  p.y_block = out_features;
  p.order = extents.order ? static_cast<const int64_t*>(extents.order->const_data_ptr()) : nullptr;
  run_gemm(p, schedule);
  return y;
}

}  // namespace flextron
