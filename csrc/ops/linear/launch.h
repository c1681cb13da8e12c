// Which CUDA kernel of elastic_linear runs: Hopper's own where its TMA can take the addresses and strides,
// the portable one elsewhere.
#pragma once

#include "core/executor.h"
#include "kernels/arch.h"
#include "kernels/elastic_linear.h"
#include "kernels/tuning.h"
#include "ops/asked_kernel.h"

namespace flextron {

// Features are counted in 32 bits.
inline void check_features(const char* op, const char* name, int64_t features) {
  check_range(op, name, features, 0, int64_t{1} << 30);
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

// `executor` is kTile or kStream.
template <class scalar_t>
void launch_elastic_linear(const ElasticLinearParams<scalar_t>& p, Executor executor, CUstream_st* stream,
                           [[maybe_unused]] AfterHidden after = {}) {
  if constexpr (sizeof(scalar_t) == 2) {
    const bool streams = executor == Executor::kStream;
#ifdef FLEXTRON_WITH_SM90
    if (streams && elastic_linear_decode_fits_sm90(p) &&
        takes_hopper_decode(p.T, p.in_blocks * p.in_features * p.out_blocks * p.out_features))
      return elastic_linear_decode_sm90(p, stream, after.x_is_clean, after.dependent);
#endif
    if (streams) return elastic_linear_decode_cuda(p, stream);
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

}  // namespace flextron
