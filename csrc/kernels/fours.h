// Dot products of four integers of 8 bits, as instruction sets have them, each with an emulated body beside
// it. Included by what is compiled for one; vector.h says why all is anonymous.
//
// A word of four bytes of a lane holds four inputs of a feature. A FoursOf<W> adds up the products of a
// group's eight words of weights and a row's inputs; every body makes the same integer.
#pragma once

#include "kernels/elastic_gemm_block.h"

namespace flextron {
namespace {

struct int4 {
  uint8_t bits;  // two of them
};

constexpr i64 kWords = kGroupInputs / 4;  // of a group

// Word j of a row's inputs, in every lane.
inline Words inputs_in_lanes(const QuantisedInputs& a, int j) {
  uint32_t inputs;
  __builtin_memcpy(&inputs, a.q + 4 * j, sizeof(inputs));
  return Words{} + inputs;
}

#if defined(__AVX512VNNI__) || defined(FLEXTRON_VNNI)
// One instruction: sum += the products of four unsigned and four signed bytes (VPDPBUSD).
inline Integers dot_of_fours(Integers sum, Words u, Words s) {
#ifdef __AVX512VNNI__
  return (Integers)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)u, (__m512i)s);
#else
  for (int part = 0; part < 4; ++part)
    sum += (Integers)(u << (24 - 8 * part) >> 24) * ((Integers)(s << (24 - 8 * part)) >> 24);
  return sum;
#endif
}

template <class W>
struct FoursOf {
  // The unsigned byte that stands for 0: weights() adds 128 to int8.
  static constexpr int32_t kZero = std::is_same_v<W, int8> ? 128 : 8;
  static Words weights(Words w) { return std::is_same_v<W, int8> ? w ^ 0x80808080u : w; }

  Integers sum;
  explicit FoursOf(const QuantisedInputs& a) : sum(Integers{} + a.start) {}
  template <int j>
  void add(Words w, const QuantisedInputs& a) {
    sum = dot_of_fours(sum, w, inputs_in_lanes(a, j));
  }
  Integers total() const { return sum; }
};

#elif defined(__ARM_FEATURE_DOTPROD)

// One instruction (SDOT), which takes a word of inputs from any lane of a register.
template <class W>
struct FoursOf {
  static constexpr int32_t kZero = std::is_same_v<W, int8> ? 0 : 8;
  static Words weights(Words w) { return w; }

  int8x16_t inputs[2];
  int32x4_t sum;
  explicit FoursOf(const QuantisedInputs& a)
      : inputs{vld1q_s8(a.q), vld1q_s8(a.q + 16)}, sum(vdupq_n_s32(kZero == 0 ? 0 : a.start)) {}
  template <int j>
  void add(Words w, const QuantisedInputs&) {
    sum = vdotq_laneq_s32(sum, (int8x16_t)w, inputs[j / 4], j % 4);
  }
  Integers total() const { return (Integers)sum; }
};

#else

// Pairs of products in halves of 16 bits, which hold those of a word of int8, |w| and |a| up to 127, and
// those of a whole group of int4.
typedef int16_t Halves __attribute__((vector_size(sizeof(Words)), may_alias));
inline Integers sum_of_halves(Halves h) {
  const Integers w = (Integers)h;
  return ((Integers)((Words)w << 16) >> 16) + (w >> 16);
}
inline Halves even_bytes(Words w) { return (Halves)((Halves)w << 8) >> 8; }
inline Halves odd_bytes(Words w) { return (Halves)w >> 8; }

template <class W>
struct FoursOf {
  static constexpr int32_t kZero = std::is_same_v<W, int8> ? 0 : 8;
  static Words weights(Words w) { return w; }

  Integers sum{};
  Halves halves{};
  explicit FoursOf(const QuantisedInputs& of_row) {
    if constexpr (kZero != 0) sum += of_row.start;
  }
  template <int j>
  void add(Words w, const QuantisedInputs& of_row) {
    const Words a = inputs_in_lanes(of_row, j);
    if constexpr (std::is_same_v<W, int4>) {
#if defined(__AVX512BW__) && FLEXTRON_VECTOR_BYTES == 64
      halves += (Halves)_mm512_maddubs_epi16((__m512i)w, (__m512i)a);
#elif defined(__AVX2__) && !defined(FLEXTRON_VECTOR_BYTES)
      halves += (Halves)_mm256_maddubs_epi16((__m256i)w, (__m256i)a);
#else
      halves += even_bytes(w) * even_bytes(a) + odd_bytes(w) * odd_bytes(a);
#endif
    } else {
      sum += sum_of_halves(even_bytes(w) * even_bytes(a) + odd_bytes(w) * odd_bytes(a));
    }
  }
  Integers total() const { return std::is_same_v<W, int4> ? sum + sum_of_halves(halves) : sum; }
};

#endif

// Scales as they are stored, as floats.
inline Vec<float> scales_at(const fp16* x) {
#if defined(__AVX512F__) && FLEXTRON_VECTOR_BYTES == 64
  return (Vec<float>)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
#else
  return widened(x);
#endif
}

}  // namespace
}  // namespace flextron
