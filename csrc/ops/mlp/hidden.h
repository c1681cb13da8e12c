// What lies between an MLP's GEMMs: activation, product, mixture of widths, and their gradients (formula in
// csrc/kernels/elastic_mlp.h), and the gradients that follow from the hidden layer's by the vendor's GEMM.
#pragma once

#include "ops/gemm.h"
#include "ops/mlp/arguments.h"

namespace flextron::mlp {

// Rows that share the extent d; `row` is the first one's place in a mixture.
struct HiddenRows {
  OptionalTensor g;
  Tensor u, h;  // h: s * h, where the backward finds its gradient
  OptionalTensor dg, du, dmixture;
  int64_t row, d;
};

// Zeros wherever no row will write.
Hidden room_for_hidden(const Mlp& mlp);

// s * h of these rows.
void activate_rows(const Mlp& mlp, const HiddenRows& rows);

// s * h of all rows into `to`, each row up to its extent.
void activate_into(const Tensor& to, const Mlp& mlp, const Hidden& hidden);

// The gradients of u and g, and s * h; rows in the order of the extents, each written up to its own.
struct HiddenGradient {
  Tensor du, scaled;
  OptionalTensor dg;
};

// A step's rows, from the gradient of s * h in gradient.scaled.
void differentiate_step(const Mlp& mlp, const HiddenGradient& gradient, const Hidden& hidden,
                        const Step& step, const OptionalTensor& dmixture);

// ---- gradients by the vendor's GEMM, column block by column block; zeros beyond the widest row ----

// That of b_down, and zeros for the mixture's; the others are empty, as all are that nobody wants.
Gradients begin_gradients(const Mlp& mlp, const Tensor& dy, const Wanted& wanted);
// Of w_up from du, of w_gate from dg.
Tensor up_weight_gradient(const Mlp& mlp, const Tensor& dhidden, const Tensor& x);
Tensor down_weight_gradient(const Mlp& mlp, const Tensor& scaled, const Tensor& dy);
// Of b_gate and b_up, in the dtype of x.
void hidden_bias_gradients(const Mlp& mlp, const HiddenGradient& gradient, const Wanted& wanted,
                           Gradients& d);

}  // namespace flextron::mlp
