// Whether our own GEMM or the vendor's multiplies plain weights on this machine's CPU: measured once, and
// kept in the user's cache. FLEXTRON_CACHE names the folder; empty, nothing is kept.
//
// What is not kept is not used, so that two processes of one machine choose alike, as a resumed run must. A
// process chooses once for each dtype: a changed file, or another number of threads, counts from the next on.
#pragma once

#include "core/gemm_times.h"
#include "ops/device.h"

namespace flextron {

// Work of fewer multiplications is not measured for, nor chosen by what was: it takes less than 100 us.
constexpr int64_t kMeasuredWork = int64_t{1} << 22;

// For so many rows of x's dtype, float32, bfloat16 or float16, and a weight of so many elements. Where rows
// may have extents of their own, ours is never given up: in the vendor's a row's bits depend on how many
// share its extent. `trains`: see prefers_own.
bool own_gemm_is_chosen(ScalarType dtype, int64_t rows, int64_t weights, bool has_extent, bool trains);

}  // namespace flextron
