// elastic_mlp: a whole MLP, plain or gated, at any width, per token, or as a soft mixture of widths.
//
//   h = act(x w_gate[:d]^T + b_gate) * (x w_up[:d]^T + b_up)        y = (s * h) w_down[:, :d]^T + b_down
//
// What lies between the GEMMs is csrc/kernels/elastic_mlp.h. On the CPU a backward, and a forward without a
// soft gate, is our own GEMM (elastic_gemm.h) where it is faster; all else is the vendor's, on views, and an
// extent per token is the staircase: sorted tokens, row steps for up, down and dx, column blocks for the
// weights' gradients.
// On a GPU they are elastic_linear's kernels, and the hidden neurons one of their own; where the host knows
// the extents the vendor's can be asked for (elastic_kernels.h).
#include "kernels/elastic_mlp.h"

#include <array>

#include "ops/activation.h"
#include "ops/device.h"
#include "ops/dispatch.h"
#include "ops/elastic_gemm.h"
#include "ops/elastic_kernels.h"
#include "ops/extents.h"
#include "ops/isa.h"
#include "ops/ops.h"

namespace flextron {
namespace {

// Rows per pass of the forward on the CPU: bounds the hidden activations, whatever T is (3 MiB a matrix at
// 1536 neurons in float32).
constexpr int64_t kRowTile = 512;

struct Mlp {
  const char* op;
  Tensor w_up, w_down;
  OptionalTensor w_gate, b_gate, b_up, b_down;
  Activation activation;
  int64_t width;  // of the hidden neurons, how many can be used: with a soft gate its largest choice
  Gemm gemm;
  Extents extents;               // of the hidden neurons; with the vendor's GEMM alone
  OptionalTensor gate;           // [T, C] or [1, C], accumulation dtype, contiguous
  std::vector<int64_t> choices;  // [C]; empty without a gate
};

void check_choices(const char* op, const std::vector<int64_t>& choices, int64_t width) {
  if (choices.empty()) fail(op, ": choices must have at least 1 entry, got 0");
  for (size_t c = 0; c < choices.size(); ++c) {
    check_range(op, "choices", choices[c], 0, width);
    if (c > 0 && choices[c] <= choices[c - 1])
      fail(op, ": choices must be ascending, got ", choices[c], " after ", choices[c - 1]);
  }
}

void read_gate(Mlp& mlp, const Tensor& x, const Tensor& gate,
               const std::optional<std::vector<int64_t>>& choices) {
  if (!choices) fail(mlp.op, ": choices must be given with gate, got None");
  check_choices(mlp.op, *choices, mlp.width);
  check_floating(mlp.op, "gate", gate);
  check_device(mlp.op, "gate", gate, x.device());
  const int64_t T = x.size(0), C = static_cast<int64_t>(choices->size());
  if (gate.dim() != 2 || gate.size(1) != C || (gate.size(0) != 1 && gate.size(0) != T))
    fail(mlp.op, ": gate must have shape [1, ", C, "] or [", T, ", ", C, "], got ", shape_text(gate.sizes()));
  const bool wide = x.scalar_type() == ScalarType::Double;
  mlp.gate =
      torch::stable::contiguous(torch::stable::to(gate, wide ? ScalarType::Double : ScalarType::Float));
  mlp.choices = *choices;
  mlp.width = choices->back();
}

Mlp read_arguments(const char* op, const Tensor& x, const OptionalTensor& w_gate, const Tensor& w_up,
                   const Tensor& w_down, const OptionalTensor& b_gate, const OptionalTensor& b_up,
                   const OptionalTensor& b_down, int64_t width, const std::string& activation,
                   const OptionalTensor& extent, const OptionalTensor& gate,
                   const std::optional<std::vector<int64_t>>& choices) {
  check_dim(op, "x", x, 2);
  check_floating(op, "x", x);
  check_dim(op, "w_up", w_up, 2);
  check_dim(op, "w_down", w_down, 2);
  const auto dtype = x.scalar_type();
  const auto device = x.device();
  const int64_t F = w_up.size(0), K = x.size(1), outputs = w_down.size(0);
  check_like(op, "w_up", w_up, {F, K}, dtype, device);
  check_like(op, "w_down", w_down, {outputs, F}, dtype, device);
  if (w_gate) check_like(op, "w_gate", *w_gate, {F, K}, dtype, device);
  if (b_gate) check_like(op, "b_gate", *b_gate, {F}, dtype, device);
  if (b_up) check_like(op, "b_up", *b_up, {F}, dtype, device);
  if (b_down) check_like(op, "b_down", *b_down, {outputs}, dtype, device);
  if (b_gate && !w_gate) fail(op, ": b_gate must be None without w_gate, got a tensor");
  check_range(op, "width", width, 0, F);
  if (extent && gate) fail(op, ": extent must be None when gate is given, got both");
  if (choices && !gate) fail(op, ": choices must be None without gate, got a list");

  Mlp mlp{.op = op,
          .w_up = w_up,
          .w_down = w_down,
          .w_gate = w_gate,
          .b_gate = b_gate,
          .b_up = b_up,
          .b_down = b_down,
          .activation = activation_of(op, activation),
          .width = width,
          .gemm = gemm_of(x, extent.has_value()),
          .extents = {},
          .gate = {},
          .choices = {}};
  if (gate) read_gate(mlp, x, *gate, choices);
  if (runs_on_gpu(x) && mlp.choices.size() > kMaxChoices)
    fail(op, ": choices must have at most ", kMaxChoices, " entries on a GPU, got ", mlp.choices.size());
  if (mlp.gemm == Gemm::kVendor) mlp.extents = read_extents(op, "extent", extent, x, mlp.width);
  return mlp;
}

// The soft gate, in either kernel's parameters; one choice, the width, where there is none.
template <class Params>
void set_gate(Params& p, const Mlp& mlp) {
  using real = std::remove_const_t<std::remove_pointer_t<decltype(p.gate)>>;
  p.gate = data_or_null<real>(mlp.gate);
  p.C = mlp.gate ? mlp.gate->size(1) : 1;
  p.gate_stride = mlp.gate && mlp.gate->size(0) > 1 ? p.C : 0;
  p.choices[0] = mlp.width;
  std::copy(mlp.choices.begin(), mlp.choices.end(), p.choices);
}

// Of h = act(g) u; the backward's pointers are its own.
template <class scalar_t>
ElasticMlpRowsParams<scalar_t> rows_params(const Mlp& mlp, const DeviceExtents& extents,
                                           const OptionalTensor& g, const Tensor& u, const Tensor& h) {
  ElasticMlpRowsParams<scalar_t> p{.g = data_or_null<scalar_t>(g),
                                   .u = data_of<scalar_t>(u),
                                   .h = mutable_data_of<scalar_t>(h),
                                   .dh = nullptr,
                                   .dg = nullptr,
                                   .du = nullptr,
                                   .gate = nullptr,
                                   .dgate = nullptr,
                                   .extent = extents.data(),
                                   .choices = {},
                                   .T = u.size(0),
                                   .width = mlp.width,
                                   .C = 0,
                                   .gate_stride = 0,
                                   .per_token = extents.per_token,
                                   .activation = mlp.activation};
  set_gate(p, mlp);
  return p;
}
// Of the gradients of what lies before it; h is what dh is until then.
template <class scalar_t>
ElasticMlpRowsParams<scalar_t> rows_backward_params(const Mlp& mlp, const DeviceExtents& extents,
                                                    const OptionalTensor& g, const Tensor& u,
                                                    const Tensor& dh, const OptionalTensor& dg,
                                                    const Tensor& du, const OptionalTensor& dgate) {
  auto p = rows_params<scalar_t>(mlp, extents, g, u, dh);
  p.dh = data_of<scalar_t>(dh);
  p.dg = dg ? mutable_data_of<scalar_t>(*dg) : nullptr;
  p.du = mutable_data_of<scalar_t>(du);
  p.dgate = dgate ? mutable_data_of<accumulate_t<scalar_t>>(*dgate) : nullptr;
  return p;
}

// ---- with the vendor's GEMMs: on the CPU, and where they are asked for on a GPU ----

OptionalTensor first(const OptionalTensor& bias, int64_t d) {
  return bias ? OptionalTensor(slice(*bias, 0, 0, d)) : std::nullopt;
}

// What lies between the GEMMs, over rows that share the extent d. The first of them is `row` in the gate.
struct Pass {
  OptionalTensor g;
  Tensor u, h;  // h: s * h, where the backward finds its gradient
  OptionalTensor dg, du, dgate;
  int64_t row, d;
};

template <bool backward, class in_t, class out_t>
void run_on_cpu(const Mlp& mlp, const Pass& pass) {
  using real = accumulate_t<out_t>;
  const int64_t C = mlp.gate ? mlp.gate->size(1) : 1;
  const int64_t gate_stride = mlp.gate && mlp.gate->size(0) > 1 ? C : 0;
  const ElasticMlpParams<in_t, out_t> p{
      .g = data_or_null<in_t>(pass.g),
      .u = data_of<in_t>(pass.u),
      .dh = data_of<out_t>(pass.h),
      .h = mutable_data_of<out_t>(pass.h),
      .dg = pass.dg ? mutable_data_of<out_t>(*pass.dg) : nullptr,
      .du = pass.du ? mutable_data_of<out_t>(*pass.du) : nullptr,
      .gate = mlp.gate ? data_of<real>(*mlp.gate) + pass.row * gate_stride : nullptr,
      .dgate = pass.dgate ? mutable_data_of<real>(*pass.dgate) + pass.row * C : nullptr,
      .choices = mlp.gate ? mlp.choices.data() : &pass.d,
      .R = pass.u.size(0),
      .d = pass.d,
      .C = C,
      .gate_stride = gate_stride,
      .in_stride = pass.u.stride(0),
      .out_stride = pass.h.stride(0),
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
void elementwise(const Mlp& mlp, const Pass& pass) {
  if (pass.u.size(0) == 0 || pass.d == 0) return;
  dispatch_dtype(FloatingTypes{}, mlp.op, pass.u.scalar_type(), [&]<class scalar_t>() {
    const auto on_cpu = [&] {
      if (pass.h.scalar_type() == pass.u.scalar_type())
        return run_on_cpu<backward, scalar_t, scalar_t>(mlp, pass);
      if constexpr (sizeof(scalar_t) == 2) run_on_cpu<backward, scalar_t, float>(mlp, pass);
    };
    on_device_of(mlp.op, pass.u, on_cpu, [&](auto stream) {
      if constexpr (backward)
        elastic_mlp_rows_backward_cuda(
            rows_backward_params<scalar_t>(mlp, {}, pass.g, pass.u, pass.h, pass.dg, *pass.du, pass.dgate),
            stream);
      else
        elastic_mlp_rows_cuda(rows_params<scalar_t>(mlp, {}, pass.g, pass.u, pass.h), stream);
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
    elementwise<false>(mlp, {.g = g, .u = u, .h = u, .dg = {}, .du = {}, .dgate = {}, .row = begin, .d = d});
    linear_into(rows(y, begin, end), u, w_down, mlp.b_down);
  }
}

// The hidden layer before the activation, which the forward keeps for the backward: [T, width], sorted rows,
// zeros beyond each row's extent.
struct Kept {
  Tensor up;
  OptionalTensor gate;
};

Kept room_for_kept(const Mlp& mlp, const Tensor& x) {
  const std::vector<int64_t> shape{x.size(0), mlp.width};
  const auto room = [&] {
    return mlp.extents.flat() && mlp.extents.widest() == mlp.width ? empty(x, shape) : zeros(x, shape);
  };
  return {room(), mlp.w_gate ? OptionalTensor(room()) : std::nullopt};
}

// s * h into `to`.
void hidden_into(const Tensor& to, const Mlp& mlp, const Kept& kept) {
  for (const Step& step : mlp.extents.stairs.steps)
    elementwise<false>(mlp, {.g = part_of(kept.gate, step),
                             .u = part_of(kept.up, step),
                             .h = part_of(to, step),
                             .dg = {},
                             .du = {},
                             .dgate = {},
                             .row = step.begin,
                             .d = step.extent});
}

Tensor forward_keeping(const Mlp& mlp, const Tensor& x, const Kept& kept) {
  const Tensor x_sorted = gather_rows(x, mlp.extents.order), y = empty(x, {x.size(0), mlp.w_down.size(0)});
  for (const Step& step : mlp.extents.stairs.steps) {
    const int64_t d = step.extent;
    const auto up = [&](const Tensor& out, const Tensor& weight, const OptionalTensor& bias) {
      linear_into(columns(rows(out, step.begin, step.end), 0, d), rows(x_sorted, step.begin, step.end),
                  rows(weight, 0, d), first(bias, d));
    };
    up(kept.up, mlp.w_up, mlp.b_up);
    if (kept.gate) up(*kept.gate, *mlp.w_gate, mlp.b_gate);
  }
  const Tensor h = torch::stable::empty_like(kept.up);
  hidden_into(h, mlp, kept);
  for (const Step& step : mlp.extents.stairs.steps)
    linear_into(rows(y, step.begin, step.end), columns(rows(h, step.begin, step.end), 0, step.extent),
                columns(mlp.w_down, 0, step.extent), mlp.b_down);
  return gather_rows(y, mlp.extents.inverse);
}

// The gradients of u and g, and s * h, sorted rows, each row written up to its extent.
struct Hidden {
  Tensor du, scaled;
  OptionalTensor dg;
};

// From the gradient of s * h in hidden.scaled.
void differentiate_hidden(const Mlp& mlp, const Hidden& hidden, const Kept& kept, const Step& step,
                          const OptionalTensor& dgate) {
  elementwise<true>(mlp, {.g = part_of(kept.gate, step),
                          .u = part_of(kept.up, step),
                          .h = part_of(hidden.scaled, step),
                          .dg = part_of(hidden.dg, step),
                          .du = part_of(hidden.du, step),
                          .dgate = dgate,
                          .row = step.begin,
                          .d = step.extent});
}

Hidden backward_hidden(const Mlp& mlp, const Tensor& dy, const Kept& kept, const OptionalTensor& dgate) {
  const auto room = [&] { return torch::stable::empty_like(kept.up); };
  const Hidden hidden{room(), room(), kept.gate ? OptionalTensor(room()) : std::nullopt};
  for (const Step& step : mlp.extents.stairs.steps) {
    matmul_into(part_of(hidden.scaled, step), rows(dy, step.begin, step.end),
                columns(mlp.w_down, 0, step.extent));
    differentiate_hidden(mlp, hidden, kept, step, dgate);
  }
  return hidden;
}

Tensor backward_input(const Mlp& mlp, const Hidden& hidden, const Tensor& x) {
  const Tensor dx = empty(x, {x.size(0), x.size(1)});
  for (const Step& step : mlp.extents.stairs.steps) {
    const auto part = [&](const Tensor& dhidden, const Tensor& weight, const Tensor& out) {
      matmul_into(out, columns(rows(dhidden, step.begin, step.end), 0, step.extent),
                  rows(weight, 0, step.extent));
    };
    const Tensor out = rows(dx, step.begin, step.end);
    if (!mlp.w_gate) {
      part(hidden.du, mlp.w_up, out);
      continue;
    }
    sum_of_blocks(out, 2, std::nullopt, [&](int64_t which, const Tensor& into) {
      which == 0 ? part(hidden.du, mlp.w_up, into) : part(*hidden.dg, *mlp.w_gate, into);
    });
  }
  return gather_rows(dx, mlp.extents.inverse);
}

// dw[:d] = dhidden^T x and db[:d] = the sum of dhidden, column block by column block; zeros beyond the widest
// token.
Tensor backward_up_weight(const Mlp& mlp, const Tensor& dhidden, const Tensor& x) {
  const Tensor dw = zeros_from(0, mlp.extents.widest(), x, {mlp.w_up.size(0), x.size(1)});
  for (const auto& b : column_blocks(mlp.extents.stairs))
    matmul_into(rows(dw, b.begin, b.end), transposed(columns(rows(dhidden, 0, b.rows), b.begin, b.end)),
                rows(x, 0, b.rows));
  return dw;
}
Tensor backward_up_bias(const Mlp& mlp, const Tensor& dhidden) {
  const Tensor db = zeros_from(0, mlp.extents.widest(), dhidden, {mlp.w_up.size(0)});
  for (const auto& b : column_blocks(mlp.extents.stairs))
    sum_rows_into(rows(db, b.begin, b.end), columns(rows(dhidden, 0, b.rows), b.begin, b.end));
  return db;
}
Tensor backward_down_weight(const Mlp& mlp, const Tensor& scaled, const Tensor& dy) {
  const Tensor dw = zeros_from(1, mlp.extents.widest(), dy, {mlp.w_down.size(0), mlp.w_down.size(1)});
  for (const auto& b : column_blocks(mlp.extents.stairs))
    matmul_into(columns(dw, b.begin, b.end), transposed(rows(dy, 0, b.rows)),
                columns(rows(scaled, 0, b.rows), b.begin, b.end));
  return dw;
}

// ---- the same with our own GEMM, whose hidden layer is floats ----

bool is_ours(const Mlp& mlp, const Tensor& x) {
  return is_ours_on_cpu(x, {&mlp.w_up, &mlp.w_down, mlp.w_gate ? &*mlp.w_gate : nullptr}) &&
         (!mlp.w_gate || mlp.w_gate->stride(0) == mlp.w_up.stride(0));
}

Tensor own_forward_keeping(const Mlp& mlp, const Tensor& x, const Kept& kept) {
  const int64_t K = x.size(1), N = mlp.w_down.size(0);
  const Tensor y = empty(x, {x.size(0), N});
  const std::vector<Step>& steps = mlp.extents.stairs.steps;
  const auto extent_of = [](const Step& step) { return step.extent; };
  const auto product = [&](ElasticGemmParams p, const FloatRows& a, const OptionalTensor& bias,
                           const Tensor& to, int64_t features, const auto& inputs, const auto& outputs) {
    const OptionalTensor bias_ = dense(bias);
    p.a = a.data;
    p.a_row = a.stride;
    p.features = features;
    p.bias[0] = data_or_null(bias_);
    p.io = gemm_dtype(x);
    p.y = to.mutable_data_ptr();
    p.y_row = to.stride(0);
    run_gemm({p, gemm_schedule(steps, inputs, outputs)});
  };
  const FloatRows x_rows = float_rows(x, mlp.extents.order);
  const auto up = [&](const Tensor& weight, const OptionalTensor& bias, const Tensor& to) {
    product(
        on_rows(weight), x_rows, bias, to, mlp.extents.widest(), [&](const Step&) { return K; }, extent_of);
  };
  up(mlp.w_up, mlp.b_up, kept.up);
  if (kept.gate) up(*mlp.w_gate, mlp.b_gate, *kept.gate);
  ElasticGemmParams down = on_rows(mlp.w_down);
  down.order = data_or_null<int64_t>(mlp.extents.order);
  const int64_t stride = padded_row(mlp.width);
  const Tensor h = empty(x, {x.size(0), stride}, ScalarType::Float);
  hidden_into(h, mlp, kept);
  product(down, {h, data_of<float>(h), stride}, mlp.b_down, y, N, extent_of, [&](const Step&) { return N; });
  return y;
}

// du and dg are one behind the other.
Hidden own_backward_hidden(const Mlp& mlp, const FloatRows& dy, const Kept& kept,
                           const OptionalTensor& dgate) {
  const int64_t T = kept.up.size(0), N = mlp.w_down.size(0), widest = mlp.extents.widest(),
                stride = padded_row(widest);
  const std::vector<Step>& steps = mlp.extents.stairs.steps;
  const auto extent_of = [](const Step& step) { return step.extent; };
  const Tensor both = empty(kept.up, {kept.gate ? 2 * T : T, stride}, ScalarType::Float);
  const Hidden hidden{rows(both, 0, T), empty(kept.up, {T, stride}, ScalarType::Float),
                      kept.gate ? OptionalTensor(rows(both, T, 2 * T)) : std::nullopt};
  const Tensor& w_down = mlp.w_down;
  ElasticGemmParams p =
      on_columns(w_down.const_data_ptr(), gemm_dtype(w_down), w_down.stride(0), hidden.scaled, 0);
  p.a = dy.data;
  p.a_row = dy.stride;
  p.features = widest;
  run_gemm({p, gemm_schedule(steps, [&](const Step&) { return N; }, extent_of)});
  for (const Step& step : steps) differentiate_hidden(mlp, hidden, kept, step, dgate);
  return hidden;
}

Tensor own_backward_input(const Mlp& mlp, const Hidden& hidden, const Tensor& x) {
  const Tensor dx = empty(x, {x.size(0), x.size(1)}), w_up = mlp.w_up;
  ElasticGemmParams p = on_columns(w_up.const_data_ptr(), gemm_dtype(w_up), w_up.stride(0), dx, 0);
  p.a = data_of<float>(hidden.du);
  p.a_row = hidden.du.stride(0);
  if (mlp.w_gate) {
    p.weight[1] = mlp.w_gate->const_data_ptr();
    p.in_blocks = 2;
    p.a_block = hidden.du.size(0) * p.a_row;
  }
  p.features = dx.size(1);
  p.order = data_or_null<int64_t>(mlp.extents.order);
  run_gemm({p, gemm_schedule(
                   mlp.extents.stairs.steps, [](const Step& step) { return step.extent; },
                   [&](const Step&) { return dx.size(1); })});
  return dx;
}

Tensor own_backward_up_weight(const Mlp& mlp, const Tensor& dhidden, const FloatRows& x_rows,
                              const Tensor& x) {
  const Tensor dw = zeros_from(0, mlp.extents.widest(), x, {mlp.w_up.size(0), x.size(1)});
  ElasticGemmParams p = on_columns(x_rows.data, GemmDtype::kFloat, x_rows.stride, dw, 0);
  p.a = data_of<float>(dhidden);
  p.a_row = 1;
  p.a_input = dhidden.stride(0);
  p.features = dw.size(1);
  run_gemm({p, gemm_schedule(
                   steps_of(column_blocks(mlp.extents.stairs)), [](const Step& step) { return step.extent; },
                   [&](const Step&) { return dw.size(1); })});
  return dw;
}

Tensor own_backward_down_weight(const Mlp& mlp, const Tensor& scaled, const FloatRows& dy_rows,
                                const Tensor& dy) {
  const Tensor dw = zeros_from(1, mlp.extents.widest(), dy, {mlp.w_down.size(0), mlp.w_down.size(1)});
  for (const ColumnBlock& b : column_blocks(mlp.extents.stairs)) {
    const Tensor part = columns(dw, b.begin, b.end);
    ElasticGemmParams p =
        on_columns(data_of<float>(scaled) + b.begin, GemmDtype::kFloat, scaled.stride(0), part, 0);
    p.a = dy_rows.data;
    p.a_row = 1;
    p.a_input = dy_rows.stride;
    p.features = b.end - b.begin;
    run_gemm({p, gemm_schedule(
                     {{b.rows, 0, dw.size(0)}}, [](const Step& step) { return step.extent; },
                     [&](const Step&) { return b.end - b.begin; })});
  }
  return dw;
}

// ---- on a GPU ----

// What its kernels take: rows of adjacent elements, and numbers within bounds.
Mlp for_kernels(Mlp mlp) {
  check_features(mlp.op, "w_up.size(0)", mlp.w_up.size(0));
  check_features(mlp.op, "w_up.size(1)", mlp.w_up.size(1));
  check_features(mlp.op, "w_down.size(0)", mlp.w_down.size(0));
  mlp.w_up = adjacent(mlp.w_up);
  mlp.w_down = adjacent(mlp.w_down);
  if (mlp.w_gate) mlp.w_gate = adjacent(*mlp.w_gate);
  for (OptionalTensor* const bias : {&mlp.b_gate, &mlp.b_up, &mlp.b_down})
    if (*bias) *bias = torch::stable::contiguous(**bias);
  return mlp;
}

template <class scalar_t>
ElasticMlpHiddenParams<scalar_t> hidden_params(const Mlp& mlp, const Tensor& x, const DeviceExtents& extents,
                                               const Tensor& h) {
  ElasticMlpHiddenParams<scalar_t> p{.x = data_of<scalar_t>(x),
                                     .w_gate = data_or_null<scalar_t>(mlp.w_gate),
                                     .w_up = data_of<scalar_t>(mlp.w_up),
                                     .b_gate = data_or_null<scalar_t>(mlp.b_gate),
                                     .b_up = data_or_null<scalar_t>(mlp.b_up),
                                     .h = mutable_data_of<scalar_t>(h),
                                     .extent = extents.data(),
                                     .gate = nullptr,
                                     .choices = {},
                                     .T = x.size(0),
                                     .K = x.size(1),
                                     .width = mlp.width,
                                     .C = 0,
                                     .x_stride = x.stride(0),
                                     .w_gate_stride = mlp.w_gate ? mlp.w_gate->stride(0) : 0,
                                     .w_up_stride = mlp.w_up.stride(0),
                                     .gate_stride = 0,
                                     .per_token = extents.per_token,
                                     .activation = mlp.activation};
  set_gate(p, mlp);
  return p;
}

// [T, width] before the activation: x w[:extent]^T + bias, zeros beyond.
template <class scalar_t>
ElasticLinearParams<scalar_t> up_params(const Mlp& mlp, const Tensor& x, const Tensor& weight,
                                        const OptionalTensor& bias, const DeviceExtents& extents,
                                        const Tensor& out) {
  return {.x = data_of<scalar_t>(x),
          .weight = data_of<scalar_t>(weight),
          .bias = data_or_null<scalar_t>(bias),
          .y = mutable_data_of<scalar_t>(out),
          .in_extent = nullptr,
          .out_extent = extents.data(),
          .T = x.size(0),
          .in_features = x.size(1),
          .out_features = mlp.width,
          .in_blocks = 1,
          .out_blocks = 1,
          .kx = x.size(1),
          .kw = weight.size(1),
          .nw = weight.size(0),
          .x_stride = x.stride(0),
          .weight_stride = weight.stride(0),
          .per_token = extents.per_token};
}

// y = h w_down[:, :extent]^T + b_down
template <class scalar_t>
ElasticLinearParams<scalar_t> down_params(const Mlp& mlp, const Tensor& h, const DeviceExtents& extents,
                                          const Tensor& y) {
  return {.x = data_of<scalar_t>(h),
          .weight = data_of<scalar_t>(mlp.w_down),
          .bias = data_or_null<scalar_t>(mlp.b_down),
          .y = mutable_data_of<scalar_t>(y),
          .in_extent = extents.data(),
          .out_extent = nullptr,
          .T = h.size(0),
          .in_features = mlp.width,
          .out_features = mlp.w_down.size(0),
          .in_blocks = 1,
          .out_blocks = 1,
          .kx = mlp.width,
          .kw = mlp.w_down.size(1),
          .nw = mlp.w_down.size(0),
          .x_stride = mlp.width,
          .weight_stride = mlp.w_down.stride(0),
          .per_token = extents.per_token};
}

// u, g, and h of both, which may lie where u does.
template <class scalar_t>
void launch_hidden_apart(const Mlp& mlp, const Tensor& x, const DeviceExtents& extents,
                         const OptionalTensor& g, const Tensor& u, const Tensor& h, CUstream_st* stream) {
  launch_elastic_linear(up_params<scalar_t>(mlp, x, mlp.w_up, mlp.b_up, extents, u), Gemm::kTile, stream);
  if (g)
    launch_elastic_linear(up_params<scalar_t>(mlp, x, *mlp.w_gate, mlp.b_gate, extents, *g), Gemm::kTile,
                          stream);
  elastic_mlp_rows_cuda(rows_params<scalar_t>(mlp, extents, g, u, h), stream);
}

Tensor forward_on_gpu(const Mlp& given, const Tensor& x, const OptionalTensor& extent) {
  const Mlp mlp = for_kernels(given);
  const bool fused = x.element_size() == 2;
  const DeviceExtents extents = device_extents(mlp.op, "extent", extent, x, mlp.gemm == Gemm::kTile);
  const Tensor x_ = adjacent(gather_rows(x, extents.order)), y = empty(x, {x.size(0), mlp.w_down.size(0)});
  if (y.numel() == 0) return y;
  const Tensor h = empty(x, {x.size(0), mlp.width});
  const OptionalTensor g =
      mlp.w_gate && !fused ? OptionalTensor(empty(x, {x.size(0), mlp.width})) : std::nullopt;

  dispatch_dtype(FloatingTypes{}, mlp.op, x.scalar_type(), [&]<class scalar_t>() {
    on_gpu_of(mlp.op, x, [&](auto stream) {
      AfterHidden after;
      if constexpr (sizeof(scalar_t) == 2) {
        after = launch_elastic_mlp_hidden(hidden_params<scalar_t>(mlp, x_, extents, h), mlp.gemm, stream);
      } else {
        launch_hidden_apart<scalar_t>(mlp, x_, extents, g, h, h, stream);
      }
      launch_elastic_linear(down_params<scalar_t>(mlp, h, extents, y), mlp.gemm, stream, after);
    });
  });
  return gather_rows(y, extents.inverse);
}

std::pair<Tensor, Kept> forward_keeping_on_gpu(const Mlp& given, const Tensor& x,
                                               const OptionalTensor& extent) {
  const Mlp mlp = for_kernels(given);
  const DeviceExtents extents = device_extents(mlp.op, "extent", extent, x, true);
  const std::vector<int64_t> shape{x.size(0), mlp.width};
  const Tensor x_ = adjacent(gather_rows(x, extents.order)), y = empty(x, {x.size(0), mlp.w_down.size(0)}),
               h = empty(x, shape);
  const Kept kept{empty(x, shape), mlp.w_gate ? OptionalTensor(empty(x, shape)) : std::nullopt};
  dispatch_dtype(FloatingTypes{}, mlp.op, x.scalar_type(), [&]<class scalar_t>() {
    on_gpu_of(mlp.op, x, [&](auto stream) {
      launch_hidden_apart<scalar_t>(mlp, x_, extents, kept.gate, kept.up, h, stream);
      launch_elastic_linear(down_params<scalar_t>(mlp, h, extents, y), Gemm::kTile, stream);
    });
  });
  return {gather_rows(y, extents.inverse), kept};
}

// The gradients wanted, in the order of elastic_mlp_backward's results.
struct Wanted {
  bool x, w_gate, w_up, w_down, b_gate, b_up, b_down, gate;
};

std::array<Tensor, 8> backward_on_gpu(const Mlp& given, const Tensor& dy, const Tensor& x,
                                      const OptionalTensor& extent, const Kept& kept, const Wanted& wanted) {
  const Mlp mlp = for_kernels(given);
  const DeviceExtents extents = device_extents(mlp.op, "extent", extent, x, true);
  const int64_t T = x.size(0), K = x.size(1), F = mlp.w_up.size(0), N = mlp.w_down.size(0);
  const Tensor dy_ = adjacent(gather_rows(dy, extents.order)), x_ = adjacent(gather_rows(x, extents.order));
  const Tensor du = empty(x, {T, mlp.width}), dh = empty(x, {T, mlp.width});
  const OptionalTensor dg = mlp.w_gate ? OptionalTensor(empty(x, {T, mlp.width})) : std::nullopt;
  const auto room = [&](bool is_wanted, const std::vector<int64_t>& shape) {
    return empty(x, is_wanted ? shape : std::vector<int64_t>{0});
  };
  std::array<Tensor, 8> d{room(wanted.x, {T, K}),    room(wanted.w_gate, {F, K}),
                          room(wanted.w_up, {F, K}), room(wanted.w_down, {N, F}),
                          room(wanted.b_gate, {F}),  room(wanted.b_up, {F}),
                          room(wanted.b_down, {N}),  room(false, {})};
  OptionalTensor dgate;
  if (wanted.gate) dgate = empty(*mlp.gate, {T, mlp.gate->size(1)});

  dispatch_dtype(FloatingTypes{}, mlp.op, x.scalar_type(), [&]<class scalar_t>() {
    // dx, dweight and dbias of the layer before the activation and of the one after it.
    ElasticLinearBackwardParams<scalar_t> up{.dy = data_of<scalar_t>(du),
                                             .dy2 = data_or_null<scalar_t>(dg),
                                             .x = data_of<scalar_t>(x_),
                                             .weight = data_of<scalar_t>(mlp.w_up),
                                             .weight2 = data_or_null<scalar_t>(mlp.w_gate),
                                             .dx = mutable_data_of<scalar_t>(d[0]),
                                             .dweight = mutable_data_of<scalar_t>(d[2]),
                                             .dbias = mutable_data_of<scalar_t>(d[5]),
                                             .in_extent = nullptr,
                                             .out_extent = extents.data(),
                                             .T = T,
                                             .in_features = K,
                                             .out_features = mlp.width,
                                             .in_blocks = 1,
                                             .out_blocks = 1,
                                             .kx = K,
                                             .kw = K,
                                             .nw = F,
                                             .dy_stride = mlp.width,
                                             .x_stride = x_.stride(0),
                                             .weight_stride = mlp.w_up.stride(0),
                                             .weight2_stride = mlp.w_gate ? mlp.w_gate->stride(0) : 0,
                                             .per_token = extents.per_token};
    ElasticLinearBackwardParams<scalar_t> gate = up;
    gate.dy = up.dy2;
    gate.dweight = mutable_data_of<scalar_t>(d[1]);
    gate.dbias = mutable_data_of<scalar_t>(d[4]);
    const ElasticLinearBackwardParams<scalar_t> down{.dy = data_of<scalar_t>(dy_),
                                                     .dy2 = nullptr,
                                                     .x = data_of<scalar_t>(dh),
                                                     .weight = data_of<scalar_t>(mlp.w_down),
                                                     .weight2 = nullptr,
                                                     .dx = mutable_data_of<scalar_t>(dh),
                                                     .dweight = mutable_data_of<scalar_t>(d[3]),
                                                     .dbias = mutable_data_of<scalar_t>(d[6]),
                                                     .in_extent = extents.data(),
                                                     .out_extent = nullptr,
                                                     .T = T,
                                                     .in_features = mlp.width,
                                                     .out_features = N,
                                                     .in_blocks = 1,
                                                     .out_blocks = 1,
                                                     .kx = mlp.width,
                                                     .kw = F,
                                                     .nw = N,
                                                     .dy_stride = dy_.stride(0),
                                                     .x_stride = mlp.width,
                                                     .weight_stride = mlp.w_down.stride(0),
                                                     .weight2_stride = 0,
                                                     .per_token = extents.per_token};
    on_gpu_of(mlp.op, x, [&](auto stream) {
      if (wanted.b_down) elastic_linear_backward_bias_cuda(down, stream);
      if (!(wanted.x || wanted.w_gate || wanted.w_up || wanted.w_down || wanted.b_gate || wanted.b_up ||
            wanted.gate))
        return;
      launch_elastic_linear_backward_input(down, stream);
      elastic_mlp_rows_backward_cuda(
          rows_backward_params<scalar_t>(mlp, extents, kept.gate, kept.up, dh, dg, du, dgate), stream);
      if (wanted.x) launch_elastic_linear_backward_input(up, stream);
      if (wanted.w_gate) launch_elastic_linear_backward_weight(gate, stream);
      if (wanted.w_up) launch_elastic_linear_backward_weight(up, stream);
      if (wanted.w_down) launch_elastic_linear_backward_weight(down, stream);
      if (wanted.b_gate) elastic_linear_backward_bias_cuda(gate, stream);
      if (wanted.b_up) elastic_linear_backward_bias_cuda(up, stream);
    });
  });
  if (wanted.x) d[0] = gather_rows(d[0], extents.inverse);
  if (dgate) d[7] = *dgate;
  return d;
}

}  // namespace

Tensor elastic_mlp(const Tensor& x, const OptionalTensor& w_gate, const Tensor& w_up, const Tensor& w_down,
                   const OptionalTensor& b_gate, const OptionalTensor& b_up, const OptionalTensor& b_down,
                   int64_t width, const Text& activation, const OptionalTensor& extent,
                   const OptionalTensor& gate, const std::optional<std::vector<int64_t>>& choices) {
  const NoGrad guard;
  const Mlp mlp = read_arguments("elastic_mlp", x, w_gate, w_up, w_down, b_gate, b_up, b_down, width,
                                 activation.value, extent, gate, choices);
  if (mlp.gemm != Gemm::kVendor) return forward_on_gpu(mlp, x, extent);
  if (!mlp.gate && is_ours(mlp, x)) {
    ElasticGemmParams up = on_rows(w_gate ? *w_gate : w_up);
    up.gated = w_gate.has_value();
    up.weight[1] = w_up.const_data_ptr();
    return mlp_on_cpu(up, on_rows(w_down), x, b_gate, b_up, b_down, w_down.size(0), mlp.activation,
                      mlp.extents);
  }
  const Tensor y = empty(x, {x.size(0), w_down.size(0)});
  const Tensor x_sorted = gather_rows(x, mlp.extents.order);
  for (const Step& step : mlp.extents.stairs.steps) forward_step(mlp, step, x_sorted, y);
  return gather_rows(y, mlp.extents.inverse);
}

std::tuple<Tensor, Tensor, Tensor> elastic_mlp_with_hidden(
    const Tensor& x, const OptionalTensor& w_gate, const Tensor& w_up, const Tensor& w_down,
    const OptionalTensor& b_gate, const OptionalTensor& b_up, const OptionalTensor& b_down, int64_t width,
    const Text& activation, const OptionalTensor& extent, const OptionalTensor& gate,
    const std::optional<std::vector<int64_t>>& choices) {
  const NoGrad guard;
  const Mlp mlp = read_arguments("elastic_mlp_with_hidden", x, w_gate, w_up, w_down, b_gate, b_up, b_down,
                                 width, activation.value, extent, gate, choices);
  const auto all = [&](const Tensor& y, const Kept& kept) {
    return std::tuple{y, kept.up, kept.gate ? *kept.gate : empty(x, {0})};
  };
  if (mlp.gemm != Gemm::kVendor) {
    const auto [y, kept] = forward_keeping_on_gpu(mlp, x, extent);
    return all(y, kept);
  }
  const Kept kept = room_for_kept(mlp, x);
  return all(is_ours(mlp, x) ? own_forward_keeping(mlp, x, kept) : forward_keeping(mlp, x, kept), kept);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> elastic_mlp_backward(
    const Tensor& dy, const Tensor& x, const OptionalTensor& w_gate, const Tensor& w_up, const Tensor& w_down,
    const OptionalTensor& b_gate, const OptionalTensor& b_up, const OptionalTensor& b_down, int64_t width,
    const Text& activation, const OptionalTensor& extent, const OptionalTensor& gate,
    const std::optional<std::vector<int64_t>>& choices, const Tensor& hidden_up, const Tensor& hidden_gate,
    int64_t output_mask) {
  constexpr auto op = "elastic_mlp_backward";
  const NoGrad guard;
  const Mlp mlp = read_arguments(op, x, w_gate, w_up, w_down, b_gate, b_up, b_down, width, activation.value,
                                 extent, gate, choices);
  check_like(op, "dy", dy, {x.size(0), w_down.size(0)}, x.scalar_type(), x.device());
  check_range(op, "output_mask", output_mask, 0, 255);
  check_like(op, "hidden_up", hidden_up, {x.size(0), mlp.width}, x.scalar_type(), x.device());
  if (w_gate) check_like(op, "hidden_gate", hidden_gate, {x.size(0), mlp.width}, x.scalar_type(), x.device());
  const Kept kept{torch::stable::contiguous(hidden_up),
                  w_gate ? OptionalTensor(torch::stable::contiguous(hidden_gate)) : std::nullopt};
  const auto wanted = [&](int64_t bit, bool exists) { return (output_mask >> bit & 1) && exists; };
  // The gradient of a gate for all tokens is the sum of theirs.
  const auto of_gate = [&](const Tensor& dgate) {
    Tensor total = dgate;
    if (gate->size(0) != x.size(0)) sum_rows_into(total = empty(dgate, {gate->size(1)}), dgate);
    return torch::stable::to(torch::stable::view(total, gate->sizes()), gate->scalar_type());
  };
  std::array<Tensor, 8> d;
  if (mlp.gemm != Gemm::kVendor) {
    const Wanted all{.x = wanted(0, true),
                     .w_gate = wanted(1, w_gate.has_value()),
                     .w_up = wanted(2, true),
                     .w_down = wanted(3, true),
                     .b_gate = wanted(4, b_gate.has_value()),
                     .b_up = wanted(5, b_up.has_value()),
                     .b_down = wanted(6, b_down.has_value()),
                     .gate = wanted(7, gate.has_value())};
    d = backward_on_gpu(mlp, dy, x, extent, kept, all);
    if (all.gate) d[7] = of_gate(d[7]);
    return {d[0], d[1], d[2], d[3], d[4], d[5], d[6], d[7]};
  }
  for (Tensor& gradient : d) gradient = empty(x, {0});

  if (wanted(6, b_down.has_value())) sum_rows_into(d[6] = empty(x, {w_down.size(0)}), dy);
  if (output_mask & ~int64_t{64}) {
    const OptionalTensor& order = mlp.extents.order;
    OptionalTensor dgate;
    if (wanted(7, gate.has_value())) dgate = zeros(*mlp.gate, {x.size(0), gate->size(1)});
    std::optional<Hidden> hidden;
    if (is_ours(mlp, x)) {
      const FloatRows dy_rows = float_rows(dy, order), x_rows = float_rows(x, order);
      hidden = own_backward_hidden(mlp, dy_rows, kept, dgate);
      if (wanted(0, true)) d[0] = own_backward_input(mlp, *hidden, x);
      const bool own = is_own_weight_gradient(x);
      const auto up_weight = [&](const Tensor& dhidden) {
        return own ? own_backward_up_weight(mlp, dhidden, x_rows, x)
                   : backward_up_weight(mlp, dhidden, x_rows.first(x.size(1)));
      };
      if (wanted(1, w_gate.has_value())) d[1] = up_weight(*hidden->dg);
      if (wanted(2, true)) d[2] = up_weight(hidden->du);
      if (wanted(3, true))
        d[3] = own ? own_backward_down_weight(mlp, hidden->scaled, dy_rows, dy)
                   : backward_down_weight(mlp, hidden->scaled, dy_rows.first(dy.size(1)));
    } else {
      const Tensor dy_sorted = gather_rows(dy, order), x_sorted = gather_rows(x, order);
      hidden = backward_hidden(mlp, dy_sorted, kept, dgate);
      if (wanted(0, true)) d[0] = backward_input(mlp, *hidden, x_sorted);
      if (wanted(1, w_gate.has_value())) d[1] = backward_up_weight(mlp, *hidden->dg, x_sorted);
      if (wanted(2, true)) d[2] = backward_up_weight(mlp, hidden->du, x_sorted);
      if (wanted(3, true)) d[3] = backward_down_weight(mlp, hidden->scaled, dy_sorted);
    }
    const auto bias_gradient = [&](const Tensor& dhidden) {
      return torch::stable::to(backward_up_bias(mlp, dhidden), x.scalar_type());
    };
    if (wanted(4, b_gate.has_value())) d[4] = bias_gradient(*hidden->dg);
    if (wanted(5, b_up.has_value())) d[5] = bias_gradient(hidden->du);
    if (dgate) d[7] = of_gate(*dgate);
  }
  return {d[0], d[1], d[2], d[3], d[4], d[5], d[6], d[7]};
}

}  // namespace flextron
