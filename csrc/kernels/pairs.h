// bfloat16 numbers in pairs, as matrix units and dot products take them: the dot product of a pair, with an
// emulated body beside the instruction's, so that every machine runs the same kernels; and conversions.
// Included by what is compiled for such a machine; vector.h says why all is anonymous.
//
// Tiles of activations have 16 rows of 64 bytes, 32 inputs of a row; tiles of weights 16 pairs of inputs of a
// panel's features, [16][16][2].
#pragma once

#include "kernels/vector.h"

namespace flextron {
namespace {

constexpr i64 kTileRows = 16;
constexpr i64 kTileRowBytes = 64;
constexpr i64 kTileElements = kTileRows * kTileRowBytes / i64(sizeof(bf16));
constexpr i64 kTileInputs = kTileRowBytes / i64(sizeof(bf16));  // of a product of tiles

// sum + a b of pairs of bfloat16 numbers, a word of each lane: the upper halves' product is added first, then
// the lower halves', each in one rounding to nearest even. Numbers below the smallest normal one are 0, as
// inputs and as results.
#ifdef __AVX512BF16__
inline Vec<float> dot_of_pairs(Vec<float> sum, Words a, Words b) {
  return (Vec<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}
#else
inline Vec<float> without_subnormals(Vec<float> x) {
  const Words w = (Words)x;
  return (Vec<float>)((w & 0x7F800000u) == 0 ? w & 0x80000000u : w);
}
inline Vec<float> dot_of_pairs(Vec<float> sum, Words a, Words b) {
  sum = without_subnormals(sum);
  const auto add = [&](Words x, Words y) {
    const Vec<float> p = without_subnormals((Vec<float>)x), q = without_subnormals((Vec<float>)y);
    for (i64 i = 0; i < kLanes<float>; ++i) sum[i] = __builtin_fmaf(p[i], q[i], sum[i]);
    sum = without_subnormals(sum);
  };
  add(a & 0xFFFF0000u, b & 0xFFFF0000u);
  add(a << 16, b << 16);
  return sum;
}
#endif

// -- floats and bfloat16 numbers --

// Floats rounded to bfloat16, in the upper halves of words.
inline Words upper_bf16(Vec<float> x) {
  const Words w = (Words)x;
  const Words rounded = (w + 0x7FFFu + ((w >> 16) & 1u)) & 0xFFFF0000u;
  return x != x ? Words{} + 0x7FC00000u : rounded;
}
// A word of each lane: `low` in its lower half, `high` in its upper.
inline Words pairs_of(Vec<float> low, Vec<float> high) {
#ifdef __AVX512BF16__
  typedef uint16_t Halves __attribute__((vector_size(64)));
  constexpr Halves kInTurn = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                              8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512bh both = _mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
  return (Words)_mm512_permutexvar_epi16((__m512i)kInTurn, (__m512i)both);
#else
  return upper_bf16(low) >> 16 | upper_bf16(high);
#endif
}

inline void store_words(void* to, Words w) { *static_cast<Loose<uint32_t>::type*>(to) = w; }

// 32 floats as bfloat16 numbers.
inline void narrow_tile_row(const float* from, bf16* to) {
#ifdef __AVX512BF16__
  const __m512bh row = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(from + 16), _mm512_loadu_ps(from));
  _mm512_storeu_si512(to, (__m512i)row);
#else
  for (i64 i = 0; i < kTileInputs; ++i) narrow(from[i], to + i);
#endif
}

// 16 floats as bfloat16 numbers.
inline void store_bf16(bf16* to, Vec<float> v) {
#ifdef __AVX512BF16__
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh((__m512)v));
#else
  for (i64 i = 0; i < kLanes<float>; ++i) narrow(v[i], to + i);
#endif
}

}  // namespace
}  // namespace flextron
