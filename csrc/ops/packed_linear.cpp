// packed_linear: elastic_linear's forward on a CPU, for a weight that pack_linear has put in panels once.
//
// Formula and layout are in csrc/kernels/elastic_gemm.h. One packed copy serves every prefix of features and
// of inputs. There is no gradient: the panels are for inference.
#include "ops/gemm.h"
#include "ops/linear/executors.h"
#include "ops/ops.h"
#include "ops/packed.h"

namespace flextron {

Tensor packed_linear(const Tensor& x, const Tensor& panels, const OptionalTensor& scales, const Text& format,
                     const OptionalTensor& bias, int64_t in_features, int64_t out_features,
                     const OptionalTensor& in_extent, const OptionalTensor& out_extent, int64_t in_blocks) {
  constexpr auto op = "packed_linear";
  const NoGrad guard;
  check_inputs(op, x);
  const PackedWeight weight{panel_format(op, format.value), "panels", panels, "scales", scales};
  check_panels(op, weight, x);
  check_positive(op, "in_blocks", in_blocks);
  for (const auto& [name, size, each] : {std::tuple{"x.size(1)", x.size(1), int64_t{1}},
                                         {"panels.size(2)", panels.size(2), words_of(weight.format, 1)}})
    if (size % (in_blocks * each) != 0)
      fail(op, ": ", name, " must be divisible by in_blocks (", in_blocks, ")",
           each == 1 ? std::string() : " times " + std::to_string(each), ", got ", size);
  const int64_t out_blocks = weight.out_blocks();
  linear::Linear linear{op,           x,         panels,     bias,      in_features,
                        out_features, in_extent, out_extent, in_blocks, out_blocks};
  linear.kx = x.size(1) / in_blocks;
  linear.kw = weight.inputs() / in_blocks;
  linear.nw = weight.features();
  check_sizes(linear);
  check_packed_bias(op, bias, out_blocks, out_features, x);
  linear.extents = host_extents(linear);
  return product_on_panels(linear, on_panels(weight, in_blocks));
}

}  // namespace flextron
