// elastic_linear by the vendor's GEMM (MKL, cuBLAS) on views: no weight is copied, and an extent per token is
// one GEMM per distinct extent on the sorted tokens.
#include "ops/gemm.h"
#include "ops/linear/executors.h"

namespace flextron::linear {
namespace {

// y rows of one step: x_rows [n, in.blocks * in.features] -> y_rows [n, out.blocks * out.features].
void forward_step(const Linear& linear, const Sides& sides, const Step& step, const Tensor& x_rows,
                  const Tensor& y_rows) {
  const int64_t in_used = sides.in_used(step), out_used = sides.out_used(step);
  for (int64_t ob = 0; ob < sides.out.blocks; ++ob) {
    const int64_t n0 = ob * sides.out.stride, y0 = ob * sides.out.features;
    const Tensor out = columns(y_rows, y0, y0 + out_used);
    const Tensor weight_rows = rows(linear.weight, n0, n0 + out_used);
    const OptionalTensor bias =
        linear.bias ? OptionalTensor(slice(*linear.bias, 0, n0, n0 + out_used)) : std::nullopt;
    if (sides.in.blocks == 1) {
      linear_into(out, columns(x_rows, 0, in_used), columns(weight_rows, 0, in_used), bias);
      continue;
    }
    sum_of_blocks(out, sides.in.blocks, bias, [&](int64_t ib, const Tensor& part) {
      const int64_t x0 = ib * sides.in.features, k0 = ib * sides.in.stride;
      matmul_into(part, columns(x_rows, x0, x0 + in_used),
                  transposed(columns(weight_rows, k0, k0 + in_used)));
    });
  }
}

// dx rows of one step, the blocks' prefixes only.
void input_gradient_step(const Linear& linear, const Sides& sides, const Step& step, const Tensor& dy_rows,
                         const Tensor& dx_rows) {
  const int64_t in_used = sides.in_used(step), out_used = sides.out_used(step);
  for (int64_t ib = 0; ib < sides.in.blocks; ++ib) {
    const int64_t x0 = ib * sides.in.features, k0 = ib * sides.in.stride;
    const Tensor out = columns(dx_rows, x0, x0 + in_used);
    const Tensor weight_columns = columns(linear.weight, k0, k0 + in_used);
    const auto part_of = [&](int64_t ob, const Tensor& part) {
      const int64_t n0 = ob * sides.out.stride, y0 = ob * sides.out.features;
      matmul_into(part, columns(dy_rows, y0, y0 + out_used), rows(weight_columns, n0, n0 + out_used));
    };
    if (sides.out.blocks == 1)
      part_of(0, out);
    else
      sum_of_blocks(out, sides.out.blocks, std::nullopt, part_of);
  }
}

void bias_gradient(const Sides& sides, const Tensor& dy, const Tensor& dbias) {
  for (int64_t ob = 0; ob < sides.out.blocks; ++ob)
    for (const ColumnBlock& n : sides.out_columns(dy.size(0))) {
      const int64_t n0 = ob * sides.out.stride, y0 = ob * sides.out.features;
      sum_rows_into(slice(dbias, 0, n0 + n.begin, n0 + n.end),
                    rows(columns(dy, y0 + n.begin, y0 + n.end), 0, n.rows));
    }
}

}  // namespace

void weight_gradient_on_views(const Sides& sides, const Tensor& dy, const Tensor& x, const Tensor& dweight) {
  const auto in_columns = sides.in_columns(x.size(0)), out_columns = sides.out_columns(x.size(0));
  for (int64_t ob = 0; ob < sides.out.blocks; ++ob)
    for (const ColumnBlock& n : out_columns) {
      const int64_t n0 = ob * sides.out.stride, y0 = ob * sides.out.features;
      const Tensor dweight_rows = rows(dweight, n0 + n.begin, n0 + n.end);
      const Tensor dy_columns = columns(dy, y0 + n.begin, y0 + n.end);
      for (int64_t ib = 0; ib < sides.in.blocks; ++ib)
        for (const ColumnBlock& k : in_columns) {
          const int64_t count = std::min(n.rows, k.rows);
          const int64_t x0 = ib * sides.in.features, k0 = ib * sides.in.stride;
          matmul_into(columns(dweight_rows, k0 + k.begin, k0 + k.end), transposed(rows(dy_columns, 0, count)),
                      rows(columns(x, x0 + k.begin, x0 + k.end), 0, count));
        }
    }
}

Gradients room_and_bias_gradient(const Linear& linear, const Sides& sides, const Tensor& dy,
                                 const Wanted& wanted) {
  const Tensor &x = linear.x, &weight = linear.weight;
  const std::vector<int64_t> x_shape{x.size(0), x.size(1)}, weight_shape{weight.size(0), weight.size(1)};
  Gradients d{empty(x, {0}), empty(x, {0}), empty(x, {0})};
  if (wanted.x) d.x = sides.whole_x() ? empty(x, x_shape) : zeros(x, x_shape);
  if (wanted.weight) {
    // What is written leads: all rows, or one block's first ones, and in these all columns, or the first
    // ones.
    const bool leads =
        (sides.in.blocks == 1 || sides.whole_in()) && (sides.out.blocks == 1 || sides.whole_out());
    const int64_t used = sides.out.blocks * sides.widest_out();
    d.weight = leads ? zeros_from(0, used, x, weight_shape) : zeros(x, weight_shape);
    if (leads) zero(columns(rows(d.weight, 0, used), sides.in.blocks * sides.widest_in(), weight.size(1)));
  }
  if (wanted.bias) {
    d.bias = zeros(x, {weight.size(0)});
    bias_gradient(sides, gather_rows(dy, sides.extents.order), d.bias);
  }
  return d;
}

Tensor forward_on_views(const Linear& linear) {
  Sides sides = sides_of(linear);
  sides.join();
  const bool whole = !sides.per_token_out && sides.out.used == sides.out.features;
  const Tensor y = whole ? empty(linear.x, linear.y_shape()) : zeros(linear.x, linear.y_shape());
  const Tensor x_sorted = gather_rows(linear.x, linear.extents.order);
  for (const Step& step : linear.extents.stairs.steps)
    forward_step(linear, sides, step, rows(x_sorted, step.begin, step.end), rows(y, step.begin, step.end));
  return gather_rows(y, linear.extents.inverse);
}

Gradients backward_on_views(const Linear& linear, const Tensor& dy, const Wanted& wanted) {
  Sides sides = sides_of(linear);
  sides.join();
  Gradients d = room_and_bias_gradient(linear, sides, dy, wanted);
  const Tensor dy_sorted = gather_rows(dy, linear.extents.order);
  if (wanted.x) {
    for (const Step& step : linear.extents.stairs.steps)
      input_gradient_step(linear, sides, step, rows(dy_sorted, step.begin, step.end),
                          rows(d.x, step.begin, step.end));
    d.x = gather_rows(d.x, linear.extents.inverse);
  }
  if (wanted.weight)
    weight_gradient_on_views(sides, dy_sorted, gather_rows(linear.x, linear.extents.order), d.weight);
  return d;
}

}  // namespace flextron::linear
