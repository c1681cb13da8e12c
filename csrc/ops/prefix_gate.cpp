// prefix_gate, the worked example: checks, allocation and launch; the formula is in
// csrc/kernels/prefix_gate.h.
#include "kernels/prefix_gate.h"

#include "ops/device.h"
#include "ops/dispatch.h"
#include "ops/gemm.h"
#include "ops/ops.h"

namespace flextron {
namespace {

// What both directions are given. The widths stay where they are: a wrong one is moved into its range by the
// kernels.
void check_arguments(const char* op, const Tensor& x, const Tensor& gate, const Tensor& width) {
  check_dim(op, "x", x, 2);
  check_floating(op, "x", x);
  check_like(op, "gate", gate, {x.size(0)}, ScalarType::Float, x.device());
  check_like(op, "width", width, {x.size(0)}, ScalarType::Long, x.device());
}

}  // namespace

Tensor prefix_gate(const Tensor& x, const Tensor& gate, const Tensor& width) {
  constexpr auto op = "prefix_gate";
  const NoGrad guard;
  check_arguments(op, x, gate, width);
  const int64_t T = x.size(0), N = x.size(1);

  const Tensor x_ = torch::stable::contiguous(x), gate_ = torch::stable::contiguous(gate),
               width_ = torch::stable::contiguous(width);
  const Tensor y = empty(x, {T, N});
  dispatch_dtype(FloatingTypes{}, op, x.scalar_type(), [&]<class scalar_t>() {
    const PrefixGateParams<scalar_t> p{.x = data_of<scalar_t>(x_),
                                       .gate = data_of<float>(gate_),
                                       .width = data_of<int64_t>(width_),
                                       .y = mutable_data_of<scalar_t>(y),
                                       .T = T,
                                       .N = N};
    const auto cpu = [&] {
      parallel_for(T, N, [&](int64_t begin, int64_t end) { prefix_gate_cpu(p, begin, end); });
    };
    on_device_of(op, x, cpu, [&](auto stream) { prefix_gate_cuda(p, stream); });
  });
  return y;
}

// Bit 0 of output_mask asks for dx, bit 1 for dgate; what is not asked for is empty.
std::tuple<Tensor, Tensor> prefix_gate_backward(const Tensor& dy, const Tensor& x, const Tensor& gate,
                                                const Tensor& width, int64_t output_mask) {
  constexpr auto op = "prefix_gate_backward";
  const NoGrad guard;
  check_arguments(op, x, gate, width);
  const int64_t T = x.size(0), N = x.size(1);
  check_like(op, "dy", dy, {T, N}, x.scalar_type(), x.device());

  const Tensor dx = (output_mask & 1) ? prefix_gate(dy, gate, width) : empty(x, {0});
  if (!(output_mask & 2)) return {dx, empty(gate, {0})};

  const Tensor dy_ = torch::stable::contiguous(dy), x_ = torch::stable::contiguous(x),
               width_ = torch::stable::contiguous(width);
  const Tensor dgate = empty(gate, {T});
  dispatch_dtype(FloatingTypes{}, op, x.scalar_type(), [&]<class scalar_t>() {
    const PrefixGateBackwardParams<scalar_t> p{.dy = data_of<scalar_t>(dy_),
                                               .x = data_of<scalar_t>(x_),
                                               .width = data_of<int64_t>(width_),
                                               .dgate = mutable_data_of<float>(dgate),
                                               .T = T,
                                               .N = N};
    const auto cpu = [&] {
      parallel_for(T, N, [&](int64_t begin, int64_t end) { prefix_gate_backward_cpu(p, begin, end); });
    };
    on_device_of(op, x, cpu, [&](auto stream) { prefix_gate_backward_cuda(p, stream); });
  });
  return {dx, dgate};
}

}  // namespace flextron
