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

Tensor packed_linear(const Tensor& x, const Tensor& panels, const OptionalTensor& scales, const Text& format,
                     const OptionalTensor& bias, int64_t in_features, int64_t out_features,
                     const OptionalTensor& in_extent, const OptionalTensor& out_extent, int64_t in_blocks) {
  constexpr auto op = "packed_linear";
  const NoGrad guard;
  check_rows(op, x);
  const PackedWeight weight{panel_format(op, format.value), "panels", panels, "scales", scales};
  check_panels(op, weight, x);
  check_positive(op, "in_blocks", in_blocks);
  for (const auto& [name, size] : {std::pair{"x.size(1)", x.size(1)}, {"panels.size(2)", weight.inputs()}})
    if (size % in_blocks != 0)
      fail(op, ": ", name, " must be divisible by in_blocks (", in_blocks, "), got ", size);
  const int64_t kx = x.size(1) / in_blocks, kw = weight.inputs() / in_blocks;
  check_range(op, "in_features", in_features, 0, std::min(kx, kw));
  check_range(op, "out_features", out_features, 0, weight.features());
  if (in_extent && out_extent) fail(op, ": in_extent must be None when out_extent is given, got both");
  check_packed_bias(op, bias, weight.out_blocks(), out_features, x);
  const Extents extents = in_extent ? read_extents(op, "in_extent", in_extent, x, in_features)
                                    : read_extents(op, "out_extent", out_extent, x, out_features);
  return linear_on_cpu(on_panels(weight, in_blocks), x, bias, in_features, out_features,
                       in_extent.has_value(), out_extent.has_value(), extents);
}

}  // namespace flextron
