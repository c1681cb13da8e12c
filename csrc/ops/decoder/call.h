// What decoder_step is given, read once and checked against the model. Nothing here knows a device, or reads
// what lies on one.
#pragma once

#include <algorithm>
#include <optional>
#include <vector>

#include "ops/decoder/model.h"
#include "ops/ops.h"

namespace flextron::decoder {

constexpr auto kStep = "decoder_step";

// B sequences of T new tokens; the last `keep` of each sequence get logits. A row is one token.
struct Tokens {
  Tensor ids;  // [B, T] int64, contiguous
  int64_t B, T, keep;

  Tokens(const Model& model, const Tensor& token_ids, int64_t kept);
  int64_t rows() const { return B * T; }
};

// The tables of the rotary embedding (RoPE), contiguous; those of a model that has several are side by side.
struct Rotary {
  Tensor cos, sin;  // [B or 1, T, tables * R]

  Rotary(const Model& model, const Tokens& tokens, const Tensor& cosines, const Tensor& sines);
};

// What chooses every row's neurons and heads: formula in csrc/kernels/decoder.h.
struct Router {
  Tensor w1, w2, state, base;  // contiguous: [layers, ...]
  std::vector<int64_t> neuron_menu, head_menu;
  int64_t hidden, rows_each;  // hidden features; rows of a request

  int64_t choices() const { return static_cast<int64_t>(neuron_menu.size() + head_menu.size()); }
};
using Integers = std::optional<std::vector<int64_t>>;
std::optional<Router> read_router(const Model& model, const Tokens& tokens,
                                  const std::optional<std::vector<Tensor>>& tensors,
                                  const Integers& neuron_menu, const Integers& head_menu);

// What each layer uses of one axis: `each` extents a layer, one for all sequences or one for each sequence.
// None where a router chooses.
struct LayerExtents {
  const std::vector<int64_t>& values;
  int64_t each;

  const int64_t* of(int64_t layer) const { return values.data() + layer * each; }
  int64_t most(int64_t layer) const { return each == 0 ? 0 : *std::max_element(of(layer), of(layer) + each); }
};
LayerExtents read_layer_extents(const char* name, const std::vector<int64_t>& values, const Model& model,
                                const Tokens& tokens, int64_t most, bool has_router);

// Keys and values of each layer, [B, room, at least stored, D], the first `cached` tokens valid.
struct Cache {
  const std::vector<Tensor>&keys, &values;
  int64_t cached;
  const std::vector<int64_t>& stored;  // groups that are projected and written in each layer
  const OptionalTensor& k_start;       // [B] integers: the first key that each sequence sees
};

struct Call {
  Tokens tokens;
  Rotary rotary;
  std::optional<Router> router;
  LayerExtents neurons, heads;
  Cache cache;
};

// Throws unless the cache suits the model and the rest of the call.
void check_cache(const Model& model, const Call& call);

// What decoder_step returns.
struct Answer {
  Tensor logits;  // [B, keep, vocabulary]
  Tensor best;    // [B] int64: where each sequence's last logits are greatest; [0] where there are none

  Answer(const Model& model, const Tokens& tokens);
};

}  // namespace flextron::decoder
