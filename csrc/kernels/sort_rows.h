// Rows in descending order of their extents, equals in the order they came: order[place[t]] = t.
#pragma once

#include <cstdint>

struct CUstream_st;  // cudaStream_t, without the CUDA headers

namespace flextron {

struct SortRowsParams {
  const int64_t* extent;  // [T]
  int64_t* sorted;        // [T], descending
  int64_t* order;         // [T], sorted row -> row
  int64_t* place;         // [T], row -> sorted row
  int64_t T;
};

// Every row is compared with every other, which takes less than the launches of a radix sort for as many
// rows as a block of threads can hold in 64 KiB of shared memory.
constexpr int64_t kMostSortedRows = 8192;

// T is at most kMostSortedRows.
void sort_rows_cuda(const SortRowsParams& p, CUstream_st* stream);

}  // namespace flextron
