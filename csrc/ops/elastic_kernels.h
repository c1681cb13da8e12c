// Which CUDA kernels compute elastic_linear and elastic_mlp.
#pragma once

#include <cstdlib>
#include <string>

#include "kernels/arch.h"
#include "kernels/elastic_linear.h"
#include "kernels/elastic_mlp.h"
#include "ops/checks.h"

namespace flextron {

// Features are counted in 32 bits.
inline void check_features(const char* op, const char* name, int64_t features) {
  check_range(op, name, features, 0, int64_t{1} << 30);
}

// Few 16-bit tokens take the kernels that stream the weights past them, in which tokens need no order.
// FLEXTRON_KERNEL: tile takes the others at any number of tokens, decode those wherever they can be.
inline bool runs_decode(const Tensor& x) {
  const char* const variable = std::getenv("FLEXTRON_KERNEL");
  const std::string asked = variable == nullptr ? "" : variable;
  if (asked != "" && asked != "decode" && asked != "tile")
    fail("FLEXTRON_KERNEL must be decode or tile, got ", asked);
  return x.element_size() == 2 && x.size(0) <= kDecodeTokens && asked != "tile";
}

// `decode` is runs_decode(x). `dependent` is elastic_linear_sm90's.
template <class scalar_t>
void launch_elastic_linear(const ElasticLinearParams<scalar_t>& p, bool decode, CUstream_st* stream,
                           [[maybe_unused]] bool dependent = false) {
  if constexpr (sizeof(scalar_t) == 2) {
    if (decode) return elastic_linear_decode_cuda(p, stream);
#ifdef FLEXTRON_WITH_SM90
    if (cuda_arch() >= 90 && elastic_linear_fits_sm90(p)) return elastic_linear_sm90(p, stream, dependent);
#endif
  }
  elastic_linear_cuda(p, stream);
}

// Whether what follows in the stream may be a dependent launch.
template <class scalar_t>
bool launch_elastic_mlp_hidden(const ElasticMlpHiddenParams<scalar_t>& p, bool decode, CUstream_st* stream) {
  if (decode) {
    elastic_mlp_decode_cuda(p, stream);
    return false;
  }
#ifdef FLEXTRON_WITH_SM90
  if (cuda_arch() >= 90 && elastic_mlp_hidden_fits_sm90(p)) {
    elastic_mlp_hidden_sm90(p, stream);
    return true;
  }
#endif
  elastic_mlp_hidden_cuda(p, stream);
  return false;
}

}  // namespace flextron
