// elastic_mlp on a GPU: elastic_linear's kernels, and the hidden neurons in one of their own where they are
// 16-bit. The extents stay on the device.
#include "ops/device.h"
#include "ops/linear/launch.h"
#include "ops/mlp/executors.h"
#include "ops/mlp/params.h"

namespace flextron::mlp {
namespace {

// What the kernels take: rows of adjacent elements, and numbers within bounds.
Mlp for_kernels(Mlp mlp) {
  check_features(mlp.op, "w_up.size(0)", mlp.w_up.size(0));
  check_features(mlp.op, "w_up.size(1)", mlp.w_up.size(1));
  check_features(mlp.op, "w_down.size(0)", mlp.w_down.size(0));
  mlp.w_up = adjacent(mlp.w_up);
  mlp.w_down = adjacent(mlp.w_down);
  if (mlp.w_gate) mlp.w_gate = adjacent(*mlp.w_gate);
  for (OptionalTensor* const bias : {&mlp.b_gate, &mlp.b_up, &mlp.b_down}) *bias = dense(*bias);
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
  set_mixture(p, mlp);
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

// h, GEMMs included: 16-bit alone.
template <class scalar_t>
AfterHidden launch_hidden(const ElasticMlpHiddenParams<scalar_t>& p, Executor executor, CUstream_st* stream) {
  if (executor == Executor::kStream) {
#ifdef FLEXTRON_WITH_SM90
    if (elastic_mlp_decode_fits_sm90(p) && takes_hopper_decode(p.T, (p.w_gate ? 2 : 1) * p.width * p.K)) {
      elastic_mlp_decode_sm90(p, stream);
      return {.dependent = true, .x_is_clean = true};
    }
#endif
    elastic_mlp_decode_cuda(p, stream);
    return {.x_is_clean = true};
  }
#ifdef FLEXTRON_WITH_SM90
  if (cuda_arch() >= 90 && elastic_mlp_hidden_fits_sm90(p)) {
    elastic_mlp_hidden_sm90(p, stream);
    return {.dependent = true};
  }
#endif
  elastic_mlp_hidden_cuda(p, stream);
  return {};
}

// u, g, and h of both, which may lie where u does.
template <class scalar_t>
void launch_hidden_apart(const Mlp& mlp, const Tensor& x, const DeviceExtents& extents, const Hidden& hidden,
                         const Tensor& h, CUstream_st* stream) {
  launch_elastic_linear(up_params<scalar_t>(mlp, x, mlp.w_up, mlp.b_up, extents, hidden.u), Executor::kTile,
                        stream);
  if (hidden.g)
    launch_elastic_linear(up_params<scalar_t>(mlp, x, *mlp.w_gate, mlp.b_gate, extents, *hidden.g),
                          Executor::kTile, stream);
  const HiddenRows rows{
      .g = hidden.g, .u = hidden.u, .h = h, .dg = {}, .du = {}, .dmixture = {}, .row = 0, .d = mlp.width};
  elastic_mlp_rows_cuda(rows_params<scalar_t>(mlp, extents, rows), stream);
}

// Of the layer before the activation: dx, and the gradients of w_up and b_up.
template <class scalar_t>
ElasticLinearBackwardParams<scalar_t> up_backward_params(const Mlp& mlp, const Tensor& x,
                                                         const DeviceExtents& extents, const HiddenRows& rows,
                                                         const Gradients& d) {
  return {.dy = data_of<scalar_t>(*rows.du),
          .dy2 = data_or_null<scalar_t>(rows.dg),
          .x = data_of<scalar_t>(x),
          .weight = data_of<scalar_t>(mlp.w_up),
          .weight2 = data_or_null<scalar_t>(mlp.w_gate),
          .dx = mutable_data_of<scalar_t>(d.x),
          .dweight = mutable_data_of<scalar_t>(d.w_up),
          .dbias = mutable_data_of<scalar_t>(d.b_up),
          .in_extent = nullptr,
          .out_extent = extents.data(),
          .T = x.size(0),
          .in_features = x.size(1),
          .out_features = mlp.width,
          .in_blocks = 1,
          .out_blocks = 1,
          .kx = x.size(1),
          .kw = x.size(1),
          .nw = mlp.w_up.size(0),
          .dy_stride = mlp.width,
          .x_stride = x.stride(0),
          .weight_stride = mlp.w_up.stride(0),
          .weight2_stride = mlp.w_gate ? mlp.w_gate->stride(0) : 0,
          .per_token = extents.per_token};
}

// Of the layer after it: h is its input, then that input's gradient.
template <class scalar_t>
ElasticLinearBackwardParams<scalar_t> down_backward_params(const Mlp& mlp, const Tensor& dy,
                                                           const DeviceExtents& extents,
                                                           const HiddenRows& rows, const Gradients& d) {
  return {.dy = data_of<scalar_t>(dy),
          .dy2 = nullptr,
          .x = data_of<scalar_t>(rows.h),
          .weight = data_of<scalar_t>(mlp.w_down),
          .weight2 = nullptr,
          .dx = mutable_data_of<scalar_t>(rows.h),
          .dweight = mutable_data_of<scalar_t>(d.w_down),
          .dbias = mutable_data_of<scalar_t>(d.b_down),
          .in_extent = extents.data(),
          .out_extent = nullptr,
          .T = dy.size(0),
          .in_features = mlp.width,
          .out_features = mlp.w_down.size(0),
          .in_blocks = 1,
          .out_blocks = 1,
          .kx = mlp.width,
          .kw = mlp.w_up.size(0),
          .nw = mlp.w_down.size(0),
          .dy_stride = dy.stride(0),
          .x_stride = mlp.width,
          .weight_stride = mlp.w_down.stride(0),
          .weight2_stride = 0,
          .per_token = extents.per_token};
}

Gradients room_for(const Mlp& mlp, const Wanted& wanted) {
  const int64_t T = mlp.x.size(0), K = mlp.x.size(1), F = mlp.w_up.size(0), N = mlp.w_down.size(0);
  const auto room = [&](bool is_wanted, const std::vector<int64_t>& shape) {
    return empty(mlp.x, is_wanted ? shape : std::vector<int64_t>{0});
  };
  return {room(wanted.x, {T, K}),
          room(wanted.w_gate, {F, K}),
          room(wanted.w_up, {F, K}),
          room(wanted.w_down, {N, F}),
          room(wanted.b_gate, {F}),
          room(wanted.b_up, {F}),
          room(wanted.b_down, {N}),
          wanted.mixture ? empty(*mlp.mixture, {T, mlp.mixture_choices()}) : empty(mlp.x, {0})};
}

template <class scalar_t>
void launch_backward(const Mlp& mlp, const ElasticLinearBackwardParams<scalar_t>& up,
                     const ElasticLinearBackwardParams<scalar_t>& down,
                     const ElasticMlpRowsParams<scalar_t>& rows, const Gradients& d, const Wanted& wanted) {
  ElasticLinearBackwardParams<scalar_t> gate = up;
  gate.dy = up.dy2;
  gate.dweight = mutable_data_of<scalar_t>(d.w_gate);
  gate.dbias = mutable_data_of<scalar_t>(d.b_gate);
  on_gpu_of(mlp.op, mlp.x, [&](auto stream) {
    if (wanted.b_down) elastic_linear_backward_bias_cuda(down, stream);
    if (!wanted.beyond_b_down()) return;
    launch_elastic_linear_backward_input(down, stream);
    elastic_mlp_rows_backward_cuda(rows, stream);
    if (wanted.x) launch_elastic_linear_backward_input(up, stream);
    if (wanted.w_gate) launch_elastic_linear_backward_weight(gate, stream);
    if (wanted.w_up) launch_elastic_linear_backward_weight(up, stream);
    if (wanted.w_down) launch_elastic_linear_backward_weight(down, stream);
    if (wanted.b_gate) elastic_linear_backward_bias_cuda(gate, stream);
    if (wanted.b_up) elastic_linear_backward_bias_cuda(up, stream);
  });
}

}  // namespace

Tensor forward_on_gpu(const Mlp& arguments, Executor executor) {
  const Mlp mlp = for_kernels(arguments);
  const DeviceExtents extents =
      device_extents(mlp.op, "extent", mlp.extent, mlp.x, executor == Executor::kTile);
  const Tensor x = adjacent(gather_rows(mlp.x, extents.order)), y = empty(x, {x.size(0), mlp.w_down.size(0)});
  if (y.numel() == 0) return y;
  const bool fused = x.element_size() == 2;
  const Tensor h = empty(x, {x.size(0), mlp.width});
  const OptionalTensor g =
      mlp.w_gate && !fused ? OptionalTensor(empty(x, {x.size(0), mlp.width})) : std::nullopt;

  dispatch_dtype(FloatingTypes{}, mlp.op, x.scalar_type(), [&]<class scalar_t>() {
    on_gpu_of(mlp.op, x, [&](auto stream) {
      AfterHidden after;
      if constexpr (sizeof(scalar_t) == 2) {
        after = launch_hidden(hidden_params<scalar_t>(mlp, x, extents, h), executor, stream);
      } else {
        launch_hidden_apart<scalar_t>(mlp, x, extents, {h, g}, h, stream);
      }
      launch_elastic_linear(down_params<scalar_t>(mlp, h, extents, y), executor, stream, after);
    });
  });
  return gather_rows(y, extents.inverse);
}

WithHidden forward_with_hidden_on_gpu(const Mlp& arguments) {
  const Mlp mlp = for_kernels(arguments);
  const DeviceExtents extents = device_extents(mlp.op, "extent", mlp.extent, mlp.x, true);
  const Tensor x = adjacent(gather_rows(mlp.x, extents.order));
  const std::vector<int64_t> shape{x.size(0), mlp.width};
  const Tensor y = empty(x, {x.size(0), mlp.w_down.size(0)}), h = empty(x, shape);
  const Hidden hidden{empty(x, shape), mlp.w_gate ? OptionalTensor(empty(x, shape)) : std::nullopt};
  dispatch_dtype(FloatingTypes{}, mlp.op, x.scalar_type(), [&]<class scalar_t>() {
    on_gpu_of(mlp.op, x, [&](auto stream) {
      launch_hidden_apart<scalar_t>(mlp, x, extents, hidden, h, stream);
      launch_elastic_linear(down_params<scalar_t>(mlp, h, extents, y), Executor::kTile, stream);
    });
  });
  return {gather_rows(y, extents.inverse), hidden};
}

Gradients backward_on_gpu(const Mlp& arguments, const Tensor& dy_rows, const Hidden& hidden,
                          const Wanted& wanted) {
  const Mlp mlp = for_kernels(arguments);
  const DeviceExtents extents = device_extents(mlp.op, "extent", mlp.extent, mlp.x, true);
  const Tensor dy = adjacent(gather_rows(dy_rows, extents.order));
  const Tensor x = adjacent(gather_rows(mlp.x, extents.order));
  const std::vector<int64_t> shape{x.size(0), mlp.width};
  Gradients d = room_for(mlp, wanted);
  const HiddenRows rows{.g = hidden.g,
                        .u = hidden.u,
                        .h = empty(x, shape),
                        .dg = mlp.w_gate ? OptionalTensor(empty(x, shape)) : std::nullopt,
                        .du = empty(x, shape),
                        .dmixture = wanted.mixture ? OptionalTensor(d.mixture) : std::nullopt,
                        .row = 0,
                        .d = mlp.width};
  dispatch_dtype(FloatingTypes{}, mlp.op, x.scalar_type(), [&]<class scalar_t>() {
    launch_backward(mlp, up_backward_params<scalar_t>(mlp, x, extents, rows, d),
                    down_backward_params<scalar_t>(mlp, dy, extents, rows, d),
                    rows_params<scalar_t>(mlp, extents, rows), d, wanted);
  });
  if (wanted.x) d.x = gather_rows(d.x, extents.inverse);
  return d;
}

}  // namespace flextron::mlp
