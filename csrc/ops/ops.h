// Every op's function, as library.cpp registers it. Formulas are in csrc/kernels/<op>.h, checks in csrc/ops/<op>.cpp.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace flextron {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// A string argument. torch's own conversion to std::string leaks its copy on every call; this one does not.
struct Text {
  std::string value;
};

Tensor elastic_linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, int64_t in_features,
                      int64_t out_features, const OptionalTensor& in_extent, const OptionalTensor& out_extent,
                      int64_t in_blocks, int64_t out_blocks);
std::tuple<Tensor, Tensor, Tensor> elastic_linear_backward(const Tensor& dy, const Tensor& x, const Tensor& weight,
                                                           const OptionalTensor& bias, int64_t in_features,
                                                           int64_t out_features, const OptionalTensor& in_extent,
                                                           const OptionalTensor& out_extent, int64_t in_blocks,
                                                           int64_t out_blocks, int64_t output_mask);

}  // namespace flextron

template <>
struct torch::stable::detail::ToImpl<flextron::Text> {
  static flextron::Text call(StableIValue value, uint64_t, bool) {
    const auto handle = torch::stable::detail::to<StringHandle>(value);
    size_t length = 0;
    const char* data = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
    STABLE_TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
    flextron::Text text{std::string(data, length)};
    STABLE_TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
    return text;
  }
};
