// packed_mlp: elastic_mlp's forward on a CPU, for weights that pack_mlp has put in panels once.
//
// Formula and layout are in csrc/kernels/elastic_gemm.h: the gate's and the up projection's panels alternate,
// so that one pass over one stream makes the hidden neurons, which stay floats between the two layers. There
// is no gradient.
#include "core/staircase.h"
#include "ops/activation.h"
#include "ops/elastic_gemm.h"
#include "ops/extents.h"
#include "ops/ops.h"
#include "ops/packed.h"

namespace flextron {

Tensor packed_mlp(const Tensor& x, const Tensor& up_panels, const Tensor& down_panels,
                  const OptionalTensor& up_scales, const OptionalTensor& down_scales,
                  const OptionalTensor& b_gate, const OptionalTensor& b_up, const OptionalTensor& b_down,
                  int64_t width, int64_t out_features, bool gated, const Text& activation,
                  const OptionalTensor& extent) {
  constexpr auto op = "packed_mlp";
  const NoGrad guard;
  check_rows(op, x);
  check_panels(op, "up_panels", up_panels, "up_scales", up_scales, x);
  check_panels(op, "down_panels", down_panels, "down_scales", down_scales, x);
  const int64_t T = x.size(0), K = x.size(1), F = down_panels.size(2), panels = gated ? 2 : 1;
  check_shape(op, "up_panels", up_panels, {1, panels * ((F + kPanel - 1) / kPanel), K, kPanel});
  check_shape(op, "down_panels", down_panels, {1, down_panels.size(1), F, kPanel});
  check_range(op, "width", width, 0, F);
  check_range(op, "out_features", out_features, 0, down_panels.size(1) * kPanel);
  if (b_gate && !gated) fail(op, ": b_gate must be None unless gated, got a tensor");
  if (b_gate) check_like(op, "b_gate", *b_gate, {F}, x.scalar_type(), x.device());
  if (b_up) check_like(op, "b_up", *b_up, {F}, x.scalar_type(), x.device());
  if (b_down) check_like(op, "b_down", *b_down, {out_features}, x.scalar_type(), x.device());
  const Activation act = activation_of(op, activation.value);
  const Extents extents = read_extents(op, "extent", extent, x, width);

  const Tensor y = empty(x, {T, out_features});
  if (y.numel() == 0) return y;
  const std::vector<Step>& steps = extents.stairs.steps;
  const int64_t widest = extents.widest(), h_stride = padded_row(widest);
  const FloatRows rows = float_rows(x, extents.order);
  const Tensor h = empty(x, {T, h_stride}, ScalarType::Float);
  std::vector<Tensor> kept;
  const auto data = [&](const OptionalTensor& bias) -> const void* {
    if (!bias) return nullptr;
    kept.push_back(torch::stable::contiguous(*bias));
    return kept.back().const_data_ptr();
  };

  ElasticGemmParams up = on_panels(up_panels, up_scales, 1);
  up.a = rows.data;
  up.a_row = rows.stride;
  up.features = widest;
  up.hidden = true;
  up.gated = gated;
  up.activation = act;
  up.bias[0] = data(gated ? b_gate : b_up);
  up.bias[1] = gated ? data(b_up) : nullptr;
  up.io = gemm_dtype(x);
  up.y = h.mutable_data_ptr();
  up.y_row = h_stride;
  run_gemm(up, gemm_schedule(
                   steps, [&](const Step&) { return K; }, [&](const Step& step) { return step.extent; }));

  ElasticGemmParams down = on_panels(down_panels, down_scales, 1);
  down.a = static_cast<const float*>(h.const_data_ptr());
  down.a_row = h_stride;
  down.features = out_features;
  down.bias[0] = data(b_down);
  down.io = gemm_dtype(x);
  down.y = y.mutable_data_ptr();
  down.y_row = out_features;
  down.order = extents.order ? static_cast<const int64_t*>(extents.order->const_data_ptr()) : nullptr;
  run_gemm(down, gemm_schedule(
                     steps, [&](const Step& step) { return step.extent; },
                     [&](const Step&) { return out_features; }));
  return y;
}

}  // namespace flextron
