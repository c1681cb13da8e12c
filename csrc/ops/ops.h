// Every op's function, as library.cpp registers it. Formulas are in csrc/kernels/<op>.h, checks in
// csrc/ops/<op>.cpp.
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
std::tuple<Tensor, Tensor, Tensor> elastic_linear_backward(
    const Tensor& dy, const Tensor& x, const Tensor& weight, const OptionalTensor& bias, int64_t in_features,
    int64_t out_features, const OptionalTensor& in_extent, const OptionalTensor& out_extent,
    int64_t in_blocks, int64_t out_blocks, int64_t output_mask);

Tensor elastic_mlp(const Tensor& x, const OptionalTensor& w_gate, const Tensor& w_up, const Tensor& w_down,
                   const OptionalTensor& b_gate, const OptionalTensor& b_up, const OptionalTensor& b_down,
                   int64_t width, const Text& activation, const OptionalTensor& extent,
                   const OptionalTensor& gate, const std::optional<std::vector<int64_t>>& choices);
std::tuple<Tensor, Tensor, Tensor> elastic_mlp_with_hidden(
    const Tensor& x, const OptionalTensor& w_gate, const Tensor& w_up, const Tensor& w_down,
    const OptionalTensor& b_gate, const OptionalTensor& b_up, const OptionalTensor& b_down, int64_t width,
    const Text& activation, const OptionalTensor& extent, const OptionalTensor& gate,
    const std::optional<std::vector<int64_t>>& choices);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> elastic_mlp_backward(
    const Tensor& dy, const Tensor& x, const OptionalTensor& w_gate, const Tensor& w_up, const Tensor& w_down,
    const OptionalTensor& b_gate, const OptionalTensor& b_up, const OptionalTensor& b_down, int64_t width,
    const Text& activation, const OptionalTensor& extent, const OptionalTensor& gate,
    const std::optional<std::vector<int64_t>>& choices, const Tensor& hidden_up, const Tensor& hidden_gate,
    int64_t output_mask);

Tensor packed_linear(const Tensor& x, const Tensor& panels, const OptionalTensor& scales, const Text& format,
                     const OptionalTensor& bias, int64_t in_features, int64_t out_features,
                     const OptionalTensor& in_extent, const OptionalTensor& out_extent, int64_t in_blocks);
Tensor packed_mlp(const Tensor& x, const Tensor& up_panels, const Tensor& down_panels,
                  const OptionalTensor& up_scales, const OptionalTensor& down_scales, const Text& format,
                  const OptionalTensor& b_gate, const OptionalTensor& b_up, const OptionalTensor& b_down,
                  int64_t width, int64_t out_features, bool gated, const Text& activation,
                  const OptionalTensor& extent);

// decoder_hold keeps a model's weights, by name, for any number of steps. decoder_step writes into keys and
// values, and returns logits and the place of the greatest of each sequence's last ones.
int64_t decoder_hold(const std::vector<Tensor>& weights, const Text& names, const std::vector<int64_t>& shape,
                     const std::vector<double>& numbers, const Text& unit, const Text& activation,
                     const Text& format, const Text& norms, bool gated, bool parallel,
                     const std::vector<double>& scales, std::optional<double> logit_cap,
                     std::optional<double> softcap, const std::optional<std::vector<int64_t>>& tables,
                     const std::optional<std::vector<int64_t>>& windows, const Text& rotation,
                     const Text& norm_over, bool norm_last, std::optional<double> clip);
std::tuple<Tensor, Tensor> decoder_step(const Tensor& ids, const Tensor& cos, const Tensor& sin, int64_t held,
                                        const std::vector<Tensor>& keys, const std::vector<Tensor>& values,
                                        int64_t cached, const std::vector<int64_t>& widths,
                                        const std::vector<int64_t>& heads,
                                        const std::vector<int64_t>& kv_heads, int64_t keep,
                                        const OptionalTensor& k_start,
                                        const std::optional<std::vector<Tensor>>& router,
                                        const std::optional<std::vector<int64_t>>& mlp_choices,
                                        const std::optional<std::vector<int64_t>>& head_choices);
void decoder_drop(int64_t held);

// The worked example of docs/add-an-op.md.
Tensor prefix_gate(const Tensor& x, const Tensor& gate, const Tensor& width);
std::tuple<Tensor, Tensor> prefix_gate_backward(const Tensor& dy, const Tensor& x, const Tensor& gate,
                                                const Tensor& width, int64_t output_mask);

// choice, order, offsets
std::tuple<Tensor, Tensor, Tensor> route(const Tensor& logits, std::optional<int64_t> seed);

std::tuple<Tensor, Tensor> head_attention(const Tensor& q, const Tensor& k, const Tensor& v, int64_t heads,
                                          const Text& unit, const OptionalTensor& extent,
                                          const Text& extent_per, const OptionalTensor& index,
                                          const OptionalTensor& cu_seqlens_q,
                                          const OptionalTensor& cu_seqlens_k, const OptionalTensor& k_start,
                                          bool causal, std::optional<double> scale,
                                          std::optional<int64_t> window, std::optional<double> softcap,
                                          const OptionalTensor& sinks);
std::tuple<Tensor, Tensor, Tensor, Tensor> head_attention_backward(
    const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
    const Tensor& lse, int64_t heads, const Text& unit, const OptionalTensor& extent, const Text& extent_per,
    const OptionalTensor& index, const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
    const OptionalTensor& k_start, bool causal, std::optional<double> scale, std::optional<int64_t> window,
    std::optional<double> softcap, const OptionalTensor& sinks, int64_t output_mask);

Tensor head_attention_decode(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                             const Tensor& seqlens, int64_t heads, const Text& unit,
                             const OptionalTensor& extent, const OptionalTensor& block_table,
                             const OptionalTensor& k_start, std::optional<double> scale,
                             std::optional<int64_t> window, std::optional<double> softcap,
                             const OptionalTensor& sinks);
std::tuple<Tensor, Tensor, Tensor, Tensor> head_attention_decode_backward(
    const Tensor& dout, const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const Tensor& seqlens,
    int64_t heads, const Text& unit, const OptionalTensor& extent, const OptionalTensor& block_table,
    const OptionalTensor& k_start, std::optional<double> scale, std::optional<int64_t> window,
    std::optional<double> softcap, const OptionalTensor& sinks, int64_t output_mask);

}  // namespace flextron

template <>
struct torch::stable::detail::ToImpl<flextron::Text> {
  static flextron::Text call(StableIValue value, uint64_t, bool) {
    const auto handle = torch::stable::detail::to<StringHandle>(value);
    size_t length = 0;
    const char* data = nullptr;
    TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
    TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
    flextron::Text text{std::string(data, length)};
    TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
    return text;
  }
};
