// elastic_linear's arguments, read once.
#pragma once

#include "ops/extents.h"
#include "ops/ops.h"

namespace flextron::linear {

// The op's arguments in the order of its schema, and what follows from them.
struct Linear {
  const char* op;
  const Tensor& x;
  const Tensor& weight;  // plain; packed_linear's panels
  const OptionalTensor& bias;
  int64_t in_features, out_features;
  const OptionalTensor& in_extent;
  const OptionalTensor& out_extent;  // at most one of the two
  int64_t in_blocks, out_blocks;

  int64_t kx = 0, kw = 0, nw = 0;  // a block's columns in x, its columns and its rows in a plain weight
  Extents extents = {};            // of the side that has one, where the host knows them

  bool has_extent() const { return in_extent || out_extent; }
  std::vector<int64_t> y_shape() const { return {x.size(0), out_blocks * out_features}; }
};

// The arguments, checked, with all that follows from them.
Linear read(Linear arguments);
// What elastic_linear and packed_linear share: the checks of sizes, once the widths of a block are known, and
// the values of the extents.
void check_sizes(const Linear& linear);
Extents host_extents(const Linear& linear);

// Which gradients output_mask asks for, and the gradients; one that is not wanted is empty.
struct Wanted {
  bool x, weight, bias;
};
struct Gradients {
  Tensor x, weight, bias;
};

}  // namespace flextron::linear
