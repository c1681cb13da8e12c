// What decoder_hold is given, read once and checked: a decoder's weights by name, and its shape. Nothing here
// knows a device; pass.h turns a model into something that computes.
#pragma once

#include <map>
#include <optional>
#include <string>
#include <vector>

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

  int64_t queries() const { return H / G; }                        // of a group
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

struct Layer {
  const Tensor *in_norm, *mlp_norm, *q_norm, *k_norm;  // the last two null where heads are not normalised
  Matrix q, k, v, o, gate, up, down;                   // a packed model's gate is in the panels of `up`
};

struct Model {
  Weights weights;
  const Tensor* embedding;  // [vocabulary, K]
  Shape shape;
  std::vector<Layer> layers;
  const Tensor* norm;
  Matrix head;

  // The arguments of decoder_hold: `shape` is [layers, neurons, query_heads, groups, head_size], `numbers`
  // [eps, scale].
  Model(std::vector<Tensor> tensors, const std::string& names, const std::vector<int64_t>& shape,
        const std::vector<double>& numbers, const std::string& unit, const std::string& activation,
        const std::string& format);
  Model(const Model&) = delete;  // its parts point into it
  Model& operator=(const Model&) = delete;
};

}  // namespace flextron::decoder
