// elastic_mlp by the vendor's GEMM (MKL, cuBLAS) on views: an extent per token is the staircase, sorted
// tokens, row steps for up, down and dx, column blocks for the weights' gradients.
#include "ops/mlp/executors.h"
#include "ops/mlp/hidden.h"

namespace flextron::mlp {
namespace {

// Rows that the forward takes at once on a CPU: bounds the hidden activations, whatever T is (3 MiB a matrix
// at 1536 neurons in float32).
constexpr int64_t kRowTile = 512;

OptionalTensor first(const OptionalTensor& bias, int64_t d) {
  return bias ? OptionalTensor(slice(*bias, 0, 0, d)) : std::nullopt;
}

void forward_step(const Mlp& mlp, const Step& step, const Tensor& x, const Tensor& y) {
  const int64_t d = step.extent;
  const Tensor w_up = rows(mlp.w_up, 0, d), w_down = columns(mlp.w_down, 0, d);
  const OptionalTensor w_gate = mlp.w_gate ? OptionalTensor(rows(*mlp.w_gate, 0, d)) : std::nullopt;
  const OptionalTensor b_up = first(mlp.b_up, d), b_gate = first(mlp.b_gate, d);
  const int64_t tile = runs_on_gpu(x) ? step.end - step.begin : kRowTile;
  for (int64_t begin = step.begin; begin < step.end; begin += tile) {
    const int64_t end = std::min(begin + tile, step.end);
    const Tensor x_tile = rows(x, begin, end), u = empty(x, {end - begin, d});
    linear_into(u, x_tile, w_up, b_up);
    OptionalTensor g;
    if (w_gate) linear_into(g.emplace(empty(x, {end - begin, d})), x_tile, *w_gate, b_gate);
    activate_rows(mlp, {.g = g, .u = u, .h = u, .dg = {}, .du = {}, .dmixture = {}, .row = begin, .d = d});
    linear_into(rows(y, begin, end), u, w_down, mlp.b_down);
  }
}

HiddenGradient hidden_gradient(const Mlp& mlp, const Tensor& dy, const Hidden& hidden,
                               const OptionalTensor& dmixture) {
  const auto room = [&] { return torch::stable::empty_like(hidden.u); };
  const HiddenGradient gradient{room(), room(), hidden.g ? OptionalTensor(room()) : std::nullopt};
  for (const Step& step : mlp.extents.stairs.steps) {
    matmul_into(columns(rows(gradient.scaled, step.begin, step.end), 0, step.extent),
                rows(dy, step.begin, step.end), columns(mlp.w_down, 0, step.extent));
    differentiate_step(mlp, gradient, hidden, step, dmixture);
  }
  return gradient;
}

Tensor input_gradient(const Mlp& mlp, const HiddenGradient& gradient) {
  const Tensor dx = empty(mlp.x, {mlp.x.size(0), mlp.x.size(1)});
  for (const Step& step : mlp.extents.stairs.steps) {
    const auto part = [&](const Tensor& dhidden, const Tensor& weight, const Tensor& out) {
      matmul_into(out, columns(rows(dhidden, step.begin, step.end), 0, step.extent),
                  rows(weight, 0, step.extent));
    };
    const Tensor out = rows(dx, step.begin, step.end);
    if (!mlp.w_gate) {
      part(gradient.du, mlp.w_up, out);
      continue;
    }
    sum_of_blocks(out, 2, std::nullopt, [&](int64_t block, const Tensor& into) {
      if (block == 0)
        part(gradient.du, mlp.w_up, into);
      else
        part(*gradient.dg, *mlp.w_gate, into);
    });
  }
  return gather_rows(dx, mlp.extents.inverse);
}

}  // namespace

Tensor forward_on_views(const Mlp& mlp) {
  const Tensor y = empty(mlp.x, {mlp.x.size(0), mlp.w_down.size(0)});
  const Tensor x = gather_rows(mlp.x, mlp.extents.order);
  for (const Step& step : mlp.extents.stairs.steps) forward_step(mlp, step, x, y);
  return gather_rows(y, mlp.extents.inverse);
}

WithHidden forward_with_hidden_on_views(const Mlp& mlp) {
  const Hidden hidden = room_for_hidden(mlp);
  const Tensor x = gather_rows(mlp.x, mlp.extents.order), y = empty(x, {x.size(0), mlp.w_down.size(0)});
  for (const Step& step : mlp.extents.stairs.steps) {
    const int64_t d = step.extent;
    const auto up = [&](const Tensor& out, const Tensor& weight, const OptionalTensor& bias) {
      linear_into(columns(rows(out, step.begin, step.end), 0, d), rows(x, step.begin, step.end),
                  rows(weight, 0, d), first(bias, d));
    };
    up(hidden.u, mlp.w_up, mlp.b_up);
    if (hidden.g) up(*hidden.g, *mlp.w_gate, mlp.b_gate);
  }
  const Tensor h = torch::stable::empty_like(hidden.u);
  activate_into(h, mlp, hidden);
  for (const Step& step : mlp.extents.stairs.steps)
    linear_into(rows(y, step.begin, step.end), columns(rows(h, step.begin, step.end), 0, step.extent),
                columns(mlp.w_down, 0, step.extent), mlp.b_down);
  return {gather_rows(y, mlp.extents.inverse), hidden};
}

Gradients backward_on_views(const Mlp& mlp, const Tensor& dy_rows, const Hidden& hidden,
                            const Wanted& wanted) {
  Gradients d = begin_gradients(mlp, dy_rows, wanted);
  if (!wanted.beyond_b_down()) return d;
  const OptionalTensor dmixture = wanted.mixture ? OptionalTensor(d.mixture) : std::nullopt;
  const Tensor dy = gather_rows(dy_rows, mlp.extents.order), x = gather_rows(mlp.x, mlp.extents.order);
  const HiddenGradient gradient = hidden_gradient(mlp, dy, hidden, dmixture);
  if (wanted.x) d.x = input_gradient(mlp, gradient);
  if (wanted.w_gate) d.w_gate = up_weight_gradient(mlp, *gradient.dg, x);
  if (wanted.w_up) d.w_up = up_weight_gradient(mlp, gradient.du, x);
  if (wanted.w_down) d.w_down = down_weight_gradient(mlp, gradient.scaled, dy);
  hidden_bias_gradients(mlp, gradient, wanted, d);
  return d;
}

}  // namespace flextron::mlp
