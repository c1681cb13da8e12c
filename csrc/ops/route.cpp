// route: checks, allocation and launch; the formula is in csrc/kernels/route.h.
#include "kernels/route.h"

#include "ops/device.h"
#include "ops/dispatch.h"
#include "ops/gemm.h"
#include "ops/ops.h"

namespace flextron {

using RouteTypes = TypeList<float, double>;  // 16-bit logits are widened first, exactly

constexpr int64_t kMaxChoices = 8192;  // the CUDA path counts in shared memory, 4 bytes a choice

std::tuple<Tensor, Tensor, Tensor> route(const Tensor& logits, std::optional<int64_t> seed) {
  constexpr auto op = "route";
  const NoGrad guard;
  check_dim(op, "logits", logits, 2);
  check_floating(op, "logits", logits);
  check_range(op, "logits.size(1)", logits.size(1), 1, kMaxChoices);
  const int64_t T = logits.size(0), C = logits.size(1);

  const bool wide = logits.scalar_type() == ScalarType::Double;
  const Tensor logits_ =
      torch::stable::contiguous(torch::stable::to(logits, wide ? ScalarType::Double : ScalarType::Float));
  const Tensor choice = empty(logits, {T}, ScalarType::Long), order = empty(logits, {T}, ScalarType::Long);
  const Tensor offsets = empty(logits, {C + 1}, ScalarType::Long);
  const Tensor counts = empty(logits, {runs_on_gpu(logits) ? route_blocks(T) : 0, C}, ScalarType::Long);

  dispatch_dtype(RouteTypes{}, op, logits_.scalar_type(), [&]<class scalar_t>() {
    const RouteParams<scalar_t> p{.logits = data_of<scalar_t>(logits_),
                                  .choice = mutable_data_of<int64_t>(choice),
                                  .order = mutable_data_of<int64_t>(order),
                                  .offsets = mutable_data_of<int64_t>(offsets),
                                  .counts = mutable_data_of<int64_t>(counts),
                                  .T = T,
                                  .C = C,
                                  .seed = static_cast<uint64_t>(seed.value_or(0)),
                                  .noisy = seed.has_value()};
    const auto cpu = [&] {
      constexpr int64_t kCost = 2, kNoisyCost = 32;  // of a logit: 1.2 ns, and 18 where noise is drawn
      parallel_for(T, C * (p.noisy ? kNoisyCost : kCost),
                   [&](int64_t begin, int64_t end) { route_choices_cpu(p, begin, end); });
      route_order_cpu(p);
    };
    on_device_of(op, logits, cpu, [&](auto stream) { route_cuda(p, stream); });
  });
  return {choice, order, offsets};
}

}  // namespace flextron
