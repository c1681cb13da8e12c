// An extent argument: absent, one for all rows, or one per row. On the CPU it is read and must lie within its
// range; for CUDA kernels it stays on the device.
#pragma once

#include <algorithm>
#include <optional>
#include <vector>

#include "core/staircase.h"
#include "kernels/sort_rows.h"
#include "ops/checks.h"
#include "ops/device.h"
#include "ops/dispatch.h"
#include "ops/gemm.h"

namespace flextron {

// The values of a one-dimensional int32 or int64 tensor, each checked to lie in [0, maximum].
inline std::vector<int64_t> host_integers(const char* op, const char* name, const Tensor& t,
                                          int64_t maximum) {
  check_integers(op, name, t);
  const Tensor wide = torch::stable::contiguous(torch::stable::to(t, ScalarType::Long));
  const auto* data = static_cast<const int64_t*>(wide.const_data_ptr());
  std::vector<int64_t> values(data, data + wide.numel());
  for (const int64_t value : values)
    if (value < 0 || value > maximum) fail(op, ": ", name, " must lie in [0, ", maximum, "], got ", value);
  return values;
}

struct Extents {
  Staircase stairs;
  std::optional<Tensor> order, inverse;  // [T] int64, sorted row -> token and back; absent when no row moves

  bool flat() const { return stairs.steps.size() <= 1; }
  int64_t widest() const { return stairs.steps.empty() ? 0 : stairs.steps.front().extent; }
};

inline void check_extent(const char* op, const char* name, const Tensor& extent, const Tensor& x) {
  check_device(op, name, extent, x.device());
  if (extent.dim() != 1 || (extent.size(0) != 1 && extent.size(0) != x.size(0)))
    fail(op, ": ", name, " must have shape [1] or [", x.size(0), "], got ", shape_text(extent.sizes()));
}

inline Extents read_extents(const char* op, const char* name, const std::optional<Tensor>& extent,
                            const Tensor& x, int64_t maximum) {
  const int64_t T = x.size(0);
  if (!extent) return {flat_staircase(T, maximum), {}, {}};
  check_extent(op, name, *extent, x);
  const std::vector<int64_t> values = host_integers(op, name, *extent, maximum);
  if (values.size() == 1) return {flat_staircase(T, values[0]), {}, {}};

  Extents result{make_staircase(values.data(), T, maximum), {}, {}};
  if (result.stairs.order.empty()) return result;
  result.order = empty(x, {T}, ScalarType::Long);
  result.inverse = empty(x, {T}, ScalarType::Long);
  auto* order = static_cast<int64_t*>(result.order->mutable_data_ptr());
  auto* inverse = static_cast<int64_t*>(result.inverse->mutable_data_ptr());
  for (int64_t i = 0; i < T; ++i) {
    order[i] = result.stairs.order[i];
    inverse[order[i]] = i;
  }
  return result;
}

struct DeviceExtents {
  std::optional<Tensor> values;          // int64, one for all rows or one for each
  std::optional<Tensor> order, inverse;  // [T] int64, sorted row -> token and back; absent where no row moves
  bool per_token = false;

  const int64_t* data() const {
    return values ? static_cast<const int64_t*>(values->const_data_ptr()) : nullptr;
  }
};

// Rows in descending order where `sorted`, as they are else. The host never waits: whatever the values are,
// the same operations are queued.
inline DeviceExtents device_extents(const char* op, const char* name, const std::optional<Tensor>& extent,
                                    const Tensor& x, bool sorted) {
  if (!extent) return {};
  check_extent(op, name, *extent, x);
  check_integers(op, name, *extent);
  const Tensor wide = torch::stable::contiguous(torch::stable::to(*extent, ScalarType::Long));
  if (wide.size(0) == 1) return {wide, {}, {}, false};
  if (!sorted) return {wide, {}, {}, true};
  if (wide.size(0) > kMostSortedRows) {
    const auto [values, order] = sort_descending(wide);
    return {values, order, sort_ascending(order).second, true};
  }
  const Tensor values = torch::stable::empty_like(wide), order = torch::stable::empty_like(wide),
               inverse = torch::stable::empty_like(wide);
  on_gpu_of(op, x, [&](auto stream) {
    sort_rows_cuda({.extent = data_of<int64_t>(wide),
                    .sorted = mutable_data_of<int64_t>(values),
                    .order = mutable_data_of<int64_t>(order),
                    .place = mutable_data_of<int64_t>(inverse),
                    .T = wide.size(0)},
                   stream);
  });
  return {values, order, inverse, true};
}

}  // namespace flextron
