// elastic_mlp: a whole MLP, plain or gated, at any width, per token, or as a soft mixture of widths.
//
//   h = act(x w_gate[:d]^T + b_gate) * (x w_up[:d]^T + b_up)        y = (s * h) w_down[:, :d]^T + b_down
//
// The arguments are read once, an executor is chosen and runs: csrc/ops/mlp. What lies between the GEMMs is
// csrc/kernels/elastic_mlp.h.
#include "ops/activation.h"
#include "ops/executor.h"
#include "ops/gemm.h"
#include "ops/mlp/executors.h"
#include "ops/ops.h"

namespace flextron {
namespace {

// Whether the CPU's own GEMM reads the weights as they lie: the gate's and the up projection's side by side.
bool weights_fit(const mlp::Mlp& mlp) {
  return fits_panels(mlp.x, {&mlp.w_up, &mlp.w_down, mlp.w_gate ? &*mlp.w_gate : nullptr}) &&
         (!mlp.w_gate || mlp.w_gate->stride(0) == mlp.w_up.stride(0));
}

GemmCall call_of(const mlp::Mlp& mlp, bool fits, bool trains) {
  return gemm_call(mlp.x, mlp.w_up, mlp.extent.has_value(), fits, trains);
}

mlp::WithHidden forward_with_hidden(const mlp::Mlp& mlp) {
  switch (executor_of(call_of(mlp, weights_fit(mlp), true))) {
    case Executor::kViews:
      return forward_with_hidden_on_views(mlp);
    case Executor::kPanels:
      return forward_with_hidden_on_panels(mlp);
    default:
      return forward_with_hidden_on_gpu(mlp);
  }
}

mlp::Gradients backward(const mlp::Mlp& mlp, const Tensor& dy, const mlp::Hidden& hidden,
                        const mlp::Wanted& wanted) {
  const GemmCall call = call_of(mlp, weights_fit(mlp), true);
  switch (executor_of(call)) {
    case Executor::kViews:
      return backward_on_views(mlp, dy, hidden, wanted);
    case Executor::kPanels:
      return backward_on_panels(mlp, dy, hidden, wanted, executor_of_weight_gradient(call));
    default:
      return backward_on_gpu(mlp, dy, hidden, wanted);
  }
}

// The gradient of the mixture as it was given: where one is for all tokens, the sum of theirs.
Tensor mixture_gradient(const Tensor& each, const Tensor& mixture) {
  Tensor total = each;
  if (mixture.size(0) != each.size(0)) {
    total = empty(each, {mixture.size(1)});
    sum_rows_into(total, each);
  }
  return torch::stable::to(torch::stable::view(total, mixture.sizes()), mixture.scalar_type());
}

}  // namespace

Tensor elastic_mlp(const Tensor& x, const OptionalTensor& w_gate, const Tensor& w_up, const Tensor& w_down,
                   const OptionalTensor& b_gate, const OptionalTensor& b_up, const OptionalTensor& b_down,
                   int64_t width, const Text& activation, const OptionalTensor& extent,
                   const OptionalTensor& gate, const std::optional<std::vector<int64_t>>& choices) {
  constexpr auto op = "elastic_mlp";
  const NoGrad guard;
  const mlp::Mlp mlp = mlp::read({op, x, w_gate, w_up, w_down, b_gate, b_up, b_down, width,
                                  activation_of(op, activation.value), extent, gate, choices});
  const bool fits = !gate && weights_fit(mlp);  // the CPU's own forward takes no mixture
  switch (const Executor executor = executor_of(call_of(mlp, fits, false))) {
    case Executor::kViews:
      return forward_on_views(mlp);
    case Executor::kPanels:
      return forward_on_panels(mlp);
    default:
      return forward_on_gpu(mlp, executor);
  }
}

std::tuple<Tensor, Tensor, Tensor> elastic_mlp_with_hidden(
    const Tensor& x, const OptionalTensor& w_gate, const Tensor& w_up, const Tensor& w_down,
    const OptionalTensor& b_gate, const OptionalTensor& b_up, const OptionalTensor& b_down, int64_t width,
    const Text& activation, const OptionalTensor& extent, const OptionalTensor& gate,
    const std::optional<std::vector<int64_t>>& choices) {
  constexpr auto op = "elastic_mlp_with_hidden";
  const NoGrad guard;
  const mlp::Mlp mlp = mlp::read({op, x, w_gate, w_up, w_down, b_gate, b_up, b_down, width,
                                  activation_of(op, activation.value), extent, gate, choices});
  const auto [y, hidden] = forward_with_hidden(mlp);
  return {y, hidden.u, hidden.g ? *hidden.g : empty(x, {0})};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> elastic_mlp_backward(
    const Tensor& dy, const Tensor& x, const OptionalTensor& w_gate, const Tensor& w_up, const Tensor& w_down,
    const OptionalTensor& b_gate, const OptionalTensor& b_up, const OptionalTensor& b_down, int64_t width,
    const Text& activation, const OptionalTensor& extent, const OptionalTensor& gate,
    const std::optional<std::vector<int64_t>>& choices, const Tensor& hidden_up, const Tensor& hidden_gate,
    int64_t output_mask) {
  constexpr auto op = "elastic_mlp_backward";
  const NoGrad guard;
  const mlp::Mlp mlp = mlp::read({op, x, w_gate, w_up, w_down, b_gate, b_up, b_down, width,
                                  activation_of(op, activation.value), extent, gate, choices});
  check_like(op, "dy", dy, {x.size(0), w_down.size(0)}, x.scalar_type(), x.device());
  const mlp::Wanted wanted = read_output_mask(mlp, output_mask);
  check_like(op, "hidden_up", hidden_up, {x.size(0), mlp.width}, x.scalar_type(), x.device());
  if (w_gate) check_like(op, "hidden_gate", hidden_gate, {x.size(0), mlp.width}, x.scalar_type(), x.device());
  const mlp::Hidden hidden{torch::stable::contiguous(hidden_up),
                           w_gate ? OptionalTensor(torch::stable::contiguous(hidden_gate)) : std::nullopt};
  mlp::Gradients d = backward(mlp, dy, hidden, wanted);
  if (wanted.mixture) d.mixture = mixture_gradient(d.mixture, *gate);
  return {d.x, d.w_gate, d.w_up, d.w_down, d.b_gate, d.b_up, d.b_down, d.mixture};
}

}  // namespace flextron
