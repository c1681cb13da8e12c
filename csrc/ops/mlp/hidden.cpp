// What lies between an MLP's GEMMs, launched; and sums over its rows by the vendor's GEMM.
#include "ops/mlp/hidden.h"

#include "ops/device.h"
#include "ops/isa.h"
#include "ops/mlp/params.h"

namespace flextron::mlp {
namespace {

template <bool backward, class in_t, class out_t>
void run_on_cpu(const Mlp& mlp, const HiddenRows& rows) {
  using real = accumulate_t<out_t>;
  const int64_t C = mlp.mixture_choices(), gate_stride = mlp.mixture_stride();
  const ElasticMlpParams<in_t, out_t> p{
      .g = data_or_null<in_t>(rows.g),
      .u = data_of<in_t>(rows.u),
      .dh = data_of<out_t>(rows.h),
      .h = mutable_data_of<out_t>(rows.h),
      .dg = mutable_or_null<out_t>(rows.dg),
      .du = mutable_or_null<out_t>(rows.du),
      .gate = mlp.mixture ? data_of<real>(*mlp.mixture) + rows.row * gate_stride : nullptr,
      .dgate = rows.dmixture ? mutable_data_of<real>(*rows.dmixture) + rows.row * C : nullptr,
      .choices = mlp.mixture ? mlp.choices->data() : &rows.d,
      .R = rows.u.size(0),
      .d = rows.d,
      .C = C,
      .gate_stride = gate_stride,
      .in_stride = rows.u.stride(0),
      .out_stride = rows.h.stride(0),
      .activation = mlp.activation};
  constexpr int64_t kCost = 4;  // operations per neuron, in vectors of 8
  parallel_for(p.R, kCost * p.d, [&](int64_t begin, int64_t end) {
    if constexpr (backward)
      FLEXTRON_FOR_ISA(elastic_mlp_backward, in_t, out_t)(p, begin, end);
    else
      FLEXTRON_FOR_ISA(elastic_mlp, in_t, out_t)(p, begin, end);
  });
}

// On a CPU what is made may be floats. On a GPU the one step that there is has every row.
template <bool backward>
void run(const Mlp& mlp, const HiddenRows& rows) {
  if (rows.u.size(0) == 0 || rows.d == 0) return;
  dispatch_dtype(FloatingTypes{}, mlp.op, rows.u.scalar_type(), [&]<class scalar_t>() {
    const auto on_cpu = [&] {
      if (rows.h.scalar_type() == rows.u.scalar_type())
        return run_on_cpu<backward, scalar_t, scalar_t>(mlp, rows);
      if constexpr (sizeof(scalar_t) == 2) run_on_cpu<backward, scalar_t, float>(mlp, rows);
    };
    on_device_of(mlp.op, rows.u, on_cpu, [&](auto stream) {
      if constexpr (backward)
        elastic_mlp_rows_backward_cuda(rows_params<scalar_t>(mlp, {}, rows), stream);
      else
        elastic_mlp_rows_cuda(rows_params<scalar_t>(mlp, {}, rows), stream);
    });
  });
}

// The first d columns of a step's rows.
Tensor part_of(const Tensor& t, const Step& step) {
  return columns(rows(t, step.begin, step.end), 0, step.extent);
}
OptionalTensor part_of(const OptionalTensor& t, const Step& step) {
  return t ? OptionalTensor(part_of(*t, step)) : std::nullopt;
}

}  // namespace

Hidden room_for_hidden(const Mlp& mlp) {
  const std::vector<int64_t> shape{mlp.x.size(0), mlp.width};
  const bool whole = mlp.extents.flat() && mlp.extents.widest() == mlp.width;
  const auto room = [&] { return whole ? empty(mlp.x, shape) : zeros(mlp.x, shape); };
  return {room(), mlp.w_gate ? OptionalTensor(room()) : std::nullopt};
}

void activate_rows(const Mlp& mlp, const HiddenRows& rows) { run<false>(mlp, rows); }

void activate_into(const Tensor& to, const Mlp& mlp, const Hidden& hidden) {
  for (const Step& step : mlp.extents.stairs.steps)
    run<false>(mlp, {.g = part_of(hidden.g, step),
                     .u = part_of(hidden.u, step),
                     .h = part_of(to, step),
                     .dg = {},
                     .du = {},
                     .dmixture = {},
                     .row = step.begin,
                     .d = step.extent});
}

void differentiate_step(const Mlp& mlp, const HiddenGradient& gradient, const Hidden& hidden,
                        const Step& step, const OptionalTensor& dmixture) {
  run<true>(mlp, {.g = part_of(hidden.g, step),
                  .u = part_of(hidden.u, step),
                  .h = part_of(gradient.scaled, step),
                  .dg = part_of(gradient.dg, step),
                  .du = part_of(gradient.du, step),
                  .dmixture = dmixture,
                  .row = step.begin,
                  .d = step.extent});
}

Gradients begin_gradients(const Mlp& mlp, const Tensor& dy, const Wanted& wanted) {
  const auto none = [&] { return empty(mlp.x, {0}); };
  Gradients d{none(), none(), none(), none(), none(), none(), none(), none()};
  if (wanted.b_down) {
    d.b_down = empty(dy, {dy.size(1)});
    sum_rows_into(d.b_down, dy);
  }
  if (wanted.mixture) d.mixture = zeros(*mlp.mixture, {mlp.x.size(0), mlp.mixture_choices()});
  return d;
}

Tensor up_weight_gradient(const Mlp& mlp, const Tensor& dhidden, const Tensor& x) {
  const Tensor dw = zeros_from(0, mlp.extents.widest(), x, {mlp.w_up.size(0), x.size(1)});
  for (const ColumnBlock& b : column_blocks(mlp.extents.stairs))
    matmul_into(rows(dw, b.begin, b.end), transposed(columns(rows(dhidden, 0, b.rows), b.begin, b.end)),
                rows(x, 0, b.rows));
  return dw;
}

Tensor down_weight_gradient(const Mlp& mlp, const Tensor& scaled, const Tensor& dy) {
  const Tensor dw = zeros_from(1, mlp.extents.widest(), dy, {mlp.w_down.size(0), mlp.w_down.size(1)});
  for (const ColumnBlock& b : column_blocks(mlp.extents.stairs))
    matmul_into(columns(dw, b.begin, b.end), transposed(rows(dy, 0, b.rows)),
                columns(rows(scaled, 0, b.rows), b.begin, b.end));
  return dw;
}

void hidden_bias_gradients(const Mlp& mlp, const HiddenGradient& gradient, const Wanted& wanted,
                           Gradients& d) {
  const auto of = [&](const Tensor& dhidden) {
    const Tensor db = zeros_from(0, mlp.extents.widest(), dhidden, {mlp.w_up.size(0)});
    for (const ColumnBlock& b : column_blocks(mlp.extents.stairs))
      sum_rows_into(rows(db, b.begin, b.end), columns(rows(dhidden, 0, b.rows), b.begin, b.end));
    return torch::stable::to(db, mlp.x.scalar_type());
  };
  if (wanted.b_gate) d.b_gate = of(*gradient.dg);
  if (wanted.b_up) d.b_up = of(gradient.du);
}

}  // namespace flextron::mlp
