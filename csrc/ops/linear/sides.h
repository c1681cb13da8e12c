// The two sides of a weight on a CPU, cut into blocks of which a prefix counts, and room for the gradients.
#pragma once

#include <algorithm>

#include "ops/linear/arguments.h"

namespace flextron::linear {

// `blocks` blocks, each `features` wide in the activation and `stride` in the weight, of which the first
// `used` count.
struct Side {
  int64_t blocks, features, stride, used;

  // Blocks that touch each other on both sides are one block.
  void join() {
    if (used != features || used != stride) return;
    *this = {1, blocks * features, blocks * stride, blocks * used};
  }
};

struct Sides {
  Side in, out;
  const Extents& extents;
  bool per_token_in, per_token_out;  // at most one of them

  // For the vendor's GEMM, which has the fewer calls to do. Our own makes the chains of a sum block by block.
  void join() {
    if (!per_token_in) in.join();
    if (!per_token_out) out.join();
  }

  // Whether every feature of the side is used by every row: then all of its gradient is written.
  bool whole_in() const { return !per_token_in && in.used == in.features && in.used == in.stride; }
  bool whole_out() const { return !per_token_out && out.used == out.stride; }
  // The same of the activation alone, whose blocks may be narrower than the weight's.
  bool whole_x() const { return !per_token_in && in.used == in.features; }

  int64_t in_used(const Step& step) const { return per_token_in ? step.extent : in.used; }
  int64_t out_used(const Step& step) const { return per_token_out ? step.extent : out.used; }
  int64_t widest_in() const { return per_token_in ? extents.widest() : in.used; }
  int64_t widest_out() const { return per_token_out ? extents.widest() : out.used; }

  // The columns of a side with the first rows that use them, of T: the staircase where the side is per token,
  // one block otherwise.
  std::vector<ColumnBlock> in_columns(int64_t T) const { return columns_of(per_token_in, in.used, T); }
  std::vector<ColumnBlock> out_columns(int64_t T) const { return columns_of(per_token_out, out.used, T); }

 private:
  std::vector<ColumnBlock> columns_of(bool per_token, int64_t used, int64_t T) const {
    if (per_token) return column_blocks(extents.stairs);
    return {{0, used, T}};
  }
};

inline Sides sides_of(const Linear& linear) {
  Sides sides{.in = {linear.in_blocks, linear.kx, linear.kw, linear.in_features},
              .out = {linear.out_blocks, linear.out_features, linear.nw, linear.out_features},
              .extents = linear.extents,
              .per_token_in = false,
              .per_token_out = false};
  if (!linear.extents.flat()) {
    sides.per_token_in = linear.in_extent.has_value();
    sides.per_token_out = linear.out_extent.has_value();
  } else if (linear.x.size(0) > 0) {
    if (linear.in_extent) sides.in.used = linear.extents.widest();
    if (linear.out_extent) sides.out.used = linear.extents.widest();
  }
  return sides;
}

// The bias' gradient, and room for the others that are wanted, with zeros wherever no row will write.
Gradients room_and_bias_gradient(const Linear& linear, const Sides& sides, const Tensor& dy,
                                 const Wanted& wanted);

}  // namespace flextron::linear
