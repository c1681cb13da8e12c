// elastic_linear: checks, allocation and launch; the formula is in csrc/kernels/elastic_linear.h.
//
// On the CPU all is our own GEMM (elastic_gemm.h) where it is faster, the vendor's on views elsewhere: no
// weight is copied, and there an extent per token is one GEMM per distinct extent on the sorted tokens. On a
// GPU the kernels read the extents where they are; where the host knows them the vendor's GEMM can be asked
// for (elastic_kernels.h).
#include "kernels/elastic_linear.h"

#include "core/staircase.h"
#include "ops/device.h"
#include "ops/dispatch.h"
#include "ops/elastic_gemm.h"
#include "ops/elastic_kernels.h"
#include "ops/extents.h"
#include "ops/gemm.h"
#include "ops/ops.h"

namespace flextron {
namespace {

// One side of the weight: `blocks` blocks, each `features` wide in the activation and `stride` in the weight,
// of which the first `used` count.
struct Side {
  int64_t blocks, features, stride, used;

  // Blocks that touch each other on both sides are one block.
  void join() {
    if (used != features || used != stride) return;
    *this = {1, blocks * features, blocks * stride, blocks * used};
  }
};

struct Plan {
  Side in, out;
  Extents extents;
  bool per_token_in, per_token_out;  // at most one of them

  // For the vendor's GEMM, which has the fewer calls to do. Our own makes the chains of a sum block by block.
  void join() {
    if (!per_token_in) in.join();
    if (!per_token_out) out.join();
  }

  // Whether every feature of the side is used by every row: then all of its gradient is written.
  bool whole_in() const { return !per_token_in && in.used == in.features && in.used == in.stride; }
  bool whole_out() const { return !per_token_out && out.used == out.stride; }

  int64_t in_used(const Step& step) const { return per_token_in ? step.extent : in.used; }
  int64_t out_used(const Step& step) const { return per_token_out ? step.extent : out.used; }
};

int64_t block_width(const char* op, const char* name, int64_t size, const char* blocks_name, int64_t blocks) {
  check_positive(op, blocks_name, blocks);
  if (size % blocks != 0)
    fail(op, ": ", name, " must be divisible by ", blocks_name, " (", blocks, "), got ", size);
  return size / blocks;
}

struct BlockWidths {
  int64_t kx, kw, nw;  // of a block in x's columns, weight's columns and weight's rows
};

// Everything but the extents' values.
BlockWidths check_arguments(const char* op, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                            int64_t in_features, int64_t out_features, const OptionalTensor& in_extent,
                            const OptionalTensor& out_extent, int64_t in_blocks, int64_t out_blocks) {
  check_dim(op, "x", x, 2);
  check_floating(op, "x", x);
  check_dim(op, "weight", weight, 2);
  check_dtype(op, "weight", weight, x.scalar_type());
  check_device(op, "weight", weight, x.device());
  if (bias) check_like(op, "bias", *bias, {weight.size(0)}, x.scalar_type(), x.device());
  const int64_t kx = block_width(op, "x.size(1)", x.size(1), "in_blocks", in_blocks);
  const int64_t kw = block_width(op, "weight.size(1)", weight.size(1), "in_blocks", in_blocks);
  const int64_t nw = block_width(op, "weight.size(0)", weight.size(0), "out_blocks", out_blocks);
  check_range(op, "in_features", in_features, 0, std::min(kx, kw));
  check_range(op, "out_features", out_features, 0, nw);
  if (in_extent && out_extent) fail(op, ": in_extent must be None when out_extent is given, got both");
  return {kx, kw, nw};
}

Plan make_plan(const char* op, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
               int64_t in_features, int64_t out_features, const OptionalTensor& in_extent,
               const OptionalTensor& out_extent, int64_t in_blocks, int64_t out_blocks) {
  const auto [kx, kw, nw] = check_arguments(op, x, weight, bias, in_features, out_features, in_extent,
                                            out_extent, in_blocks, out_blocks);
  Plan plan{.in = {in_blocks, kx, kw, in_features},
            .out = {out_blocks, out_features, nw, out_features},
            .extents = in_extent ? read_extents(op, "in_extent", in_extent, x, in_features)
                                 : read_extents(op, "out_extent", out_extent, x, out_features),
            .per_token_in = false,
            .per_token_out = false};
  if (plan.extents.flat()) {
    if (in_extent && x.size(0) > 0) plan.in.used = plan.extents.widest();
    if (out_extent && x.size(0) > 0) plan.out.used = plan.extents.widest();
  } else {
    plan.per_token_in = in_extent.has_value();
    plan.per_token_out = out_extent.has_value();
  }
  return plan;
}

// y rows of one step: x_rows [n, in.blocks*in.features] -> y_rows [n, out.blocks*out.features].
void forward_step(const Plan& plan, const Step& step, const Tensor& x_rows, const Tensor& weight,
                  const OptionalTensor& bias, const Tensor& y_rows) {
  const int64_t in_used = plan.in_used(step), out_used = plan.out_used(step);
  for (int64_t ob = 0; ob < plan.out.blocks; ++ob) {
    const int64_t n0 = ob * plan.out.stride, y0 = ob * plan.out.features;
    const Tensor out = columns(y_rows, y0, y0 + out_used);
    const Tensor weight_rows = rows(weight, n0, n0 + out_used);
    const OptionalTensor bias_part = bias ? OptionalTensor(slice(*bias, 0, n0, n0 + out_used)) : std::nullopt;
    if (plan.in.blocks == 1) {
      linear_into(out, columns(x_rows, 0, in_used), columns(weight_rows, 0, in_used), bias_part);
      continue;
    }
    sum_of_blocks(out, plan.in.blocks, bias_part, [&](int64_t ib, const Tensor& part) {
      const int64_t x0 = ib * plan.in.features, k0 = ib * plan.in.stride;
      matmul_into(part, columns(x_rows, x0, x0 + in_used),
                  transposed(columns(weight_rows, k0, k0 + in_used)));
    });
  }
}

// dx rows of one step, the blocks' prefixes only.
void backward_input_step(const Plan& plan, const Step& step, const Tensor& dy_rows, const Tensor& weight,
                         const Tensor& dx_rows) {
  const int64_t in_used = plan.in_used(step), out_used = plan.out_used(step);
  for (int64_t ib = 0; ib < plan.in.blocks; ++ib) {
    const int64_t x0 = ib * plan.in.features, k0 = ib * plan.in.stride;
    const Tensor out = columns(dx_rows, x0, x0 + in_used);
    const Tensor weight_columns = columns(weight, k0, k0 + in_used);
    const auto part_of = [&](int64_t ob, const Tensor& part) {
      const int64_t n0 = ob * plan.out.stride, y0 = ob * plan.out.features;
      matmul_into(part, columns(dy_rows, y0, y0 + out_used), rows(weight_columns, n0, n0 + out_used));
    };
    if (plan.out.blocks == 1)
      part_of(0, out);
    else
      sum_of_blocks(out, plan.out.blocks, std::nullopt, part_of);
  }
}

// The columns of one side with the rows that use them: the staircase where it is per token, one block
// otherwise.
std::vector<ColumnBlock> blocks_of(const Plan& plan, bool per_token, int64_t used, int64_t T) {
  if (per_token) return column_blocks(plan.extents.stairs);
  return {{0, used, T}};
}

void backward_weight(const Plan& plan, const Tensor& dy, const Tensor& x, const Tensor& dweight) {
  const auto in_ranges = blocks_of(plan, plan.per_token_in, plan.in.used, x.size(0));
  const auto out_ranges = blocks_of(plan, plan.per_token_out, plan.out.used, x.size(0));
  for (int64_t ob = 0; ob < plan.out.blocks; ++ob)
    for (const auto& n : out_ranges) {
      const int64_t n0 = ob * plan.out.stride, y0 = ob * plan.out.features;
      const Tensor dweight_rows = rows(dweight, n0 + n.begin, n0 + n.end);
      const Tensor dy_columns = columns(dy, y0 + n.begin, y0 + n.end);
      for (int64_t ib = 0; ib < plan.in.blocks; ++ib)
        for (const auto& k : in_ranges) {
          const int64_t count = std::min(n.rows, k.rows), x0 = ib * plan.in.features,
                        k0 = ib * plan.in.stride;
          matmul_into(columns(dweight_rows, k0 + k.begin, k0 + k.end), transposed(rows(dy_columns, 0, count)),
                      rows(columns(x, x0 + k.begin, x0 + k.end), 0, count));
        }
    }
}

void backward_bias(const Plan& plan, const Tensor& dy, const Tensor& dbias) {
  for (int64_t ob = 0; ob < plan.out.blocks; ++ob)
    for (const auto& n : blocks_of(plan, plan.per_token_out, plan.out.used, dy.size(0))) {
      const int64_t n0 = ob * plan.out.stride, y0 = ob * plan.out.features;
      sum_rows_into(slice(dbias, 0, n0 + n.begin, n0 + n.end),
                    rows(columns(dy, y0 + n.begin, y0 + n.end), 0, n.rows));
    }
}

// ---- the same with our own GEMM ----

void backward_input(const Plan& plan, const FloatRows& dy, const Tensor& weight, const Tensor& dx) {
  ElasticGemmParams p =
      on_columns(weight.const_data_ptr(), gemm_dtype(weight), weight.stride(0), dx, plan.in.features);
  p.a = dy.data;
  p.a_row = dy.stride;
  p.a_block = plan.out.features;
  p.in_blocks = plan.out.blocks;
  p.in_stride = plan.out.stride;
  p.out_blocks = plan.in.blocks;
  p.out_stride = plan.in.stride;
  p.features = plan.per_token_in ? plan.extents.widest() : plan.in.used;
  p.order = data_or_null<int64_t>(plan.extents.order);
  run_gemm({p, gemm_schedule(
                   plan.extents.stairs.steps, [&](const Step& step) { return plan.out_used(step); },
                   [&](const Step& step) { return plan.in_used(step); })});
}

void backward_weight(const Plan& plan, int64_t T, const FloatRows& dy, const FloatRows& x,
                     const Tensor& dweight) {
  const std::vector<Step> steps = steps_of(blocks_of(plan, plan.per_token_out, plan.out.used, T));
  for (int64_t ob = 0; ob < plan.out.blocks; ++ob)
    for (const auto& k : blocks_of(plan, plan.per_token_in, plan.in.used, T)) {
      const int64_t n0 = ob * plan.out.stride;
      const Tensor part = columns(rows(dweight, n0, n0 + plan.out.stride), k.begin, dweight.size(1));
      ElasticGemmParams p = on_columns(x.data + k.begin, GemmDtype::kFloat, x.stride, part, plan.in.stride);
      p.a = dy.data + ob * plan.out.features;
      p.a_row = 1;
      p.a_input = dy.stride;
      p.out_blocks = plan.in.blocks;
      p.out_stride = plan.in.features;
      p.features = k.end - k.begin;
      run_gemm({p, gemm_schedule(
                       steps, [&](const Step& step) { return std::min(step.extent, k.rows); },
                       [&](const Step&) { return k.end - k.begin; })});
    }
}

// ---- on a GPU: one kernel for each result, whatever the extents ----

BlockWidths check_gpu_arguments(const char* op, const Tensor& x, const Tensor& weight,
                                const OptionalTensor& bias, int64_t in_features, int64_t out_features,
                                const OptionalTensor& in_extent, const OptionalTensor& out_extent,
                                int64_t in_blocks, int64_t out_blocks) {
  const BlockWidths widths = check_arguments(op, x, weight, bias, in_features, out_features, in_extent,
                                             out_extent, in_blocks, out_blocks);
  check_features(op, "x.size(1)", x.size(1));
  check_features(op, "weight.size(0)", weight.size(0));
  check_features(op, "weight.size(1)", weight.size(1));
  return widths;
}

DeviceExtents extents_of(const char* op, const Tensor& x, const OptionalTensor& in_extent,
                         const OptionalTensor& out_extent, bool sorted) {
  return in_extent ? device_extents(op, "in_extent", in_extent, x, sorted)
                   : device_extents(op, "out_extent", out_extent, x, sorted);
}

Tensor forward_on_gpu(const char* op, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                      int64_t in_features, int64_t out_features, const OptionalTensor& in_extent,
                      const OptionalTensor& out_extent, int64_t in_blocks, int64_t out_blocks, Gemm gemm) {
  const auto [kx, kw, nw] = check_gpu_arguments(op, x, weight, bias, in_features, out_features, in_extent,
                                                out_extent, in_blocks, out_blocks);
  const DeviceExtents extents = extents_of(op, x, in_extent, out_extent, gemm == Gemm::kTile);
  const Tensor y = empty(x, {x.size(0), out_blocks * out_features});
  if (y.numel() == 0) return y;
  const Tensor x_ = adjacent(gather_rows(x, extents.order)), weight_ = adjacent(weight);
  const OptionalTensor bias_ = bias ? OptionalTensor(torch::stable::contiguous(*bias)) : std::nullopt;

  dispatch_dtype(FloatingTypes{}, op, x.scalar_type(), [&]<class scalar_t>() {
    const ElasticLinearParams<scalar_t> p{.x = data_of<scalar_t>(x_),
                                          .weight = data_of<scalar_t>(weight_),
                                          .bias = bias_ ? data_of<scalar_t>(*bias_) : nullptr,
                                          .y = mutable_data_of<scalar_t>(y),
                                          .in_extent = in_extent ? extents.data() : nullptr,
                                          .out_extent = out_extent ? extents.data() : nullptr,
                                          .T = x.size(0),
                                          .in_features = in_features,
                                          .out_features = out_features,
                                          .in_blocks = in_blocks,
                                          .out_blocks = out_blocks,
                                          .kx = kx,
                                          .kw = kw,
                                          .nw = nw,
                                          .x_stride = x_.stride(0),
                                          .weight_stride = weight_.stride(0),
                                          .per_token = extents.per_token};
    on_gpu_of(op, x, [&](auto stream) { launch_elastic_linear(p, gemm, stream); });
  });
  return gather_rows(y, extents.inverse);
}

std::tuple<Tensor, Tensor, Tensor> backward_on_gpu(const char* op, const Tensor& dy, const Tensor& x,
                                                   const Tensor& weight, const OptionalTensor& bias,
                                                   int64_t in_features, int64_t out_features,
                                                   const OptionalTensor& in_extent,
                                                   const OptionalTensor& out_extent, int64_t in_blocks,
                                                   int64_t out_blocks, int64_t output_mask) {
  const auto [kx, kw, nw] = check_gpu_arguments(op, x, weight, bias, in_features, out_features, in_extent,
                                                out_extent, in_blocks, out_blocks);
  const bool wants_x = output_mask & 1, wants_weight = output_mask & 2,
             wants_bias = (output_mask & 4) && bias;
  const DeviceExtents extents = extents_of(op, x, in_extent, out_extent, true);
  const Tensor dy_ = adjacent(gather_rows(dy, extents.order)), weight_ = adjacent(weight);
  const Tensor x_ = wants_weight ? adjacent(gather_rows(x, extents.order)) : x;
  const auto room = [&](bool is_wanted, const std::vector<int64_t>& shape) {
    return empty(x, is_wanted ? shape : std::vector<int64_t>{0});
  };
  const Tensor dx = room(wants_x, {x.size(0), x.size(1)});
  const Tensor dweight = room(wants_weight, {weight.size(0), weight.size(1)});
  const Tensor dbias = room(wants_bias, {weight.size(0)});

  dispatch_dtype(FloatingTypes{}, op, x.scalar_type(), [&]<class scalar_t>() {
    const ElasticLinearBackwardParams<scalar_t> p{.dy = data_of<scalar_t>(dy_),
                                                  .dy2 = nullptr,
                                                  .x = data_of<scalar_t>(x_),
                                                  .weight = data_of<scalar_t>(weight_),
                                                  .weight2 = nullptr,
                                                  .dx = mutable_data_of<scalar_t>(dx),
                                                  .dweight = mutable_data_of<scalar_t>(dweight),
                                                  .dbias = mutable_data_of<scalar_t>(dbias),
                                                  .in_extent = in_extent ? extents.data() : nullptr,
                                                  .out_extent = out_extent ? extents.data() : nullptr,
                                                  .T = x.size(0),
                                                  .in_features = in_features,
                                                  .out_features = out_features,
                                                  .in_blocks = in_blocks,
                                                  .out_blocks = out_blocks,
                                                  .kx = kx,
                                                  .kw = kw,
                                                  .nw = nw,
                                                  .dy_stride = dy_.stride(0),
                                                  .x_stride = x_.stride(0),
                                                  .weight_stride = weight_.stride(0),
                                                  .weight2_stride = 0,
                                                  .per_token = extents.per_token};
    on_gpu_of(op, x, [&](auto stream) {
      if (wants_x) launch_elastic_linear_backward_input(p, stream);
      if (wants_weight) launch_elastic_linear_backward_weight(p, stream);
      if (wants_bias) elastic_linear_backward_bias_cuda(p, stream);
    });
  });
  return {wants_x ? gather_rows(dx, extents.inverse) : dx, dweight, dbias};
}

}  // namespace

Tensor elastic_linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, int64_t in_features,
                      int64_t out_features, const OptionalTensor& in_extent, const OptionalTensor& out_extent,
                      int64_t in_blocks, int64_t out_blocks) {
  constexpr auto op = "elastic_linear";
  const NoGrad guard;
  check_dim(op, "x", x, 2);
  if (const Gemm gemm = gemm_of(x, in_extent || out_extent); gemm != Gemm::kVendor)
    return forward_on_gpu(op, x, weight, bias, in_features, out_features, in_extent, out_extent, in_blocks,
                          out_blocks, gemm);
  if (is_ours_on_cpu(x, {&weight})) {
    check_arguments(op, x, weight, bias, in_features, out_features, in_extent, out_extent, in_blocks,
                    out_blocks);
    const Extents extents = in_extent ? read_extents(op, "in_extent", in_extent, x, in_features)
                                      : read_extents(op, "out_extent", out_extent, x, out_features);
    return linear_on_cpu(on_rows(weight, in_blocks, out_blocks), x, bias, in_features, out_features,
                         in_extent.has_value(), out_extent.has_value(), extents);
  }
  Plan plan =
      make_plan(op, x, weight, bias, in_features, out_features, in_extent, out_extent, in_blocks, out_blocks);
  plan.join();
  const std::vector<int64_t> shape{x.size(0), out_blocks * out_features};
  const bool whole = !plan.per_token_out && plan.out.used == plan.out.features;
  const Tensor y = whole ? empty(x, shape) : zeros(x, shape);
  const Tensor x_sorted = gather_rows(x, plan.extents.order);
  for (const Step& step : plan.extents.stairs.steps)
    forward_step(plan, step, rows(x_sorted, step.begin, step.end), weight, bias,
                 rows(y, step.begin, step.end));
  return gather_rows(y, plan.extents.inverse);
}

std::tuple<Tensor, Tensor, Tensor> elastic_linear_backward(
    const Tensor& dy, const Tensor& x, const Tensor& weight, const OptionalTensor& bias, int64_t in_features,
    int64_t out_features, const OptionalTensor& in_extent, const OptionalTensor& out_extent,
    int64_t in_blocks, int64_t out_blocks, int64_t output_mask) {
  constexpr auto op = "elastic_linear_backward";
  const NoGrad guard;
  check_dim(op, "x", x, 2);
  check_like(op, "dy", dy, {x.size(0), out_blocks * out_features}, x.scalar_type(), x.device());
  check_range(op, "output_mask", output_mask, 0, 7);
  if (gemm_of(x, in_extent || out_extent) != Gemm::kVendor)
    return backward_on_gpu(op, dy, x, weight, bias, in_features, out_features, in_extent, out_extent,
                           in_blocks, out_blocks, output_mask);
  Plan plan =
      make_plan(op, x, weight, bias, in_features, out_features, in_extent, out_extent, in_blocks, out_blocks);
  const bool ours = is_ours_on_cpu(x, {&weight});
  if (!ours) plan.join();

  const OptionalTensor& order = plan.extents.order;
  const std::vector<int64_t> x_shape{x.size(0), x.size(1)}, weight_shape{weight.size(0), weight.size(1)};
  Tensor dx = empty(x, {0}), dweight = empty(x, {0}), dbias = empty(x, {0});
  if (output_mask & 1) dx = plan.whole_in() ? empty(x, x_shape) : zeros(x, x_shape);
  if (output_mask & 2) {
    // The rows that are written lead: a block's first ones, or all.
    const bool leads = plan.whole_in() && (plan.out.blocks == 1 || plan.whole_out());
    const int64_t used = plan.per_token_out ? plan.extents.widest() : plan.out.used;
    dweight = leads ? zeros_from(0, plan.out.blocks * used, x, weight_shape) : zeros(x, weight_shape);
  }
  if ((output_mask & 4) && bias) {
    dbias = zeros(x, {weight.size(0)});
    backward_bias(plan, gather_rows(dy, order), dbias);
  }
  if (ours) {
    const FloatRows dy_rows = float_rows(dy, order);
    if (dx.numel() != 0) backward_input(plan, dy_rows, weight, dx);
    if (dweight.numel() == 0) return {dx, dweight, dbias};
    const FloatRows x_rows = float_rows(x, order);
    if (is_own_weight_gradient(x)) {
      backward_weight(plan, x.size(0), dy_rows, x_rows, dweight);
    } else {
      plan.join();
      backward_weight(plan, dy_rows.first(dy.size(1)), x_rows.first(x.size(1)), dweight);
    }
    return {dx, dweight, dbias};
  }
  const Tensor dy_sorted = gather_rows(dy, order);
  if (output_mask & 1) {
    for (const Step& step : plan.extents.stairs.steps)
      backward_input_step(plan, step, rows(dy_sorted, step.begin, step.end), weight,
                          rows(dx, step.begin, step.end));
    dx = gather_rows(dx, plan.extents.inverse);
  }
  if (output_mask & 2) backward_weight(plan, dy_sorted, gather_rows(x, order), dweight);
  return {dx, dweight, dbias};
}

}  // namespace flextron
