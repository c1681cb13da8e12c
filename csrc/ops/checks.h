// Argument checks. Every message reads "op: argument must requirement, got value".
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

namespace flextron {

using torch::headeronly::ScalarType;
using torch::stable::Device;
using torch::stable::Tensor;

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

template <class Range>
std::string shape_text(const Range& sizes) {
  std::string text = "[";
  for (const int64_t size : sizes) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  return text + "]";
}

inline std::string device_text(const Device& device) {
  const std::string name = device.is_cpu() ? "cpu" : device.is_cuda() ? "cuda" : "device";
  return device.is_cpu() ? name : name + ":" + std::to_string(device.index());
}

// torch hands None for a tensor over as one without anything.
inline void check_given(const char* op, const char* name, const Tensor& t) {
  if (!t.defined()) fail(op, ": ", name, " must be a tensor, got None");
}

inline void check_dim(const char* op, const char* name, const Tensor& t, int64_t dim) {
  check_given(op, name, t);
  if (t.dim() != dim) fail(op, ": ", name, " must have ", dim, " dimensions, got ", t.dim());
}

inline void check_shape(const char* op, const char* name, const Tensor& t,
                        std::initializer_list<int64_t> shape) {
  check_given(op, name, t);
  bool same = t.dim() == static_cast<int64_t>(shape.size());
  int64_t i = 0;
  for (const int64_t size : shape) same = same && t.size(i++) == size;
  if (!same) fail(op, ": ", name, " must have shape ", shape_text(shape), ", got ", shape_text(t.sizes()));
}

inline void check_dtype(const char* op, const char* name, const Tensor& t, ScalarType dtype) {
  if (t.scalar_type() == dtype) return;
  fail(op, ": ", name, " must have dtype ", toString(dtype), ", got ", toString(t.scalar_type()));
}

inline void check_device(const char* op, const char* name, const Tensor& t, const Device& device) {
  check_given(op, name, t);
  if (t.device() == device) return;
  fail(op, ": ", name, " must be on ", device_text(device), ", got ", device_text(t.device()));
}

// Shape, dtype and device at once.
inline void check_like(const char* op, const char* name, const Tensor& t,
                       std::initializer_list<int64_t> shape, ScalarType dtype, const Device& device) {
  check_shape(op, name, t, shape);
  check_dtype(op, name, t, dtype);
  check_device(op, name, t, device);
}

inline void check_floating(const char* op, const char* name, const Tensor& t) {
  check_given(op, name, t);
  const ScalarType dtype = t.scalar_type();
  if (dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::BFloat16 ||
      dtype == ScalarType::Half)
    return;
  fail(op, ": ", name, " must be float32, float64, bfloat16 or float16, got ", toString(dtype));
}

inline void check_integers(const char* op, const char* name, const Tensor& t) {
  check_given(op, name, t);
  if (t.scalar_type() == ScalarType::Int || t.scalar_type() == ScalarType::Long) return;
  fail(op, ": ", name, " must be int32 or int64, got ", toString(t.scalar_type()));
}

inline void check_range(const char* op, const char* name, int64_t value, int64_t low, int64_t high) {
  if (value < low || value > high) fail(op, ": ", name, " must lie in [", low, ", ", high, "], got ", value);
}

// A setting that kernels take as a float.
inline void check_finite(const char* op, const char* name, double value) {
  if (!std::isfinite(static_cast<float>(value))) fail(op, ": ", name, " must be finite, got ", value);
}

inline void check_positive(const char* op, const char* name, int64_t value) {
  if (value < 1) fail(op, ": ", name, " must be at least 1, got ", value);
}

}  // namespace flextron
