// route: router logits -> choice per token, and the tokens in stable descending order of choice, bucketed.
//
//   choice[t] = argmax_c logits[t, c] + noise(seed, t, c)      first of equals, NaN counts as -inf
//   order = tokens sorted by choice, descending, stable        offsets[i] = first place of bucket i, of
//   choice C-1-i
//
//   T tokens, C choices
#pragma once

#include <cmath>
#include <cstdint>

#include "core/macros.h"
#include "core/types.h"

struct CUstream_st;  // cudaStream_t, without the CUDA headers

namespace flextron {

template <class scalar_t>
struct RouteParams {
  const scalar_t* logits;  // [T, C], contiguous
  int64_t* choice;         // [T]
  int64_t* order;          // [T]
  int64_t* offsets;        // [C + 1]
  int64_t* counts;         // [blocks, C] workspace of the CUDA path, blocks = route_blocks(T)
  int64_t T, C;
  uint64_t seed;
  bool noisy;
};

// Tokens per thread block of the CUDA path, and the blocks they make.
constexpr int64_t kRouteTokens = 256;
FLEXTRON_HD int64_t route_blocks(int64_t T) { return (T + kRouteTokens - 1) / kRouteTokens; }

// First word of Philox4x32-10 (Salmon et al., SC 2011) at counter (t low, t high, c, 0), keyed by the seed. A
// counter, not a state: every device and every order of evaluation draws the same numbers.
FLEXTRON_HD uint32_t philox(uint64_t seed, int64_t t, int64_t c) {
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  uint32_t x0 = static_cast<uint32_t>(t), x1 = static_cast<uint32_t>(static_cast<uint64_t>(t) >> 32);
  uint32_t x2 = static_cast<uint32_t>(c), x3 = 0;
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53} * x0, b = uint64_t{0xCD9E8D57} * x2;
    x0 = static_cast<uint32_t>(b >> 32) ^ x1 ^ key0;
    x1 = static_cast<uint32_t>(b);
    x2 = static_cast<uint32_t>(a >> 32) ^ x3 ^ key1;
    x3 = static_cast<uint32_t>(a);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return x0;
}

// Standard Gumbel noise from 23 random bits, moved by half a step: strictly inside (0, 1) and exact in
// float32.
FLEXTRON_HD float gumbel(uint64_t seed, int64_t t, int64_t c) {
  const float u = (static_cast<float>(philox(seed, t, c) >> 9) + 0.5f) * 0x1p-23f;
  return -logf(-logf(u));
}

template <class scalar_t>
FLEXTRON_HD int64_t route_choice(const RouteParams<scalar_t>& p, int64_t t) {
  int64_t best = 0;
  scalar_t highest = -INFINITY;
  for (int64_t c = 0; c < p.C; ++c) {
    scalar_t score = p.logits[t * p.C + c];
    if (p.noisy) score += scalar_t(gumbel(p.seed, t, c));
    if (score > highest) {  // false for NaN and for equals
      highest = score;
      best = c;
    }
  }
  return best;
}

// Tokens [begin, end): their choices. Any order, any thread.
template <class scalar_t>
void route_choices_cpu(const RouteParams<scalar_t>& p, int64_t begin, int64_t end);
// Offsets and order from the choices: a counting sort.
template <class scalar_t>
void route_order_cpu(const RouteParams<scalar_t>& p);
template <class scalar_t>
void route_cuda(const RouteParams<scalar_t>& p, CUstream_st* stream);

}  // namespace flextron
