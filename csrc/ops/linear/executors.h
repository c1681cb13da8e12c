// What can compute elastic_linear: core/executor.h says which of them does.
#pragma once

#include "core/executor.h"
#include "ops/elastic_gemm.h"
#include "ops/linear/arguments.h"
#include "ops/linear/sides.h"

namespace flextron::linear {

Tensor forward_on_views(const Linear& linear);
Gradients backward_on_views(const Linear& linear, const Tensor& dy, const Wanted& wanted);
// dy and x in the order of the extents; what no row uses is left as it is.
void weight_gradient_on_views(const Sides& sides, const Tensor& dy, const Tensor& x, const Tensor& dweight);

Tensor forward_on_panels(const Linear& linear);
Gradients backward_on_panels(const Linear& linear, const Tensor& dy, const Wanted& wanted,
                             Executor weight_gradient);
// y, the weight being in `weight`: plain, or packed_linear's panels.
Tensor product_on_panels(const Linear& linear, ElasticGemmParams weight);

// kTile or kStream.
Tensor forward_on_gpu(const Linear& linear, Executor executor);
Gradients backward_on_gpu(const Linear& linear, const Tensor& dy, const Wanted& wanted);

}  // namespace flextron::linear
