// Vectors of one instruction set's width, conversions and exp for the CPU kernels' loops. Included once by
// each file that is compiled for one instruction set. All of it is in an anonymous namespace and calls no
// inline function of another header: what is compiled for AVX2 here cannot be picked by the linker for the
// path that must run without it. FLEXTRON_VECTOR_BYTES, set by the build for <op>_avx512.cpp, is the width
// where it is not the compiler's own.
#pragma once

#include <cstdint>

#include "core/types.h"

#ifdef __AVX2__
#include <immintrin.h>
#endif
#ifdef __aarch64__
#include <arm_neon.h>
#endif

namespace flextron {
namespace {

using i64 = int64_t;

constexpr i64 kLine = 64;  // bytes
#if defined(FLEXTRON_VECTOR_BYTES)
constexpr i64 kVectorBytes = FLEXTRON_VECTOR_BYTES;
#elif defined(__AVX2__)
constexpr i64 kVectorBytes = 32;
#else
constexpr i64 kVectorBytes = 16;
#endif

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kVectorBytes), may_alias));
};
template <class T>
using Vec = typename VectorOf<T>::type;
template <class T>
constexpr i64 kLanes = kVectorBytes / i64(sizeof(T));

template <class T>
constexpr T smaller(T a, T b) {
  return b < a ? b : a;
}
template <class T>
constexpr T larger(T a, T b) {
  return a < b ? b : a;
}

template <class A>
inline Vec<A> load(const A* x) {
  return *reinterpret_cast<const Vec<A>*>(x);
}
template <class A>
inline void store(A* x, Vec<A> v) {
  *reinterpret_cast<Vec<A>*>(x) = v;
}

// Length of a row of n elements in scratch: whole lines, and an odd number of them, so that a column of a
// power of two does not fall into one set of the cache.
template <class A>
inline i64 padded(i64 n) {
  const i64 line = kLine / i64(sizeof(A));
  return ((n + line - 1) / line | 1) * line;
}

// The part of a padded row that holds n elements, in whole vectors: what the loops touch.
template <class A>
inline i64 in_vectors(i64 n) {
  return (n + kLanes<A> - 1) / kLanes<A> * kLanes<A>;
}

// -- conversions: written out again, for those of core are inline functions that every file shares --

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(bf16 x) { return __builtin_bit_cast(float, uint32_t(x.bits) << 16); }
inline float widen(fp16 x) {
  const uint32_t w = uint32_t(x.bits) << 16, sign = w & 0x80000000u, twice = w + w;
  const float normal = __builtin_bit_cast(float, (twice >> 4) + (0xE0u << 23)) * 0x1.0p-112f;
  const float subnormal = __builtin_bit_cast(float, (twice >> 17) | (126u << 23)) - 0.5f;
  const uint32_t magnitude = __builtin_bit_cast(uint32_t, twice < (1u << 27) ? subnormal : normal);
  return __builtin_bit_cast(float, sign | magnitude);
}

inline void narrow(float x, float* y) { *y = x; }
inline void narrow(double x, double* y) { *y = x; }
inline void narrow(float x, bf16* y) {  // to nearest even
  const uint32_t w = __builtin_bit_cast(uint32_t, x);
  y->bits = x != x ? 0x7FC0 : uint16_t((w + 0x7FFFu + ((w >> 16) & 1u)) >> 16);
}
inline void narrow(float x, fp16* y) {  // to nearest even, by the rounding of a float sum
  const uint32_t w = __builtin_bit_cast(uint32_t, x), twice = w + w, sign = w & 0x80000000u;
  const float magnitude = __builtin_bit_cast(float, w & 0x7FFFFFFFu);
  const uint32_t bias = larger(twice & 0xFF000000u, 0x71000000u);
  const float sum =
      __builtin_bit_cast(float, (bias >> 1) + 0x07800000u) + magnitude * 0x1.0p+112f * 0x1.0p-110f;
  const uint32_t bits = __builtin_bit_cast(uint32_t, sum);
  const uint32_t rest = ((bits >> 13) & 0x7C00u) + (bits & 0x0FFFu);
  y->bits = uint16_t((sign >> 16) | (twice > 0xFF000000u ? 0x7E00u : rest));
}

// The first n of `width` elements; a row of all of them has a loop that the compiler knows.
template <i64 width, class A, class scalar_t>
inline void narrow_some(const A* from, scalar_t* to, i64 n) {
  if (n == width) {
    for (i64 i = 0; i < width; ++i) narrow(from[i], to + i);
  } else {
    for (i64 i = 0; i < n; ++i) narrow(from[i], to + i);
  }
}

template <class A, class scalar_t>
inline void widen_row(A* __restrict to, const scalar_t* __restrict from, i64 n, i64 n_padded) {
  for (i64 i = 0; i < n; ++i) to[i] = widen(from[i]);
  for (i64 i = n; i < n_padded; ++i) to[i] = A(0);
}

// -- vectors at any address, as long as a vector of floats --

template <class T>
struct Loose {
  typedef T type __attribute__((vector_size(kLanes<float> * sizeof(T)), aligned(alignof(T)), may_alias));
};
template <class T>
inline typename Loose<T>::type load_loose(const void* x) {
  return *static_cast<const typename Loose<T>::type*>(x);
}

using Words = Loose<uint32_t>::type;

// Integers of fewer bits in the low bits of a vector: one instruction, which compilers do not find by
// themselves.
inline Words extended(const uint16_t* x) {
#if defined(__AVX512F__) && FLEXTRON_VECTOR_BYTES == 64
  return (Words)_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
#elif defined(__AVX2__) && !defined(FLEXTRON_VECTOR_BYTES)
  return (Words)_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
#else
  return __builtin_convertvector(load_loose<uint16_t>(x), Words);
#endif
}

inline Vec<float> widened(const float* x) { return load_loose<float>(x); }
inline Vec<double> widened(const double* x) {
  typedef double Any __attribute__((vector_size(kVectorBytes), aligned(alignof(double)), may_alias));
  return *reinterpret_cast<const Any*>(x);
}
inline Vec<float> widened(const bf16* x) { return (Vec<float>)(extended(&x->bits) << 16); }
#if defined(__aarch64__) && !defined(FLEXTRON_VECTOR_BYTES)
inline Vec<float> from_high_half(Words w) {  // a fp16 in the upper half of each word
  return (Vec<float>)vcvt_f32_f16(vreinterpret_f16_u16(vshrn_n_u32((uint32x4_t)w, 16)));
}
#else
inline Vec<float> from_high_half(Words w) {  // the same, as widen() in lanes
  const Words sign = w & 0x80000000u, twice = w + w;
  const Vec<float> normal = (Vec<float>)((twice >> 4) + (0xE0u << 23)) * 0x1.0p-112f;
  const Vec<float> subnormal = (Vec<float>)((twice >> 17) | (126u << 23)) - 0.5f;
  const Words magnitude = twice < (1u << 27) ? (Words)subnormal : (Words)normal;
  return (Vec<float>)(sign | magnitude);
}
#endif
inline Vec<float> widened(const fp16* x) { return from_high_half(extended(&x->bits) << 16); }

#if FLEXTRON_VECTOR_BYTES == 64
// 16 rows of 16 words, turned over: within 16 bytes first, which costs least (19 instead of 28 ns on an AMD
// EPYC, Zen 4, where each word may come from any place).
inline void transpose_words(Words (&r)[16]) {
  typedef int32_t Pick __attribute__((vector_size(64)));
  constexpr Pick kLow = {0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29};
  constexpr Pick kHigh = {2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31};
  constexpr Pick kLowTwo = {0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29};
  constexpr Pick kHighTwo = {2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31};
  constexpr Pick kEven = {0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27};
  constexpr Pick kOdd = {4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31};
  Words s[16];
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    const Words a = __builtin_shuffle(r[i], r[i + 1], kLow), b = __builtin_shuffle(r[i], r[i + 1], kHigh);
    const Words c = __builtin_shuffle(r[i + 2], r[i + 3], kLow),
                d = __builtin_shuffle(r[i + 2], r[i + 3], kHigh);
    s[i] = __builtin_shuffle(a, c, kLowTwo);
    s[i + 1] = __builtin_shuffle(a, c, kHighTwo);
    s[i + 2] = __builtin_shuffle(b, d, kLowTwo);
    s[i + 3] = __builtin_shuffle(b, d, kHighTwo);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const Words a = __builtin_shuffle(s[j], s[4 + j], kEven), b = __builtin_shuffle(s[j], s[4 + j], kOdd);
    const Words c = __builtin_shuffle(s[8 + j], s[12 + j], kEven),
                d = __builtin_shuffle(s[8 + j], s[12 + j], kOdd);
    r[j] = __builtin_shuffle(a, c, kEven);
    r[4 + j] = __builtin_shuffle(b, d, kEven);
    r[8 + j] = __builtin_shuffle(a, c, kOdd);
    r[12 + j] = __builtin_shuffle(b, d, kOdd);
  }
}
#endif

// -- exp: 2^n times a polynomial (Cephes), 1 ulp; 0 below the smallest normal number; NaN stays NaN --

inline Vec<float> vec_exp(Vec<float> x) {
  typedef int32_t IntVec __attribute__((vector_size(kVectorBytes), may_alias));
  const Vec<float> zero = {}, low = zero - 87.3f, high = zero + 88.3f, input = x;
  x = x < low ? low : x;
  x = x > high ? high : x;
  const Vec<float> shift = zero + 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const Vec<float> shifted = x * 1.44269504088896341f + shift;
  const Vec<float> n = shifted - shift;
  const Vec<float> r = x - n * 0.693359375f - n * -2.12194440e-4f;
  Vec<float> y = r * 1.9875691500e-4f + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * (r * r) + r + 1.0f;
  const IntVec power = ((IntVec)shifted - (IntVec)shift + 127) << 23;
  y = y * (Vec<float>)power;
  return input < low ? zero : y;
}
inline Vec<double> vec_exp(Vec<double> x) {
  for (i64 i = 0; i < kLanes<double>; ++i) x[i] = __builtin_exp(x[i]);
  return x;
}

// tanh: an odd polynomial near 0 (Cephes), else by exp; 2 ulp. NaN stays NaN.
inline Vec<float> vec_tanh(Vec<float> x) {
  const Vec<float> zero = {}, size = x < zero ? -x : x, square = x * x;
  Vec<float> y = square * -5.70498872745e-3f + 2.06390887954e-2f;
  y = y * square - 5.37397155531e-2f;
  y = y * square + 1.33314422036e-1f;
  y = y * square - 3.33332819422e-1f;
  y = y * square * x + x;
  const Vec<float> far = 1.0f - 2.0f / (vec_exp(size + size) + 1.0f);
  return size < zero + 0.625f ? y : x < zero ? -far : far;
}
inline Vec<double> vec_tanh(Vec<double> x) {
  for (i64 i = 0; i < kLanes<double>; ++i) x[i] = __builtin_tanh(x[i]);
  return x;
}

inline float log_of(float x) { return __builtin_logf(x); }
inline double log_of(double x) { return __builtin_log(x); }

}  // namespace
}  // namespace flextron
