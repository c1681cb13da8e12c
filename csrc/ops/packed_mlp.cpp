// packed_mlp: elastic_mlp's forward on a CPU, for weights that pack_mlp has put in panels once.
//
// Formula and layout are in csrc/kernels/elastic_gemm.h: the gate's and the up projection's panels alternate,
// so that one pass over one stream makes the hidden neurons, which stay floats between the two layers. There
// is no gradient.
#include <algorithm>

#include "ops/activation.h"
#include "ops/gemm.h"
#include "ops/mlp/executors.h"
#include "ops/ops.h"
#include "ops/packed.h"

namespace flextron {

Tensor packed_mlp(const Tensor& x, const Tensor& up_panels, const Tensor& down_panels,
                  const OptionalTensor& up_scales, const OptionalTensor& down_scales, const Text& format,
                  const OptionalTensor& b_gate, const OptionalTensor& b_up, const OptionalTensor& b_down,
                  int64_t width, int64_t out_features, bool gated, const Text& activation,
                  const OptionalTensor& extent) {
  constexpr auto op = "packed_mlp";
  const NoGrad guard;
  check_inputs(op, x);
  const PanelFormat stored = panel_format(op, format.value);
  const PackedWeight up_weight{stored, "up_panels", up_panels, "up_scales", up_scales};
  const PackedWeight down_weight{stored, "down_panels", down_panels, "down_scales", down_scales};
  check_panels(op, up_weight, x);
  check_panels(op, down_weight, x);
  const int64_t halves = gated ? 2 : 1;
  const int64_t F = std::min(down_weight.inputs(), up_weight.features() / halves);
  const int64_t panels = halves * ((F + kPanel - 1) / kPanel);
  check_words(op, up_weight, 1, x.size(1), panels);
  check_words(op, down_weight, 1, F, down_panels.size(1));
  check_range(op, "width", width, 0, F);
  check_range(op, "out_features", out_features, 0, down_weight.features());
  if (b_gate && !gated) fail(op, ": b_gate must be None unless gated, got a tensor");
  for (const auto& [name, bias] : {std::pair{"b_gate", &b_gate}, {"b_up", &b_up}})
    if (*bias) {
      const int64_t size = (*bias)->dim() == 1 ? (*bias)->size(0) : -1;
      const bool fits = size >= width && size <= F && words_of(stored, size) == words_of(stored, F);
      check_like(op, name, **bias, {fits ? size : F}, x.scalar_type(), x.device());
    }
  if (b_down) check_like(op, "b_down", *b_down, {out_features}, x.scalar_type(), x.device());
  mlp::Mlp mlp{op,           x,
               std::nullopt, up_panels,
               down_panels,  b_gate,
               b_up,         b_down,
               width,        activation_of(op, activation.value),
               extent,       std::nullopt,
               std::nullopt};
  mlp.extents = read_extents(op, "extent", extent, x, width);
  ElasticGemmParams up = on_panels(up_weight, 1), down = on_panels(down_weight, 1);
  up.gated = gated;
  down.features = out_features;
  return product_on_panels(mlp, up, down);
}

}  // namespace flextron
