// The op table: one row per op for its schema, one for its function. torch compares the number of arguments
// and results when an op is called; their types must agree by hand, and test_ops.py calls every op.
#include <algorithm>
#include <iterator>

#include "core/build_info.h"
#include "ops/ops.h"

namespace flextron {
namespace {

constexpr const char* kSchemas[] = {
    "elastic_linear(Tensor x, Tensor weight, Tensor? bias, SymInt in_features, SymInt out_features, "
    "Tensor? in_extent=None, Tensor? out_extent=None, SymInt in_blocks=1, SymInt out_blocks=1) -> Tensor",
    "elastic_linear_backward(Tensor dy, Tensor x, Tensor weight, Tensor? bias, SymInt in_features, "
    "SymInt out_features, Tensor? in_extent, Tensor? out_extent, SymInt in_blocks, SymInt out_blocks, "
    "int output_mask) -> (Tensor, Tensor, Tensor)",
    "elastic_mlp(Tensor x, Tensor? w_gate, Tensor w_up, Tensor w_down, Tensor? b_gate, Tensor? b_up, Tensor? "
    "b_down, "
    "SymInt width, str activation=\"silu\", Tensor? extent=None, Tensor? gate=None, int[]? choices=None) -> "
    "Tensor",
    "elastic_mlp_with_hidden(Tensor x, Tensor? w_gate, Tensor w_up, Tensor w_down, Tensor? b_gate, "
    "Tensor? b_up, Tensor? b_down, SymInt width, str activation=\"silu\", Tensor? extent=None, "
    "Tensor? gate=None, int[]? choices=None) -> (Tensor, Tensor, Tensor)",
    "elastic_mlp_backward(Tensor dy, Tensor x, Tensor? w_gate, Tensor w_up, Tensor w_down, Tensor? b_gate, "
    "Tensor? b_up, Tensor? b_down, SymInt width, str activation, Tensor? extent, Tensor? gate, int[]? "
    "choices, Tensor hidden_up, Tensor hidden_gate, int output_mask) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    "packed_linear(Tensor x, Tensor panels, Tensor? scales, str format, Tensor? bias, SymInt in_features, "
    "SymInt out_features, Tensor? in_extent=None, Tensor? out_extent=None, SymInt in_blocks=1) -> Tensor",
    "packed_mlp(Tensor x, Tensor up_panels, Tensor down_panels, Tensor? up_scales, Tensor? down_scales, "
    "str format, Tensor? b_gate, Tensor? b_up, Tensor? b_down, SymInt width, SymInt out_features, bool "
    "gated=True, "
    "str activation=\"silu\", Tensor? extent=None) -> Tensor",
    "decoder_hold(Tensor[] weights, str names, int[] shape, float[] numbers, str unit=\"kv_group\", "
    "str activation=\"silu\", str format=\"plain\", str norms=\"rms\", bool gated=True, bool parallel=False, "
    "float[] scales=[1., 1., 1.], float? logit_cap=None, float? softcap=None, int[]? tables=None, "
    "int[]? windows=None, str rotation=\"halves\", str norm_over=\"head\", bool norm_last=False, "
    "float? clip=None) -> int",
    "decoder_step(Tensor ids, Tensor cos, Tensor sin, int held, Tensor(a!)[] keys, Tensor(b!)[] values, "
    "SymInt cached, int[] widths, int[] heads, int[] kv_heads, SymInt keep=1, Tensor? k_start=None, "
    "Tensor[]? router=None, int[]? mlp_choices=None, int[]? head_choices=None) -> (Tensor, Tensor)",
    "decoder_drop(int held) -> ()",
    "prefix_gate(Tensor x, Tensor gate, Tensor width) -> Tensor",
    "prefix_gate_backward(Tensor dy, Tensor x, Tensor gate, Tensor width, int output_mask) -> (Tensor, "
    "Tensor)",
    "route(Tensor logits, SymInt? seed=None) -> (Tensor, Tensor, Tensor)",
    "head_attention(Tensor q, Tensor k, Tensor v, SymInt heads, str unit=\"kv_group\", Tensor? extent=None, "
    "str extent_per=\"sequence\", Tensor? index=None, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, "
    "Tensor? k_start=None, bool causal=True, float? scale=None, SymInt? window=None, float? softcap=None, "
    "Tensor? sinks=None) -> (Tensor, Tensor)",
    "head_attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, SymInt "
    "heads, "
    "str unit, Tensor? extent, str extent_per, Tensor? index, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
    "Tensor? k_start, bool causal, float? scale, SymInt? window, float? softcap, Tensor? sinks, "
    "int output_mask) -> (Tensor, Tensor, Tensor, Tensor)",
    "head_attention_decode(Tensor q, Tensor k_cache, Tensor v_cache, Tensor seqlens, SymInt heads, "
    "str unit=\"kv_group\", Tensor? extent=None, Tensor? block_table=None, Tensor? k_start=None, "
    "float? scale=None, SymInt? window=None, float? softcap=None, Tensor? sinks=None) -> Tensor",
    "head_attention_decode_backward(Tensor dout, Tensor q, Tensor k_cache, Tensor v_cache, Tensor seqlens, "
    "SymInt heads, str unit, Tensor? extent, Tensor? block_table, Tensor? k_start, float? scale, "
    "SymInt? window, float? softcap, Tensor? sinks, int output_mask) -> (Tensor, Tensor, Tensor, Tensor)",
};

std::vector<std::string> words(const std::string& text) {
  std::vector<std::string> result;
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = std::min(text.find(' ', begin), text.size());
    if (end > begin) result.push_back(text.substr(begin, end - begin));
    begin = end + 1;
  }
  return result;
}

}  // namespace

BuildInfo build_info() {
  return {FLEXTRON_VERSION, __VERSION__, words(FLEXTRON_ISAS), words(FLEXTRON_CUDA_ARCHS)};
}

std::vector<std::string> op_schemas() { return {std::begin(kSchemas), std::end(kSchemas)}; }

}  // namespace flextron

STABLE_TORCH_LIBRARY(flextron, m) {
  for (const char* schema : flextron::kSchemas) m.def(schema);
}

STABLE_TORCH_LIBRARY_IMPL(flextron, CPU, m) {
  m.impl("elastic_linear", TORCH_BOX(&flextron::elastic_linear));
  m.impl("elastic_linear_backward", TORCH_BOX(&flextron::elastic_linear_backward));
  m.impl("elastic_mlp", TORCH_BOX(&flextron::elastic_mlp));
  m.impl("elastic_mlp_with_hidden", TORCH_BOX(&flextron::elastic_mlp_with_hidden));
  m.impl("elastic_mlp_backward", TORCH_BOX(&flextron::elastic_mlp_backward));
  m.impl("packed_linear", TORCH_BOX(&flextron::packed_linear));
  m.impl("packed_mlp", TORCH_BOX(&flextron::packed_mlp));
  m.impl("decoder_hold", TORCH_BOX(&flextron::decoder_hold));
  m.impl("decoder_step", TORCH_BOX(&flextron::decoder_step));
  m.impl("prefix_gate", TORCH_BOX(&flextron::prefix_gate));
  m.impl("prefix_gate_backward", TORCH_BOX(&flextron::prefix_gate_backward));
  m.impl("route", TORCH_BOX(&flextron::route));
  m.impl("head_attention", TORCH_BOX(&flextron::head_attention));
  m.impl("head_attention_backward", TORCH_BOX(&flextron::head_attention_backward));
  m.impl("head_attention_decode", TORCH_BOX(&flextron::head_attention_decode));
  m.impl("head_attention_decode_backward", TORCH_BOX(&flextron::head_attention_decode_backward));
}

// It has no tensor that would name a device.
STABLE_TORCH_LIBRARY_IMPL(flextron, CompositeExplicitAutograd, m) {
  m.impl("decoder_drop", TORCH_BOX(&flextron::decoder_drop));
}

#ifdef FLEXTRON_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(flextron, CUDA, m) {
  m.impl("elastic_linear", TORCH_BOX(&flextron::elastic_linear));
  m.impl("elastic_linear_backward", TORCH_BOX(&flextron::elastic_linear_backward));
  m.impl("elastic_mlp", TORCH_BOX(&flextron::elastic_mlp));
  m.impl("elastic_mlp_with_hidden", TORCH_BOX(&flextron::elastic_mlp_with_hidden));
  m.impl("elastic_mlp_backward", TORCH_BOX(&flextron::elastic_mlp_backward));
  m.impl("prefix_gate", TORCH_BOX(&flextron::prefix_gate));
  m.impl("prefix_gate_backward", TORCH_BOX(&flextron::prefix_gate_backward));
  m.impl("route", TORCH_BOX(&flextron::route));
  m.impl("head_attention", TORCH_BOX(&flextron::head_attention));
  m.impl("head_attention_backward", TORCH_BOX(&flextron::head_attention_backward));
  m.impl("head_attention_decode", TORCH_BOX(&flextron::head_attention_decode));
  m.impl("head_attention_decode_backward", TORCH_BOX(&flextron::head_attention_decode_backward));
}
#endif
