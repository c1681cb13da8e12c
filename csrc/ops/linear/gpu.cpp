// elastic_linear on a GPU: one kernel for each result, whatever the extents, which stay where they are.
#include "ops/device.h"
#include "ops/dispatch.h"
#include "ops/gemm.h"
#include "ops/linear/executors.h"
#include "ops/linear/launch.h"

namespace flextron::linear {
namespace {

DeviceExtents extents_of(const Linear& linear, bool sorted) {
  return linear.in_extent ? device_extents(linear.op, "in_extent", linear.in_extent, linear.x, sorted)
                          : device_extents(linear.op, "out_extent", linear.out_extent, linear.x, sorted);
}

void check_counts(const Linear& linear) {
  check_features(linear.op, "x.size(1)", linear.x.size(1));
  check_features(linear.op, "weight.size(0)", linear.weight.size(0));
  check_features(linear.op, "weight.size(1)", linear.weight.size(1));
}

}  // namespace

Tensor forward_on_gpu(const Linear& linear, Executor executor) {
  check_counts(linear);
  const DeviceExtents extents = extents_of(linear, executor == Executor::kTile);
  const Tensor y = empty(linear.x, linear.y_shape());
  if (y.numel() == 0) return y;
  const Tensor x = adjacent(gather_rows(linear.x, extents.order)), weight = adjacent(linear.weight);
  const OptionalTensor bias = dense(linear.bias);

  dispatch_dtype(FloatingTypes{}, linear.op, x.scalar_type(), [&]<class scalar_t>() {
    const ElasticLinearParams<scalar_t> p{.x = data_of<scalar_t>(x),
                                          .weight = data_of<scalar_t>(weight),
                                          .bias = data_or_null<scalar_t>(bias),
                                          .y = mutable_data_of<scalar_t>(y),
                                          .in_extent = linear.in_extent ? extents.data() : nullptr,
                                          .out_extent = linear.out_extent ? extents.data() : nullptr,
                                          .T = x.size(0),
                                          .in_features = linear.in_features,
                                          .out_features = linear.out_features,
                                          .in_blocks = linear.in_blocks,
                                          .out_blocks = linear.out_blocks,
                                          .kx = linear.kx,
                                          .kw = linear.kw,
                                          .nw = linear.nw,
                                          .x_stride = x.stride(0),
                                          .weight_stride = weight.stride(0),
                                          .per_token = extents.per_token};
    on_gpu_of(linear.op, x, [&](auto stream) { launch_elastic_linear(p, executor, stream); });
  });
  return gather_rows(y, extents.inverse);
}

Gradients backward_on_gpu(const Linear& linear, const Tensor& dy, const Wanted& wanted) {
  check_counts(linear);
  const DeviceExtents extents = extents_of(linear, true);
  const Tensor dy_ = adjacent(gather_rows(dy, extents.order)), weight = adjacent(linear.weight);
  const Tensor x = wanted.weight ? adjacent(gather_rows(linear.x, extents.order)) : linear.x;
  const auto room = [&](bool is_wanted, const std::vector<int64_t>& shape) {
    return empty(x, is_wanted ? shape : std::vector<int64_t>{0});
  };
  Gradients d{room(wanted.x, {x.size(0), x.size(1)}), room(wanted.weight, {weight.size(0), weight.size(1)}),
              room(wanted.bias, {weight.size(0)})};

  dispatch_dtype(FloatingTypes{}, linear.op, x.scalar_type(), [&]<class scalar_t>() {
    const ElasticLinearBackwardParams<scalar_t> p{.dy = data_of<scalar_t>(dy_),
                                                  .dy2 = nullptr,
                                                  .x = data_of<scalar_t>(x),
                                                  .weight = data_of<scalar_t>(weight),
                                                  .weight2 = nullptr,
                                                  .dx = mutable_data_of<scalar_t>(d.x),
                                                  .dweight = mutable_data_of<scalar_t>(d.weight),
                                                  .dbias = mutable_data_of<scalar_t>(d.bias),
                                                  .in_extent = linear.in_extent ? extents.data() : nullptr,
                                                  .out_extent = linear.out_extent ? extents.data() : nullptr,
                                                  .T = x.size(0),
                                                  .in_features = linear.in_features,
                                                  .out_features = linear.out_features,
                                                  .in_blocks = linear.in_blocks,
                                                  .out_blocks = linear.out_blocks,
                                                  .kx = linear.kx,
                                                  .kw = linear.kw,
                                                  .nw = linear.nw,
                                                  .dy_stride = dy_.stride(0),
                                                  .x_stride = x.stride(0),
                                                  .weight_stride = weight.stride(0),
                                                  .weight2_stride = 0,
                                                  .per_token = extents.per_token};
    on_gpu_of(linear.op, x, [&](auto stream) {
      if (wanted.x) launch_elastic_linear_backward_input(p, stream);
      if (wanted.weight) launch_elastic_linear_backward_weight(p, stream);
      if (wanted.bias) elastic_linear_backward_bias_cuda(p, stream);
    });
  });
  if (wanted.x) d.x = gather_rows(d.x, extents.inverse);
  return d;
}

}  // namespace flextron::linear
