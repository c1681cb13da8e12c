// elastic_mlp's arguments, read once, and what its three ops hand to each other.
#pragma once

#include <optional>
#include <vector>

#include "kernels/elastic_mlp.h"
#include "ops/extents.h"
#include "ops/ops.h"

namespace flextron::mlp {

// The op's arguments in the order of its schema, and what follows from them.
struct Mlp {
  const char* op;
  Tensor x;
  OptionalTensor w_gate;
  Tensor w_up, w_down;  // plain; packed_mlp's panels
  OptionalTensor b_gate, b_up, b_down;
  int64_t width;  // neurons that can be used: with a mixture its largest choice
  Activation activation;
  OptionalTensor extent;
  OptionalTensor mixture;  // the argument `gate`: [T, C] or [1, C], contiguous, accumulation dtype
  std::optional<std::vector<int64_t>> choices;  // [C], with a mixture alone

  Extents extents = {};  // of the hidden neurons, where the host knows them

  int64_t mixture_choices() const { return mixture ? mixture->size(1) : 1; }
  int64_t mixture_stride() const { return mixture && mixture->size(0) > 1 ? mixture->size(1) : 0; }
};

// The arguments, checked, with all that follows from them.
Mlp read(Mlp arguments);

// The hidden layer before the activation, which the forward keeps for the backward: [T, width], rows in the
// order of the extents, zeros beyond each row's.
struct Hidden {
  Tensor u;
  OptionalTensor g;  // of a gated MLP
};

// Which gradients elastic_mlp_backward is asked for, and the gradients in the order of its results; one that
// is not wanted is empty.
struct Wanted {
  bool x, w_gate, w_up, w_down, b_gate, b_up, b_down, mixture;

  // Whether there is more to do than to sum dy's rows.
  bool beyond_b_down() const { return x || w_gate || w_up || w_down || b_gate || b_up || mixture; }
};
struct Gradients {
  Tensor x, w_gate, w_up, w_down, b_gate, b_up, b_down;
  Tensor mixture;  // of each token: [T, C], accumulation dtype
};

Wanted read_output_mask(const Mlp& mlp, int64_t output_mask);

}  // namespace flextron::mlp
