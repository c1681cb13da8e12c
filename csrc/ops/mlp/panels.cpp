// elastic_mlp by our own GEMM on a CPU (csrc/kernels/elastic_gemm.h), whose hidden layer is floats
// or, in pairs, bfloat16 numbers; packed_mlp is its forward.
#include "ops/mlp/executors.h"
#include "ops/mlp/hidden.h"

namespace flextron::mlp {
namespace {

int64_t extent_of(const Step& step) { return step.extent; }

// Room for rows of hidden neurons that GEMMs of gradients read, of the dtype that gradient_rows() gives.
Tensor hidden_room(const Mlp& mlp, int64_t rows, int64_t neurons) {
  const bool pairs = in_pairs(mlp.x, GemmLayout::kColumns);
  const int64_t size = pairs ? mlp.x.element_size() : static_cast<int64_t>(sizeof(float));
  return empty(mlp.x, {rows, padded_row(neurons, size)}, pairs ? mlp.x.scalar_type() : ScalarType::Float);
}

// du and dg are one behind the other.
HiddenGradient hidden_gradient(const Mlp& mlp, const Tensor& dy, const Hidden& hidden,
                               const OptionalTensor& dmixture) {
  const Tensor &u = hidden.u, &w_down = mlp.w_down;
  const int64_t T = u.size(0), N = w_down.size(0), widest = mlp.extents.widest();
  const std::vector<Step>& steps = mlp.extents.stairs.steps;
  const Tensor both = hidden_room(mlp, hidden.g ? 2 * T : T, widest);
  const HiddenGradient gradient{rows(both, 0, T), hidden_room(mlp, T, widest),
                                hidden.g ? OptionalTensor(rows(both, T, 2 * T)) : std::nullopt};
  ElasticGemmParams p = on_columns(w_down, 0, gradient.scaled, 0);
  p.pairs = in_pairs(mlp.x, p.layout);
  read_along(p, dy);
  p.features = widest;
  run_gemm({p, gemm_schedule(p, steps, [&](const Step&) { return N; }, extent_of)});
  for (const Step& step : steps) differentiate_step(mlp, gradient, hidden, step, dmixture);
  return gradient;
}

Tensor input_gradient(const Mlp& mlp, const HiddenGradient& gradient) {
  const Tensor dx = empty(mlp.x, {mlp.x.size(0), mlp.x.size(1)});
  const Tensor& du = gradient.du;
  ElasticGemmParams p = on_columns(mlp.w_up, 0, dx, 0);
  p.pairs = in_pairs(mlp.x, p.layout);
  read_along(p, du);
  if (mlp.w_gate) {
    p.weight[1] = mlp.w_gate->const_data_ptr();
    p.in_blocks = 2;
    p.a_block = du.size(0) * p.a_row;
  }
  p.features = dx.size(1);
  p.order = data_or_null<int64_t>(mlp.extents.order);
  run_gemm(
      {p, gemm_schedule(p, mlp.extents.stairs.steps, extent_of, [&](const Step&) { return dx.size(1); })});
  return dx;
}

// Of w_up from du, of w_gate from dg.
Tensor own_up_weight_gradient(const Mlp& mlp, const Tensor& dhidden, const Tensor& x) {
  const Tensor dw = zeros_from(0, mlp.extents.widest(), mlp.x, {mlp.w_up.size(0), mlp.x.size(1)});
  ElasticGemmParams p = on_columns(x, 0, dw, 0);
  p.pairs = in_pairs(mlp.x, p.layout);
  read_across(p, dhidden);
  p.features = dw.size(1);
  run_gemm({p, gemm_schedule(p, steps_of(column_blocks(mlp.extents.stairs)), extent_of,
                             [&](const Step&) { return dw.size(1); })});
  return dw;
}

Tensor own_down_weight_gradient(const Mlp& mlp, const Tensor& scaled, const Tensor& dy) {
  const Tensor dw = zeros_from(1, mlp.extents.widest(), mlp.x, {mlp.w_down.size(0), mlp.w_down.size(1)});
  for (const ColumnBlock& b : column_blocks(mlp.extents.stairs)) {
    ElasticGemmParams p = on_columns(scaled, b.begin, columns(dw, b.begin, b.end), 0);
    p.pairs = in_pairs(mlp.x, p.layout);
    read_across(p, dy);
    p.features = b.end - b.begin;
    run_gemm({p, gemm_schedule(p, {{b.rows, 0, dw.size(0)}}, extent_of,
                               [&](const Step&) { return b.end - b.begin; })});
  }
  return dw;
}

}  // namespace

Tensor product_on_panels(const Mlp& mlp, ElasticGemmParams up, ElasticGemmParams down) {
  const Tensor& x = mlp.x;
  const Extents& extents = mlp.extents;
  const int64_t T = x.size(0), K = x.size(1), N = down.features, widest = extents.widest();
  const Tensor y = empty(x, {T, N});
  if (y.numel() == 0) return y;
  const OptionalTensor b_gate = dense(mlp.b_gate), b_up = dense(mlp.b_up), b_down = dense(mlp.b_down);

  up.pairs = down.pairs = !up.quantised && in_pairs(x, up.layout);
  const Tensor x_rows = read_rows(up, x, extents.order);
  up.features = widest;
  up.hidden = true;
  up.activation = mlp.activation;
  up.bias[0] = data_or_null(up.gated ? b_gate : b_up);
  up.bias[1] = up.gated ? data_or_null(b_up) : nullptr;
  up.io = gemm_dtype(x);
  down.bias[0] = data_or_null(b_down);
  down.io = gemm_dtype(x);
  down.y = y.mutable_data_ptr();
  down.y_row = N;
  down.order = data_or_null<int64_t>(extents.order);
  const std::vector<Step>& steps = extents.stairs.steps;
  GemmJob first{up, gemm_schedule(up, steps, [&](const Step&) { return K; }, extent_of)};
  GemmJob second{down, gemm_schedule(down, steps, extent_of, [&](const Step&) { return N; })};
  const int64_t h_stride = padded_row(widest);
  const Tensor h = up.pairs ? empty(x, {tiles_of(second), kTileBytes / 2})  // as the second reads them
                            : empty(x, {T, h_stride}, ScalarType::Float);
  first.p.y = h.mutable_data_ptr();
  if (up.pairs) {
    first.p.y_groups = second.schedule.groups.data();
    second.p.tiles = first.p.y;
  } else {
    first.p.y_row = second.p.a_row = h_stride;
    second.p.a = data_of<float>(h);
  }
  const int64_t each = (up.gated ? 2 : 1) * K + N;  // operations of a row for each neuron
  Team::lead(T * widest * each, [&] {
    run_gemm(std::move(first));
    run_gemm(std::move(second));
  });
  return y;
}

Tensor forward_on_panels(const Mlp& mlp) {
  ElasticGemmParams up = on_rows(mlp.w_gate ? *mlp.w_gate : mlp.w_up), down = on_rows(mlp.w_down);
  up.gated = mlp.w_gate.has_value();
  up.weight[1] = mlp.w_up.const_data_ptr();
  down.features = mlp.w_down.size(0);
  return product_on_panels(mlp, up, down);
}

WithHidden forward_with_hidden_on_panels(const Mlp& mlp) {
  const Hidden hidden = room_for_hidden(mlp);
  const Tensor& x = mlp.x;
  const int64_t K = x.size(1), N = mlp.w_down.size(0), widest = mlp.extents.widest();
  const Tensor y = empty(x, {x.size(0), N});
  const std::vector<Step>& steps = mlp.extents.stairs.steps;
  const OptionalTensor b_gate = dense(mlp.b_gate), b_up = dense(mlp.b_up), b_down = dense(mlp.b_down);
  const auto product = [&](const Tensor& weight, const OptionalTensor& bias, const Tensor& to) {
    ElasticGemmParams p = on_rows(weight);
    p.pairs = in_pairs(x, p.layout);
    p.bias[0] = data_or_null(bias);
    p.io = gemm_dtype(x);
    p.y = to.mutable_data_ptr();
    p.y_row = to.stride(0);
    return p;
  };
  std::vector<GemmJob> ups;
  ElasticGemmParams up = product(mlp.w_up, b_up, hidden.u);
  const Tensor x_rows = read_rows(up, x, mlp.extents.order);
  up.features = widest;
  const GemmSchedule schedule = gemm_schedule(up, steps, [&](const Step&) { return K; }, extent_of);
  ups.push_back({up, schedule});
  if (hidden.g) {
    ElasticGemmParams gate = product(*mlp.w_gate, b_gate, *hidden.g);
    gate.a = up.a, gate.x = up.x, gate.x_order = up.x_order, gate.a_row = up.a_row;
    gate.features = widest;
    ups.push_back({gate, schedule});
  }
  run_gemms(std::move(ups));
  const Tensor h = hidden_room(mlp, x.size(0), mlp.width);
  activate_into(h, mlp, hidden);
  ElasticGemmParams down = product(mlp.w_down, b_down, y);
  read_along(down, h);
  down.features = N;
  down.order = data_or_null<int64_t>(mlp.extents.order);
  run_gemm({down, gemm_schedule(down, steps, extent_of, [&](const Step&) { return N; })});
  return {y, hidden};
}

Gradients backward_on_panels(const Mlp& mlp, const Tensor& dy_rows, const Hidden& hidden,
                             const Wanted& wanted, Executor weight_gradient) {
  Gradients d = begin_gradients(mlp, dy_rows, wanted);
  if (!wanted.beyond_b_down()) return d;
  const OptionalTensor dmixture = wanted.mixture ? OptionalTensor(d.mixture) : std::nullopt;
  const Tensor dy = gradient_rows(dy_rows, mlp.extents.order), x = gradient_rows(mlp.x, mlp.extents.order);
  const HiddenGradient gradient = hidden_gradient(mlp, dy, hidden, dmixture);
  const bool own = weight_gradient == Executor::kPanels;
  const auto up_weight = [&](const Tensor& dhidden) {
    return own ? own_up_weight_gradient(mlp, dhidden, x)
               : up_weight_gradient(mlp, dhidden, columns(x, 0, mlp.x.size(1)));
  };
  if (wanted.x) d.x = input_gradient(mlp, gradient);
  if (wanted.w_gate) d.w_gate = up_weight(*gradient.dg);
  if (wanted.w_up) d.w_up = up_weight(gradient.du);
  if (wanted.w_down)
    d.w_down = own ? own_down_weight_gradient(mlp, gradient.scaled, dy)
                   : down_weight_gradient(mlp, gradient.scaled, columns(dy, 0, dy_rows.size(1)));
  hidden_bias_gradients(mlp, gradient, wanted, d);
  return d;
}

}  // namespace flextron::mlp
