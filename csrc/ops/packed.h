// Weights in panels as arguments of an op: their format, their checks, and what a GEMM is told of them.
#pragma once

#include <string>

#include "kernels/panel_format.h"
#include "ops/elastic_gemm.h"

namespace flextron {

// The format of this name.
inline PanelFormat panel_format(const char* op, const std::string& name) {
  std::string names;
  for (const PanelFacts& facts : kPanelFormats) {
    if (name == facts.name) return static_cast<PanelFormat>(&facts - kPanelFormats);
    names += (names.empty() ? "" : ", ") + std::string(facts.name);
  }
  fail(op, ": format must be one of ", names, ", got ", name);
}

// One weight in panels, with the names that an op gives its tensors.
struct PackedWeight {
  PanelFormat format;
  const char* name;
  const Tensor& panels;  // [out_blocks, P, words of all blocks, kPanel, elements of a word]
  const char* scales_name;
  const std::optional<Tensor>& scales;  // [out_blocks, P, kPanel], or [out_blocks, P, groups, 2, kPanel]

  int64_t out_blocks() const { return panels.size(0); }
  int64_t features() const { return panels.size(1) * kPanel; }  // of a block, the last panel filled up
  int64_t inputs() const {
    return panels.size(2) * facts_of(format).together;
  }  // of all blocks, their last words filled up
};

// The inputs of a layer in panels.
inline void check_inputs(const char* op, const Tensor& x) {
  check_dim(op, "x", x, 2);
  const ScalarType dtype = x.scalar_type();
  if (dtype != ScalarType::Float && dtype != ScalarType::BFloat16 && dtype != ScalarType::Half)
    fail(op, ": x must be float32, bfloat16 or float16, got ", toString(dtype));
  if (!x.is_cpu()) fail(op, ": x must be on cpu, got ", device_text(x.device()));
}

inline void check_scales(const char* op, const PackedWeight& w, const Device& device) {
  const PanelFacts& facts = facts_of(w.format);
  if (!facts.scaled()) {
    if (w.scales) fail(op, ": ", w.scales_name, " must be None unless format has scales, got a tensor");
    return;
  }
  if (!w.scales) fail(op, ": ", w.scales_name, " must be given in format ", facts.name, ", got None");
  const bool of_group = facts.scales == PanelScales::kOfGroup;
  const int64_t blocks = w.panels.size(0), panels = w.panels.size(1);
  if (of_group)
    check_shape(op, w.scales_name, *w.scales, {blocks, panels, w.inputs() / kGroupInputs, 2, kPanel});
  else
    check_shape(op, w.scales_name, *w.scales, {blocks, panels, kPanel});
  check_dtype(op, w.scales_name, *w.scales, of_group ? ScalarType::Half : ScalarType::Float);
  check_device(op, w.scales_name, *w.scales, device);
  if (!w.scales->is_contiguous()) fail(op, ": ", w.scales_name, " must be contiguous, got strides");
}

// Whether the tensors are what the format says, for inputs x.
inline void check_panels(const char* op, const PackedWeight& w, const Tensor& x) {
  const PanelFacts& facts = facts_of(w.format);
  check_dim(op, w.name, w.panels, 5);
  check_device(op, w.name, w.panels, x.device());
  if (w.panels.size(3) != kPanel)
    fail(op, ": ", w.name, ".size(3) must be ", kPanel, ", got ", w.panels.size(3));
  if (!w.panels.is_contiguous()) fail(op, ": ", w.name, " must be contiguous, got strides");
  if (w.panels.scalar_type() != facts.storage)
    fail(op, ": ", w.name, " must have dtype ", toString(facts.storage), " in format ", facts.name, ", got ",
         toString(w.panels.scalar_type()));
  if (w.panels.size(4) != elements_of_word(w.format))
    fail(op, ": ", w.name, ".size(4) must be ", elements_of_word(w.format), " in format ", facts.name,
         ", got ", w.panels.size(4));
  if (w.inputs() % facts.multiple != 0)
    fail(op, ": ", w.name, ".size(2) must be a multiple of ", facts.multiple / facts.together, " in format ",
         facts.name, ", got ", w.panels.size(2));
  if (!facts.scaled() && facts.storage != x.scalar_type())
    fail(op, ": format must have scales or store the dtype of x, ", toString(x.scalar_type()), ", got ",
         facts.name);
  check_scales(op, w, x.device());
}

// Panels of one block of outputs or several, for blocks of so many inputs.
inline void check_words(const char* op, const PackedWeight& w, int64_t in_blocks, int64_t inputs,
                        int64_t panels) {
  check_shape(
      op, w.name, w.panels,
      {w.out_blocks(), panels, in_blocks * words_of(w.format, inputs), kPanel, elements_of_word(w.format)});
}

// A bias has the features of all blocks, of each at least those used.
inline void check_packed_bias(const char* op, const std::optional<Tensor>& bias, int64_t blocks,
                              int64_t features, const Tensor& x) {
  if (!bias) return;
  check_dim(op, "bias", *bias, 1);
  check_dtype(op, "bias", *bias, x.scalar_type());
  check_device(op, "bias", *bias, x.device());
  const int64_t size = bias->size(0);
  if (blocks == 0 || size % blocks != 0 || size / blocks < features)
    fail(op, ": bias.size(0) must be a multiple of ", blocks, " blocks and at least ", blocks * features,
         ", got ", size);
}

// The fields of a GEMM that follow from a layer's panels.
inline ElasticGemmParams on_panels(const PackedWeight& w, int64_t in_blocks) {
  ElasticGemmParams p = no_gemm();
  p.layout = GemmLayout::kPanels;
  p.weight_dtype = facts_of(w.format).element;
  p.weight[0] = w.panels.const_data_ptr();
  p.in_blocks = in_blocks;
  p.in_stride = w.inputs() / in_blocks;
  p.out_blocks = w.out_blocks();
  p.out_stride = w.panels.size(1);
  p.quantised = facts_of(w.format).quantised;
  const void* const scales = w.scales ? w.scales->const_data_ptr() : nullptr;
  if (facts_of(w.format).scales == PanelScales::kOfGroup)
    p.group_scales = scales;
  else
    p.scales = static_cast<const float*>(scales);
  return p;
}

}  // namespace flextron
