// Reads and checks what decoder_hold is given.
#include "ops/decoder/model.h"

#include <algorithm>
#include <iterator>
#include <limits>
#include <sstream>
#include <utility>

#include "kernels/decoder.h"
#include "ops/activation.h"
#include "ops/packed.h"

namespace flextron::decoder {
namespace {

constexpr const char* kOfModel[] = {"embedding", "norm", "norm_bias", "head", "head_scales", "head_bias"};
constexpr const char* kOfLayer[] = {"in_norm",
                                    "in_norm_bias",
                                    "attention_post",
                                    "attention_post_bias",
                                    "mlp_norm",
                                    "mlp_norm_bias",
                                    "mlp_post",
                                    "mlp_post_bias",
                                    "q_norm",
                                    "q_norm_bias",
                                    "k_norm",
                                    "k_norm_bias",
                                    "qkv",
                                    "qkv_bias",
                                    "qkv_scales",
                                    "q",
                                    "k",
                                    "v",
                                    "o",
                                    "gate",
                                    "up",
                                    "down",
                                    "q_bias",
                                    "k_bias",
                                    "v_bias",
                                    "o_bias",
                                    "gate_bias",
                                    "up_bias",
                                    "down_bias",
                                    "q_scales",
                                    "k_scales",
                                    "v_scales",
                                    "o_scales",
                                    "up_scales",
                                    "down_scales"};
constexpr const char* kNeeded[] = {"embedding", "norm", "head", "o", "up", "down"};

template <size_t N>
bool is_in(const char* const (&list)[N], const std::string& name) {
  return std::find(std::begin(list), std::end(list), name) != std::end(list);
}

int64_t layers_of(const std::vector<int64_t>& shape) {
  if (shape.size() != 5) fail(kHold, ": shape must have 5 entries, got ", shape.size());
  return shape[0];
}

const Tensor& checked_embedding(const Tensor& embedding) {
  check_dim(kHold, "embedding", embedding, 2);
  if (!embedding.is_contiguous()) fail(kHold, ": embedding must be contiguous, got strides");
  return embedding;
}

// The value of an enumeration whose names, in order, are these.
template <class Kind, size_t N>
Kind kind_of(const char* argument, const char* const (&names)[N], const std::string& name) {
  std::string known;
  for (size_t i = 0; i < N; ++i) {
    if (name == names[i]) return static_cast<Kind>(i);
    known += (i == 0 ? "" : ", ") + std::string(names[i]);
  }
  fail(kHold, ": ", argument, " must be one of ", known, ", got ", name);
}
constexpr const char* kNorms[] = {"rms", "rms+1", "layer", "layer+1"};
constexpr const char* kRotations[] = {"halves", "pairs"};
constexpr const char* kNormsOver[] = {"head", "heads", "each"};

// A bound that is above 0, or 0 where there is none.
double bound_of(const char* name, std::optional<double> bound) {
  if (!bound) return 0;
  check_finite(kHold, name, *bound);
  if (static_cast<float>(*bound) <= 0) fail(kHold, ": ", name, " must be above 0, got ", *bound);
  return *bound;
}

// A number for each layer, 0 where none are given.
std::vector<int64_t> of_layers(const char* name, const std::optional<std::vector<int64_t>>& given,
                               int64_t layers, int64_t otherwise, int64_t most) {
  if (!given) return std::vector<int64_t>(layers, otherwise);
  if (static_cast<int64_t>(given->size()) != layers)
    fail(kHold, ": ", name, " must have ", layers, " entries, got ", given->size());
  for (const int64_t value : *given) check_range(kHold, name, value, 0, most);
  return *given;
}

Shape read_shape(const Settings& settings, const Tensor& embedding) {
  const auto& [shape, numbers, unit, activation, format, norms, rotation, norm_over, gated, parallel,
               norm_last, scales, logit_cap, softcap, clip, tables, windows] = settings;
  constexpr int64_t kMost = std::numeric_limits<int64_t>::max();
  if (numbers.size() != 2) fail(kHold, ": numbers must have 2 entries, got ", numbers.size());
  const int64_t query_heads = shape[2], groups = shape[3];
  check_range(kHold, "neurons", shape[1], 0, kMost);
  check_positive(kHold, "groups", groups);
  if (query_heads < groups || query_heads % groups != 0)
    fail(kHold, ": query_heads must be a multiple of the ", groups, " groups, got ", query_heads);
  check_range(kHold, "head_size", shape[4], 1, kLongestHead);
  if (unit != "kv_group" && unit != "query") fail(kHold, ": unit must be kv_group or query, got ", unit);
  const auto [eps, scale] = std::pair(numbers[0], numbers[1]);
  check_finite(kHold, "eps", eps);
  if (eps < 0) fail(kHold, ": eps must not be negative, got ", eps);
  check_finite(kHold, "scale", scale);
  if (scales.size() != 3) fail(kHold, ": scales must have 3 entries, got ", scales.size());
  constexpr const char* kScales[] = {"embedding_scale", "residual_scale", "logit_scale"};
  for (size_t i = 0; i < scales.size(); ++i) check_finite(kHold, kScales[i], scales[i]);
  const auto over = kind_of<NormOver>("norm_over", kNormsOver, norm_over);
  const auto kind = kind_of<NormKind>("norms", kNorms, norms);
  if (over == NormOver::kHeads) {
    if (norm_last) fail(kHold, ": norm_last must be false where norm_over is heads, got true");
    if (kind != NormKind::kRms && kind != NormKind::kRmsPlusOne)
      fail(kHold, ": norms must be rms or rms+1 where norm_over is heads, got ", norms);
  }
  return {.layers = shape[0],
          .F = shape[1],
          .H = query_heads,
          .G = groups,
          .D = shape[4],
          .K = embedding.size(1),
          .vocabulary = embedding.size(0),
          .eps = static_cast<float>(eps),
          .scale = scale,
          .by_group = unit == "kv_group",
          .activation = activation_of(kHold, activation),
          .format = format == "plain" ? std::nullopt : std::optional(panel_format(kHold, format)),
          .norms = kind,
          .rotation = kind_of<Rotation>("rotation", kRotations, rotation),
          .norm_over = over,
          .norm_last = norm_last,
          .clip = clip ? static_cast<float>(bound_of("clip", clip)) : std::numeric_limits<float>::infinity(),
          .gated = gated,
          .parallel = parallel,
          .embedding_scale = static_cast<float>(scales[0]),
          .residual_scale = static_cast<float>(scales[1]),
          .logit_scale = static_cast<float>(scales[2]),
          .logit_cap = static_cast<float>(bound_of("logit_cap", logit_cap)),
          .tables = of_layers("tables", tables, shape[0], 1, 2),
          .windows = of_layers("windows", windows, shape[0], 0, kMost),
          .softcap = bound_of("softcap", softcap)};
}

// Hands out weights that have the shape, the dtype and the device they must have.
class Reader {
 public:
  Reader(const Model& model, int64_t layer) : model_(model), layer_(layer) {}

  // A tensor of these sizes; null where it is not given (Weights has seen to those that are needed).
  const Tensor* tensor(const std::string& name, std::initializer_list<int64_t> sizes) const {
    const Tensor* const t = model_.weights.find(name, layer_);
    if (!t) return nullptr;
    check_like(kHold, name.c_str(), *t, sizes, dtype(), device());
    if (!t->is_contiguous()) fail(kHold, ": ", name, " must be contiguous, got strides");
    return t;
  }

  Norm norm(const std::string& name, std::initializer_list<int64_t> sizes) const {
    const Norm norm{tensor(name, sizes), tensor(name + "_bias", sizes)};
    if (norm.bias && !norm.weight) fail(kHold, ": ", name, " must be given with its bias, got none");
    return norm;
  }

  // The norm of queries or keys, of so many heads.
  Norm head_norm(const std::string& name, int64_t heads) const {
    const int64_t D = model_.shape.D;
    switch (model_.shape.norm_over) {
      case NormOver::kHead:
        return norm(name, {D});
      case NormOver::kHeads:
        return norm(name, {heads * D});
      case NormOver::kEach:
        return norm(name, {heads, D});
    }
    return {};
  }

  // A projection of in_blocks * inputs to out_blocks * outputs; panels hold `panels` for each 16 outputs.
  Matrix matrix(const std::string& name, int64_t out_blocks, int64_t outputs, int64_t in_blocks,
                int64_t inputs, int64_t panels = 1) const {
    const std::string scales_name = name + "_scales";
    const Tensor& weight = model_.weights.get(name, layer_);
    const Tensor* const scales = model_.weights.find(scales_name, layer_);
    if (model_.shape.format) {
      const std::optional<Tensor> given = scales ? std::optional(*scales) : std::nullopt;
      const PackedWeight packed{*model_.shape.format, name.c_str(), weight, scales_name.c_str(), given};
      check_panels(kHold, packed, *model_.embedding);
      const int64_t count = panels * ((outputs + kPanel - 1) / kPanel);
      if (weight.size(0) != out_blocks)
        fail(kHold, ": ", name, ".size(0) must be ", out_blocks, ", got ", weight.size(0));
      check_words(kHold, packed, in_blocks, inputs, count);
    } else {
      if (scales) fail(kHold, ": ", scales_name, " must not be given for a plain weight, got a tensor");
      check_like(kHold, name.c_str(), weight, {out_blocks * outputs, in_blocks * inputs}, dtype(), device());
      if (weight.size(1) > 1 && weight.stride(1) != 1)
        fail(kHold, ": ", name, " must have contiguous rows, got strides");
    }
    return {&weight, scales, tensor(name + "_bias", {out_blocks * outputs}), out_blocks, in_blocks};
  }

  Layer layer() const {
    const Shape& s = model_.shape;
    const int64_t blocks = s.blocks(), queries = s.H * s.D / blocks, groups = s.G * s.D;
    const bool has_gate = model_.weights.find("gate", layer_) != nullptr;
    if (s.gated && has_gate == s.format.has_value())
      fail(kHold, ": gate must be given with a plain up, and be among the panels of a packed one, got ",
           has_gate ? "both" : "neither");
    if (!s.gated && (has_gate || model_.weights.find("gate_bias", layer_)))
      fail(kHold, ": gate must not be given, nor its bias, where gated is false, got one");
    const bool fused = model_.weights.find("qkv", layer_) != nullptr;
    if (fused && s.norm_over == NormOver::kHeads)
      fail(kHold, ": qkv must not be given where norm_over is heads, got one");
    Layer layer{.in_norm = norm("in_norm", {s.K}),
                .attention_post = norm("attention_post", {s.K}),
                .mlp_norm = norm("mlp_norm", {s.K}),
                .mlp_post = norm("mlp_post", {s.K}),
                .q_norm = head_norm("q_norm", s.H),
                .k_norm = head_norm("k_norm", s.G),
                .qkv = fused ? matrix("qkv", 1, s.fused() * s.G, 1, s.K) : Matrix{},
                .q = fused ? Matrix{} : matrix("q", blocks, queries, 1, s.K),
                .k = fused ? Matrix{} : matrix("k", 1, groups, 1, s.K),
                .v = fused ? Matrix{} : matrix("v", 1, groups, 1, s.K),
                .o = matrix("o", 1, s.K, blocks, queries),
                .gate = {},
                .up = matrix("up", 1, s.F, 1, s.K, s.gated && !has_gate ? 2 : 1),
                .down = matrix("down", 1, s.K, 1, s.F)};
    if (has_gate) {
      layer.gate = matrix("gate", 1, s.F, 1, s.K);
      if (layer.gate.weight->stride(0) != layer.up.weight->stride(0))
        fail(kHold, ": up must have the strides of gate, got others");
    }
    layer.gate.bias = tensor("gate_bias", {s.F});
    if (s.parallel && (layer.attention_post.weight || layer.mlp_post.weight))
      fail(kHold, ": attention_post and mlp_post must not be given where parallel is true, got one");
    return layer;
  }

 private:
  ScalarType dtype() const { return model_.embedding->scalar_type(); }
  Device device() const { return model_.embedding->device(); }

  const Model& model_;
  int64_t layer_;
};

}  // namespace

Weights::Weights(std::vector<Tensor> tensors, const std::string& names, int64_t layers)
    : tensors_(std::move(tensors)) {
  check_range(kHold, "layers", layers, 0, static_cast<int64_t>(tensors_.size()));
  std::istringstream words(names);
  int64_t count = 0;
  for (std::string name; words >> name;) {
    const bool of_layer = is_in(kOfLayer, name);
    if (!(of_layer || is_in(kOfModel, name)) || !first_.emplace(name, count).second)
      fail(kHold, ": names must name each weight once, got ", name);
    count += of_layer ? layers : 1;
  }
  for (const char* const name : kNeeded)
    if (!first_.contains(name)) fail(kHold, ": names must have ", name, ", got ", names);
  const bool fused = first_.contains("qkv");
  for (const std::string part : {"q", "k", "v"}) {
    if (!fused && !first_.contains(part)) fail(kHold, ": names must have ", part, ", got ", names);
    for (const std::string more : {"", "_bias", "_scales"}) {
      const std::string name = fused ? part + more : "qkv" + more;
      if (first_.contains(name))
        fail(kHold, ": names must have qkv or q, k and v, and nothing of the other, got ", names);
    }
  }
  if (static_cast<int64_t>(tensors_.size()) != count)
    fail(kHold, ": weights must have ", count, " entries, got ", tensors_.size());
}

const Tensor* Weights::find(const std::string& name, int64_t layer) const {
  const auto place = first_.find(name);
  return place == first_.end() ? nullptr : &tensors_[place->second + layer];
}

const Tensor& Weights::get(const std::string& name, int64_t layer) const {
  return tensors_[first_.at(name) + layer];
}

Model::Model(std::vector<Tensor> tensors, const std::string& names, const Settings& settings)
    : weights(std::move(tensors), names, layers_of(settings.shape)),
      embedding(&weights.get("embedding")),
      shape(read_shape(settings, checked_embedding(*embedding))) {
  for (int64_t l = 0; l < shape.layers; ++l) layers.push_back(Reader(*this, l).layer());
  const Reader reader(*this, 0);
  norm = reader.norm("norm", {shape.K});
  head = reader.matrix("head", 1, shape.vocabulary, 1, shape.K);
}

}  // namespace flextron::decoder
