// What can compute elastic_mlp: core/executor.h says which of them does.
#pragma once

#include <utility>

#include "core/executor.h"
#include "ops/elastic_gemm.h"
#include "ops/mlp/arguments.h"

namespace flextron::mlp {

using WithHidden = std::pair<Tensor, Hidden>;  // y, and what the backward needs

Tensor forward_on_views(const Mlp& mlp);
WithHidden forward_with_hidden_on_views(const Mlp& mlp);
Gradients backward_on_views(const Mlp& mlp, const Tensor& dy, const Hidden& hidden, const Wanted& wanted);

// forward_on_panels takes no mixture of widths.
Tensor forward_on_panels(const Mlp& mlp);
WithHidden forward_with_hidden_on_panels(const Mlp& mlp);
Gradients backward_on_panels(const Mlp& mlp, const Tensor& dy, const Hidden& hidden, const Wanted& wanted,
                             Executor weight_gradient);
// y, the weights being in `up`, which may be gated, and `down`, whose features are known: plain, or
// packed_mlp's panels.
Tensor product_on_panels(const Mlp& mlp, ElasticGemmParams up, ElasticGemmParams down);

// kTile or kStream.
Tensor forward_on_gpu(const Mlp& mlp, Executor executor);
WithHidden forward_with_hidden_on_gpu(const Mlp& mlp);
Gradients backward_on_gpu(const Mlp& mlp, const Tensor& dy, const Hidden& hidden, const Wanted& wanted);

}  // namespace flextron::mlp
