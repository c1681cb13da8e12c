// An MLP's arguments as csrc/kernels/elastic_mlp.h's parameters for a GPU.
#pragma once

#include <algorithm>
#include <type_traits>

#include "ops/dispatch.h"
#include "ops/elastic_gemm.h"
#include "ops/mlp/hidden.h"

namespace flextron::mlp {

template <class scalar_t>
scalar_t* mutable_or_null(const OptionalTensor& t) {
  return t ? mutable_data_of<scalar_t>(*t) : nullptr;
}

// The mixture, the kernels' `gate`; one choice, the width, where there is none.
template <class Params>
void set_mixture(Params& p, const Mlp& mlp) {
  using real = std::remove_const_t<std::remove_pointer_t<decltype(p.gate)>>;
  p.gate = data_or_null<real>(mlp.mixture);
  p.C = mlp.mixture_choices();
  p.gate_stride = mlp.mixture_stride();
  p.choices[0] = mlp.width;
  if (mlp.choices) std::copy(mlp.choices->begin(), mlp.choices->end(), p.choices);
}

// All rows at once. Where there is a gradient to make, h is what dh is until then.
template <class scalar_t>
ElasticMlpRowsParams<scalar_t> rows_params(const Mlp& mlp, const DeviceExtents& extents,
                                           const HiddenRows& rows) {
  ElasticMlpRowsParams<scalar_t> p{.g = data_or_null<scalar_t>(rows.g),
                                   .u = data_of<scalar_t>(rows.u),
                                   .h = mutable_data_of<scalar_t>(rows.h),
                                   .dh = rows.du ? data_of<scalar_t>(rows.h) : nullptr,
                                   .dg = mutable_or_null<scalar_t>(rows.dg),
                                   .du = mutable_or_null<scalar_t>(rows.du),
                                   .gate = nullptr,
                                   .dgate = mutable_or_null<accumulate_t<scalar_t>>(rows.dmixture),
                                   .extent = extents.data(),
                                   .choices = {},
                                   .T = rows.u.size(0),
                                   .width = mlp.width,
                                   .C = 0,
                                   .gate_stride = 0,
                                   .per_token = extents.per_token,
                                   .activation = mlp.activation};
  set_mixture(p, mlp);
  return p;
}

}  // namespace flextron::mlp
