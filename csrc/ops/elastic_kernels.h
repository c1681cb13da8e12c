// Which CUDA kernels compute elastic_linear and elastic_mlp.
#pragma once

#include <string>

#include "kernels/arch.h"
#include "kernels/elastic_linear.h"
#include "kernels/elastic_mlp.h"
#include "kernels/tuning.h"
#include "ops/asked_kernel.h"
#include "ops/device.h"

namespace flextron {

// Features are counted in 32 bits.
inline void check_features(const char* op, const char* name, int64_t features) {
  check_range(op, name, features, 0, int64_t{1} << 30);
}

// What computes the GEMMs of x. On a GPU it is tuning.h's choice, or FLEXTRON_KERNEL's: tile, decode for few
// enough tokens (on Hopper its own), or vendor wherever the host knows the extents.
inline Gemm gemm_of(const Tensor& x, bool extents_on_device) {
  if (!runs_on_gpu(x)) return Gemm::kVendor;
  const std::string asked = asked_kernel();
  if (asked == "tile") return Gemm::kTile;
  if (asked == "vendor" && !extents_on_device) return Gemm::kVendor;
  if (asked == "decode" && x.element_size() == 2 && x.size(0) <= kDecodeTokens) return Gemm::kDecode;
  return preferred_gemm(x.size(0), x.element_size(), extents_on_device);
}

// Whether Hopper's own decode kernel streams so many weights past T tokens, where it can.
[[maybe_unused]] inline bool takes_hopper_decode(int64_t T, int64_t weights) {
  return cuda_arch() >= 90 && (asked_kernel() == "decode" || prefers_hopper_decode(T, weights));
}

// What elastic_mlp's hidden layer leaves to the linear layer behind it.
struct AfterHidden {
  bool dependent = false;   // may start before it has ended
  bool x_is_clean = false;  // all of h is written: zeros behind every token's extent
};

// `gemm` is not the vendor's.
template <class scalar_t>
void launch_elastic_linear(const ElasticLinearParams<scalar_t>& p, Gemm gemm, CUstream_st* stream,
                           [[maybe_unused]] AfterHidden after = {}) {
  if constexpr (sizeof(scalar_t) == 2) {
#ifdef FLEXTRON_WITH_SM90
    if (gemm == Gemm::kDecode && elastic_linear_decode_fits_sm90(p) &&
        takes_hopper_decode(p.T, p.in_blocks * p.in_features * p.out_blocks * p.out_features))
      return elastic_linear_decode_sm90(p, stream, after.x_is_clean, after.dependent);
#endif
    if (gemm == Gemm::kDecode) return elastic_linear_decode_cuda(p, stream);
#ifdef FLEXTRON_WITH_SM90
    if (cuda_arch() >= 90 && elastic_linear_fits_sm90(p))
      return elastic_linear_sm90(p, stream, after.dependent);
#endif
  }
  elastic_linear_cuda(p, stream);
}

template <class scalar_t>
void launch_elastic_linear_backward_input(const ElasticLinearBackwardParams<scalar_t>& p,
                                          CUstream_st* stream) {
#ifdef FLEXTRON_WITH_SM90
  if constexpr (sizeof(scalar_t) == 2)
    if (cuda_arch() >= 90 && elastic_linear_backward_input_fits_sm90(p))
      return elastic_linear_backward_input_sm90(p, stream);
#endif
  elastic_linear_backward_input_cuda(p, stream);
}

template <class scalar_t>
void launch_elastic_linear_backward_weight(const ElasticLinearBackwardParams<scalar_t>& p,
                                           CUstream_st* stream) {
#ifdef FLEXTRON_WITH_SM90
  if constexpr (sizeof(scalar_t) == 2)
    if (cuda_arch() >= 90 && elastic_linear_backward_weight_fits_sm90(p))
      return elastic_linear_backward_weight_sm90(p, stream);
#endif
  elastic_linear_backward_weight_cuda(p, stream);
}

template <class scalar_t>
AfterHidden launch_elastic_mlp_hidden(const ElasticMlpHiddenParams<scalar_t>& p, Gemm gemm,
                                      CUstream_st* stream) {
  if (gemm == Gemm::kDecode) {
#ifdef FLEXTRON_WITH_SM90
    if (elastic_mlp_decode_fits_sm90(p) && takes_hopper_decode(p.T, (p.w_gate ? 2 : 1) * p.width * p.K)) {
      elastic_mlp_decode_sm90(p, stream);
      return {.dependent = true, .x_is_clean = true};
    }
#endif
    elastic_mlp_decode_cuda(p, stream);
    return {.x_is_clean = true};
  }
#ifdef FLEXTRON_WITH_SM90
  if (cuda_arch() >= 90 && elastic_mlp_hidden_fits_sm90(p)) {
    elastic_mlp_hidden_sm90(p, stream);
    return {.dependent = true};
  }
#endif
  elastic_mlp_hidden_cuda(p, stream);
  return {};
}

}  // namespace flextron
