// Tokens sorted by extent, descending, and the steps where the extent changes: the shape every clipped GEMM
// follows.
//
//   rows order[0 .. steps[0].end) have extent steps[0].extent, rows order[steps[0].end .. steps[1].end) the
//   next, ...
//
// Neuron j is then needed by exactly the first n_j sorted rows, n_j falling with j.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

namespace flextron {

struct Step {
  int64_t extent;      // of every row of the step
  int64_t begin, end;  // sorted rows
};

// Columns [begin, end), needed by the first `rows` sorted rows and by no other.
struct ColumnBlock {
  int64_t begin, end, rows;
};

struct Staircase {
  std::vector<int64_t> order;  // [T], sorted row -> token; empty when no row moves
  std::vector<Step> steps;     // extents strictly descending; extent 0 included
};

// One extent for every row.
inline Staircase flat_staircase(int64_t rows, int64_t extent) { return {{}, {{extent, 0, rows}}}; }

// Stable, descending: tokens of one extent keep their order. A counting sort where the extents are small
// against the number of tokens, a merge sort otherwise; both give the same order.
inline Staircase make_staircase(const int64_t* extents, int64_t rows, int64_t maximum) {
  Staircase stairs;
  if (rows == 0) return stairs;
  stairs.order.resize(rows);
  if (maximum <= 4 * rows) {
    std::vector<int64_t> start(maximum + 2,
                               0);  // start[maximum - e + 1] counts extent e, then becomes its first row
    for (int64_t t = 0; t < rows; ++t) ++start[maximum - extents[t] + 1];
    std::partial_sum(start.begin(), start.end(), start.begin());
    for (int64_t t = 0; t < rows; ++t) stairs.order[start[maximum - extents[t]]++] = t;
  } else {
    std::iota(stairs.order.begin(), stairs.order.end(), 0);
    std::stable_sort(stairs.order.begin(), stairs.order.end(),
                     [&](int64_t a, int64_t b) { return extents[a] > extents[b]; });
  }
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t extent = extents[stairs.order[i]];
    if (stairs.steps.empty() || stairs.steps.back().extent != extent) stairs.steps.push_back({extent, i, i});
    stairs.steps.back().end = i + 1;
  }
  if (stairs.steps.size() == 1) stairs.order.clear();  // one extent: stable, so nothing moved
  return stairs;
}

// The same staircase read by columns: disjoint, ascending, none beyond the widest row.
inline std::vector<ColumnBlock> column_blocks(const Staircase& stairs) {
  std::vector<ColumnBlock> blocks;
  int64_t begin = 0;
  for (auto step = stairs.steps.rbegin(); step != stairs.steps.rend(); ++step) {
    if (step->extent > begin) blocks.push_back({begin, step->extent, step->end});
    begin = step->extent;
  }
  return blocks;
}

}  // namespace flextron
