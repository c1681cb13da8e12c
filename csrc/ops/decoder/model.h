// What decoder_hold is given, read once and checked: a decoder's weights by name, and its shape. Nothing here
// knows a device; pass.h turns a model into something that computes.
#pragma once

#include <algorithm>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "kernels/decoder.h"
#include "kernels/elastic_mlp.h"
#include "kernels/panel_format.h"
#include "ops/checks.h"

namespace flextron::decoder {

constexpr auto kHold = "decoder_hold";

struct Shape {
  int64_t layers, F, H, G, D;  // neurons, query heads, groups and the size of a head in a full layer
  int64_t K, vocabulary;       // the embedding's columns and rows
  float eps;                   // added to the norms' mean squares
  double scale;                // multiplies the attention scores
  bool by_group;               // heads are counted in groups with all their query heads, or in each group
  Activation activation;
  std::optional<PanelFormat> format;  // of the projections' panels; nothing where weights are plain
  NormKind norms;
  Rotation rotation;
  NormOver norm_over;
  bool norm_last;        // whether heads are turned before their norms
  float clip;            // bounds queries, keys and values; infinite: nothing does
  bool gated, parallel;  // whether MLPs have a gate; whether they are beside attention
  float embedding_scale, residual_scale, logit_scale;
  float logit_cap;               // or 0: none
  std::vector<int64_t> tables;   // of each layer: which of the tables turns its heads, from 1; 0: none
  std::vector<int64_t> windows;  // of each layer: how many keys a token sees; 0: all
  double softcap;                // of the attention scores, or 0: none

  // How many tables of the rotary embedding a call brings, side by side.
  int64_t table_count() const {
    return tables.empty() ? 1 : std::max<int64_t>(1, *std::max_element(tables.begin(), tables.end()));
  }

  int64_t queries() const { return H / G; }              // of a group
  int64_t fused() const { return (queries() + 2) * D; }  // features of a group with its key and value
  int64_t most_heads() const { return by_group ? G : queries(); }  // that a row uses, in its unit
  int64_t blocks() const { return by_group ? 1 : G; }              // of query heads
  int64_t unit_heads() const { return by_group ? queries() : 1; }  // query heads a unit has in each block
};

// Tensors by name: one for a name of the whole model, one for each layer for a name of a layer's.
class Weights {
 public:
  // `names` are separated by spaces, in the order of the tensors.
  Weights(std::vector<Tensor> tensors, const std::string& names, int64_t layers);

  const std::vector<Tensor>& all() const { return tensors_; }
  const Tensor* find(const std::string& name, int64_t layer = 0) const;  // null: not given
  const Tensor& get(const std::string& name, int64_t layer = 0) const;

 private:
  std::vector<Tensor> tensors_;
  std::map<std::string, int64_t> first_;
};

// y = W x + bias. W is plain, [outputs, inputs], or panels with the outputs and inputs in that many blocks.
struct Matrix {
  const Tensor *weight, *scales, *bias;  // null: not given
  int64_t out_blocks, in_blocks;
};

struct Norm {
  const Tensor *weight, *bias;  // null: not given
};

// Of each layer alike qkv, or q, k and v; the others have no weight.
struct Layer {
  Norm in_norm, attention_post, mlp_norm, mlp_post, q_norm, k_norm;
  Matrix qkv, q, k, v, o, gate, up, down;  // a packed model's gate is in the panels of `up`
};

// The other arguments of decoder_hold.
struct Settings {
  const std::vector<int64_t>& shape;   // layers, neurons, query_heads, groups, head_size
  const std::vector<double>& numbers;  // eps, scale
  const std::string &unit, &activation, &format, &norms, &rotation, &norm_over;
  bool gated, parallel, norm_last;
  const std::vector<double>& scales;  // of the embedding, of what is added to the stream, of the logits
  std::optional<double> logit_cap, softcap, clip;
  const std::optional<std::vector<int64_t>>&tables, &windows;  // of each layer
};

struct Model {
  Weights weights;
  const Tensor* embedding;  // [vocabulary, K]
  Shape shape;
  std::vector<Layer> layers;
  Norm norm;
  Matrix head;

  Model(std::vector<Tensor> tensors, const std::string& names, const Settings& settings);
  Model(const Model&) = delete;  // its parts point into it
  Model& operator=(const Model&) = delete;
};

}  // namespace flextron::decoder
