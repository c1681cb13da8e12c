// The vendor's GEMM (MKL on a CPU, cuBLAS on a GPU) on views, and the few tensor operations around
// it, through torch's dispatcher.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <utility>
#include <vector>

#include "ops/checks.h"
#include "ops/device.h"

namespace flextron {

// Ops are differentiated by formulas of their own; what happens inside one is never recorded.
class NoGrad {
 public:
  NoGrad() : before_(aoti_torch_grad_mode_is_enabled()) { aoti_torch_grad_mode_set_enabled(false); }
  ~NoGrad() { aoti_torch_grad_mode_set_enabled(before_); }
  NoGrad(const NoGrad&) = delete;
  NoGrad& operator=(const NoGrad&) = delete;

 private:
  bool before_;
};

// t[..., begin:end, ...] along dim, a view.
inline Tensor slice(const Tensor& t, int64_t dim, int64_t begin, int64_t end) {
  Tensor source = t;
  return torch::stable::narrow(source, dim, begin, end - begin);
}
inline Tensor rows(const Tensor& t, int64_t begin, int64_t end) { return slice(t, 0, begin, end); }
inline Tensor columns(const Tensor& t, int64_t begin, int64_t end) { return slice(t, 1, begin, end); }
inline Tensor transposed(const Tensor& t) { return torch::stable::transpose(t, 0, 1); }

inline Tensor empty(const Tensor& like, const std::vector<int64_t>& shape,
                    std::optional<ScalarType> dtype = {}) {
  // Not new_empty: to dispatch it takes as long as a small op.
  std::vector<int64_t> strides(shape.size(), 1);
  for (size_t i = shape.size(); i-- > 1;) strides[i - 1] = strides[i] * std::max<int64_t>(shape[i], 1);
  const auto device = like.device();
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(), strides.data(),
                               static_cast<int32_t>(dtype.value_or(like.scalar_type())),
                               static_cast<int32_t>(device.type()), device.index(), &made));
  return Tensor(made);
}
inline Tensor zeros(const Tensor& like, const std::vector<int64_t>& shape,
                    std::optional<ScalarType> dtype = {}) {
  return torch::stable::new_zeros(like, shape, dtype);
}

// Zeros where there are some: of a CPU's matrix row by row, which torch, behind a prefix of columns, does at
// a third of the rate (576 x 768 bfloat16 in a matrix twice as wide: 0.65 ms on a core of an AMD EPYC, Zen
// 4).
inline void zero(Tensor t) {
  if (t.numel() == 0) return;
  if (!t.is_cpu() || t.dim() != 2 || (t.size(1) > 1 && t.stride(1) != 1)) {
    torch::stable::zero_(t);
    return;
  }
  char* const data = static_cast<char*>(t.mutable_data_ptr());
  const int64_t row = t.stride(0) * t.element_size(), bytes = t.size(1) * t.element_size();
  constexpr int64_t kAtOnce = 8;  // bytes of an elementary operation, next to a multiply-add
  parallel_for(t.size(0), bytes / kAtOnce, [&](int64_t begin, int64_t end) {
    if (row == bytes) {
      std::memset(data + begin * row, 0, (end - begin) * row);
      return;
    }
    for (int64_t i = begin; i < end; ++i) std::memset(data + i * row, 0, bytes);
  });
}

// Room for `shape` whose entries from `used` on along dim are zeros; the caller writes those before.
inline Tensor zeros_from(int64_t dim, int64_t used, const Tensor& like, const std::vector<int64_t>& shape) {
  const Tensor out = empty(like, shape);
  zero(slice(out, dim, used, shape[dim]));
  return out;
}

// t itself where its last dimension is adjacent in memory, a contiguous copy otherwise.
inline Tensor adjacent(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  return t.size(last) > 1 && t.stride(last) != 1 ? torch::stable::contiguous(t) : t;
}

// t, or a copy with zeros behind its `dim` up to the next multiple of kReadInputs. A CPU's matrix unit (AMX)
// takes 16-bit inputs by that many: what lies in memory behind the last ones goes in times 0, which is NaN
// where that is no number.
constexpr int64_t kReadInputs = 32;
inline Tensor whole_inputs(const Tensor& t, int64_t dim) {
  const int64_t inputs = t.size(dim), rest = inputs % kReadInputs;
  if (rest == 0 || t.element_size() != 2 || !t.is_cpu()) return t;
  std::vector<int64_t> shape(t.sizes().begin(), t.sizes().end());
  shape[dim] = inputs + kReadInputs - rest;
  const Tensor whole = zeros_from(dim, inputs, t, shape);
  Tensor used = slice(whole, dim, 0, inputs);
  torch::stable::copy_(used, t);
  return whole;
}

// out = a b. Any strides; nothing is copied where one stride of each is 1 and whole_inputs() has nothing to
// add. An empty inner dimension gives zeros.
inline void matmul_into(Tensor out, const Tensor& left, const Tensor& right) {
  if (out.numel() == 0) return;
  const Tensor a = whole_inputs(left, 1), b = whole_inputs(right, 0);
  if (a.size(1) == 0) {
    torch::stable::zero_(out);
    return;
  }
  std::array<StableIValue, 3> stack{torch::stable::detail::from(a), torch::stable::detail::from(b),
                                    torch::stable::detail::from(out)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);
}

// out = x weight^T + bias, exactly torch's own linear.
inline void linear_into(Tensor out, const Tensor& inputs, const Tensor& weight_rows,
                        const std::optional<Tensor>& bias) {
  if (out.numel() == 0) return;
  const Tensor x = whole_inputs(inputs, 1), weight = whole_inputs(weight_rows, 1);
  if (x.size(1) == 0) {
    if (bias)
      torch::stable::copy_(out, *bias);
    else
      torch::stable::zero_(out);
    return;
  }
  std::array<StableIValue, 4> stack{torch::stable::detail::from(x), torch::stable::detail::from(weight),
                                    torch::stable::detail::from(bias), torch::stable::detail::from(out)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);
}

// out = sum of t over its first dimension, accumulated in at least float32 and rounded once.
inline void sum_rows_into(Tensor out, const Tensor& t) {
  if (out.numel() == 0) return;
  const std::array<int64_t, 1> first{0};
  torch::stable::sum_out(out, t, torch::headeronly::IntHeaderOnlyArrayRef(first.data(), 1));
}

// out = sum over blocks of part(block, into). One block is written in place; more are summed in one pass, so
// a 16-bit result is rounded once per block and once at the end, however many blocks there are.
template <class Part>
void sum_of_blocks(const Tensor& out, int64_t blocks, const std::optional<Tensor>& extra, const Part& part) {
  if (out.numel() == 0) return;
  const int64_t parts_count = blocks + (extra ? 1 : 0);
  Tensor parts = empty(out, {parts_count, out.size(0), out.size(1)});
  for (int64_t b = 0; b < blocks; ++b) part(b, torch::stable::select(parts, 0, b));
  if (extra) {
    Tensor last = torch::stable::select(parts, 0, blocks);
    torch::stable::copy_(last, *extra);
  }
  sum_rows_into(out, parts);
}

// t's rows in the given order, contiguous; t itself where the order is empty (nothing moves).
inline Tensor gather_rows(const Tensor& t, const std::optional<Tensor>& order) {
  if (!order) return t;
  std::array<StableIValue, 3> stack{torch::stable::detail::from(t), torch::stable::detail::from(int64_t{0}),
                                    torch::stable::detail::from(*order)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::index_select", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// A list's values in order, and where each was; equals keep their order.
inline std::pair<Tensor, Tensor> sort_list(const Tensor& t, bool descending) {
  std::array<StableIValue, 4> stack{
      torch::stable::detail::from(t), torch::stable::detail::from(std::optional<bool>(true)),
      torch::stable::detail::from(int64_t{0}), torch::stable::detail::from(descending)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
  return {torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1])};
}
inline std::pair<Tensor, Tensor> sort_descending(const Tensor& t) { return sort_list(t, true); }
inline std::pair<Tensor, Tensor> sort_ascending(const Tensor& t) { return sort_list(t, false); }

}  // namespace flextron
