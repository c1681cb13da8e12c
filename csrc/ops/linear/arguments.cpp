// The checks of elastic_linear's arguments; packed_linear has those of its panels besides.
#include "ops/linear/arguments.h"

#include <algorithm>

namespace flextron::linear {
namespace {

int64_t block_width(const char* op, const char* name, int64_t size, const char* blocks_name, int64_t blocks) {
  check_positive(op, blocks_name, blocks);
  if (size % blocks != 0)
    fail(op, ": ", name, " must be divisible by ", blocks_name, " (", blocks, "), got ", size);
  return size / blocks;
}

}  // namespace

void check_sizes(const Linear& l) {
  check_range(l.op, "in_features", l.in_features, 0, std::min(l.kx, l.kw));
  check_range(l.op, "out_features", l.out_features, 0, l.nw);
  if (l.in_extent && l.out_extent) fail(l.op, ": in_extent must be None when out_extent is given, got both");
}

Extents host_extents(const Linear& l) {
  return l.in_extent ? read_extents(l.op, "in_extent", l.in_extent, l.x, l.in_features)
                     : read_extents(l.op, "out_extent", l.out_extent, l.x, l.out_features);
}

Linear read(Linear l) {
  check_dim(l.op, "x", l.x, 2);
  check_floating(l.op, "x", l.x);
  check_dim(l.op, "weight", l.weight, 2);
  check_dtype(l.op, "weight", l.weight, l.x.scalar_type());
  check_device(l.op, "weight", l.weight, l.x.device());
  if (l.bias) check_like(l.op, "bias", *l.bias, {l.weight.size(0)}, l.x.scalar_type(), l.x.device());
  l.kx = block_width(l.op, "x.size(1)", l.x.size(1), "in_blocks", l.in_blocks);
  l.kw = block_width(l.op, "weight.size(1)", l.weight.size(1), "in_blocks", l.in_blocks);
  l.nw = block_width(l.op, "weight.size(0)", l.weight.size(0), "out_blocks", l.out_blocks);
  check_sizes(l);
  if (!l.has_extent() || !runs_on_gpu(l.x)) l.extents = host_extents(l);
  return l;
}

}  // namespace flextron::linear
