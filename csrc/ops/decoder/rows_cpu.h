// Rows on a CPU, one for each token: what they use of an axis, where they lie, and the GEMMs over them.
#pragma once

#include <utility>
#include <vector>

#include "core/staircase.h"
#include "ops/decoder/call.h"
#include "ops/elastic_gemm.h"

namespace flextron::decoder {

// What each row uses of one axis of a layer, in its unit; sorted rows where they differ.
struct Used {
  Staircase stairs;
  std::vector<int64_t> extents;  // of each row; empty where all rows have the same

  int64_t widest() const { return stairs.steps.front().extent; }
  bool flat() const { return stairs.steps.size() == 1; }
  const int64_t* order() const { return flat() ? nullptr : stairs.order.data(); }
};

inline Used used_by_rows(std::vector<int64_t> extents, int64_t most) {
  Staircase stairs = make_staircase(extents.data(), extents.size(), most);
  return {std::move(stairs), std::move(extents)};
}

// Of a call without a router.
inline Used used_in(const LayerExtents& extents, int64_t layer, const Tokens& tokens, int64_t most) {
  const int64_t* const values = extents.of(layer);
  if (extents.each == 1) return {flat_staircase(tokens.rows(), values[0]), {}};
  std::vector<int64_t> rows(tokens.rows());
  for (int64_t r = 0; r < tokens.rows(); ++r) rows[r] = values[r / tokens.T];
  return used_by_rows(std::move(rows), most);
}

// Inputs or features of a row.
struct Count {
  int64_t all, each;  // `each` for every unit of its extent

  int64_t of(const Step& step) const { return all + each * step.extent; }
};

// Rows that a GEMM reads, and those that it writes: row r of the sorted ones goes where `order` sends it.
struct From {
  const float* data;
  int64_t row, block;
};
struct To {
  float* data;
  int64_t row;
  const int64_t* order = nullptr;
};

// Scratch floats of one call.
struct Buffers {
  Tensor memory;
  float* next;

  Buffers(const Tensor& like, int64_t count)
      : memory(empty(like, {count}, ScalarType::Float)), next(mutable_data_of<float>(memory)) {}
  float* take(int64_t count) {
    float* const at = next;
    next += count;
    return at;
  }
};

inline void copy_rows(const GemmRowsParams& p, int64_t rows) {
  const auto kernel = FLEXTRON_FOR_PLAIN_ISA(elastic_gemm_rows);
  parallel_for(rows, p.columns, [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
}

inline GemmJob job(ElasticGemmParams p, From from, const Staircase& stairs, Count inputs, Count features,
                   To to) {
  p.a = from.data;
  p.a_row = from.row;
  p.a_block = from.block;
  p.features = features.of(stairs.steps.front());
  p.y = to.data;
  p.y_row = to.row;
  p.y_block = p.features;
  p.order = to.order;
  return {p, gemm_schedule(
                 p, stairs.steps, [&](const Step& step) { return inputs.of(step); },
                 [&](const Step& step) { return features.of(step); })};
}

}  // namespace flextron::decoder
