// elastic_linear by our own GEMM on a CPU (csrc/kernels/elastic_gemm.h); packed_linear is its forward.
#include "ops/linear/executors.h"

namespace flextron::linear {
namespace {

GemmJob input_gradient(const Linear& linear, const Sides& sides, const Tensor& dy, const Tensor& dx) {
  const Tensor& weight = linear.weight;
  ElasticGemmParams p = on_columns(weight, 0, dx, sides.in.features);
  p.pairs = in_pairs(dx, p.layout);
  read_along(p, dy);
  p.a_block = sides.out.features;
  p.in_blocks = sides.out.blocks;
  p.in_stride = sides.out.stride;
  p.out_blocks = sides.in.blocks;
  p.out_stride = sides.in.stride;
  p.features = sides.per_token_in ? sides.extents.widest() : sides.in.used;
  p.order = data_or_null<int64_t>(sides.extents.order);
  return {p, gemm_schedule(
                 p, sides.extents.stairs.steps, [&](const Step& step) { return sides.out_used(step); },
                 [&](const Step& step) { return sides.in_used(step); })};
}

void add_weight_gradient(const Linear& linear, const Sides& sides, const Tensor& dy, const Tensor& x,
                         const Tensor& dweight, std::vector<GemmJob>& jobs) {
  const int64_t T = linear.x.size(0);
  const std::vector<Step> steps = steps_of(sides.out_columns(T));
  for (int64_t ob = 0; ob < sides.out.blocks; ++ob)
    for (const ColumnBlock& k : sides.in_columns(T)) {
      const int64_t n0 = ob * sides.out.stride;
      const Tensor part = columns(rows(dweight, n0, n0 + sides.out.stride), k.begin, dweight.size(1));
      ElasticGemmParams p = on_columns(x, k.begin, part, sides.in.stride);
      p.pairs = in_pairs(dweight, p.layout);
      read_across(p, dy, ob * sides.out.features);
      p.out_blocks = sides.in.blocks;
      p.out_stride = sides.in.features;
      p.features = k.end - k.begin;
      jobs.push_back({p, gemm_schedule(
                             p, steps, [&](const Step& step) { return std::min(step.extent, k.rows); },
                             [&](const Step&) { return k.end - k.begin; })});
    }
}

}  // namespace

Tensor product_on_panels(const Linear& linear, ElasticGemmParams p) {
  const Tensor& x = linear.x;
  const Extents& extents = linear.extents;
  const bool in_extent = linear.in_extent.has_value(), out_extent = linear.out_extent.has_value();
  const Tensor y = out_extent ? zeros(x, linear.y_shape()) : empty(x, linear.y_shape());
  if (y.numel() == 0) return y;
  const OptionalTensor bias = dense(linear.bias);
  p.pairs = !p.quantised && in_pairs(x, p.layout);
  const Tensor x_rows = read_rows(p, x, extents.order);
  p.a_block = x.size(1) / linear.in_blocks;
  p.features = out_extent ? extents.widest() : linear.out_features;
  p.bias[0] = data_or_null(bias);
  p.bias_block = bias ? bias->size(0) / linear.out_blocks : 0;
  p.io = gemm_dtype(x);
  p.y = y.mutable_data_ptr();
  p.y_row = y.size(1);
  p.y_block = linear.out_features;
  p.order = data_or_null<int64_t>(extents.order);
  run_gemm({p, gemm_schedule(
                   p, extents.stairs.steps,
                   [&](const Step& step) { return in_extent ? step.extent : linear.in_features; },
                   [&](const Step& step) { return out_extent ? step.extent : linear.out_features; })});
  return y;
}

Tensor forward_on_panels(const Linear& linear) {
  return product_on_panels(linear, on_rows(linear.weight, linear.in_blocks, linear.out_blocks));
}

Gradients backward_on_panels(const Linear& linear, const Tensor& dy, const Wanted& wanted,
                             Executor weight_gradient_executor) {
  const Tensor& x = linear.x;
  Sides sides = sides_of(linear);
  Gradients d = room_and_bias_gradient(linear, sides, dy, wanted);
  const Tensor dy_rows = gradient_rows(dy, linear.extents.order);
  std::vector<GemmJob> jobs;
  if (d.x.numel() != 0) jobs.push_back(input_gradient(linear, sides, dy_rows, d.x));
  if (d.weight.numel() == 0) {
    run_gemms(std::move(jobs));
    return d;
  }
  const Tensor x_rows = gradient_rows(x, linear.extents.order);
  if (weight_gradient_executor == Executor::kPanels) {
    add_weight_gradient(linear, sides, dy_rows, x_rows, d.weight, jobs);
    run_gemms(std::move(jobs));
  } else {
    run_gemms(std::move(jobs));
    sides.join();
    weight_gradient_on_views(sides, columns(dy_rows, 0, dy.size(1)), columns(x_rows, 0, x.size(1)), d.weight);
  }
  return d;
}

}  // namespace flextron::linear
