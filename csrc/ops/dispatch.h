// From a tensor's dtype to the C++ type a kernel was compiled for.
#pragma once

#include <string>

#include "core/dispatch.h"
#include "core/types.h"
#include "ops/checks.h"

namespace flextron {

template <class scalar_t>
constexpr ScalarType dtype_of() {
  if constexpr (std::is_same_v<scalar_t, float>) return ScalarType::Float;
  if constexpr (std::is_same_v<scalar_t, double>) return ScalarType::Double;
  if constexpr (std::is_same_v<scalar_t, bf16>) return ScalarType::BFloat16;
  if constexpr (std::is_same_v<scalar_t, fp16>) return ScalarType::Half;
  if constexpr (std::is_same_v<scalar_t, int32_t>) return ScalarType::Int;
  if constexpr (std::is_same_v<scalar_t, int64_t>) return ScalarType::Long;
}

// Every floating dtype the CPU computes in; float64 is there for gradcheck.
using FloatingTypes = TypeList<float, double, bf16, fp16>;

// Calls f.operator()<scalar_t>() for the member of the list whose dtype it is; otherwise the error prints the
// list.
template <class... Types, class F>
void dispatch_dtype(TypeList<Types...>, const char* op, ScalarType dtype, F&& f) {
  const bool found = ((dtype == dtype_of<Types>() && (f.template operator()<Types>(), true)) || ...);
  if (found) return;
  std::string list;
  ((list += (list.empty() ? "" : ", ") + std::string(toString(dtype_of<Types>()))), ...);
  fail(op, ": dtype must be one of ", list, ", got ", toString(dtype));
}

// Typed pointers; torch's own typed accessors know only its scalar types.
template <class scalar_t>
const scalar_t* data_of(const Tensor& t) {
  return static_cast<const scalar_t*>(t.const_data_ptr());
}
template <class scalar_t>
scalar_t* mutable_data_of(const Tensor& t) {
  return static_cast<scalar_t*>(t.mutable_data_ptr());
}

}  // namespace flextron
