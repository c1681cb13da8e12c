// elastic_linear: its arguments are read once, an executor is chosen and runs; the formula is in
// csrc/kernels/elastic_linear.h, the executors in csrc/ops/linear.
#include "ops/executor.h"
#include "ops/gemm.h"
#include "ops/linear/executors.h"
#include "ops/ops.h"

namespace flextron {
namespace {

GemmCall call_of(const linear::Linear& linear, bool trains) {
  return gemm_call(linear.x, linear.weight, linear.has_extent(), fits_panels(linear.x, {&linear.weight}),
                   trains);
}

linear::Gradients backward(const linear::Linear& linear, const Tensor& dy, const linear::Wanted& wanted) {
  const GemmCall call = call_of(linear, true);
  switch (executor_of(call)) {
    case Executor::kViews:
      return backward_on_views(linear, dy, wanted);
    case Executor::kPanels:
      return backward_on_panels(linear, dy, wanted, executor_of_weight_gradient(call));
    default:
      return backward_on_gpu(linear, dy, wanted);
  }
}

}  // namespace

Tensor elastic_linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, int64_t in_features,
                      int64_t out_features, const OptionalTensor& in_extent, const OptionalTensor& out_extent,
                      int64_t in_blocks, int64_t out_blocks) {
  const NoGrad guard;
  const linear::Linear linear = linear::read({"elastic_linear", x, weight, bias, in_features, out_features,
                                              in_extent, out_extent, in_blocks, out_blocks});
  switch (const Executor executor = executor_of(call_of(linear, false))) {
    case Executor::kViews:
      return forward_on_views(linear);
    case Executor::kPanels:
      return forward_on_panels(linear);
    default:
      return forward_on_gpu(linear, executor);
  }
}

std::tuple<Tensor, Tensor, Tensor> elastic_linear_backward(
    const Tensor& dy, const Tensor& x, const Tensor& weight, const OptionalTensor& bias, int64_t in_features,
    int64_t out_features, const OptionalTensor& in_extent, const OptionalTensor& out_extent,
    int64_t in_blocks, int64_t out_blocks, int64_t output_mask) {
  constexpr auto op = "elastic_linear_backward";
  const NoGrad guard;
  const linear::Linear linear = linear::read(
      {op, x, weight, bias, in_features, out_features, in_extent, out_extent, in_blocks, out_blocks});
  check_like(op, "dy", dy, {x.size(0), out_blocks * out_features}, x.scalar_type(), x.device());
  check_range(op, "output_mask", output_mask, 0, 7);
  const linear::Wanted wanted{
      .x = (output_mask & 1) != 0, .weight = (output_mask & 2) != 0, .bias = (output_mask & 4) != 0 && bias};
  linear::Gradients d = backward(linear, dy, wanted);
  return {std::move(d.x), std::move(d.weight), std::move(d.bias)};
}

}  // namespace flextron
