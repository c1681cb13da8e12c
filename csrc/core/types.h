// The 16-bit floating types as plain structs of bits, and the type each dtype accumulates in.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "core/macros.h"

namespace flextron {

template <class To, class From>
FLEXTRON_HD To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

// The upper half of a float, rounded to nearest even.
struct bf16 {
  uint16_t bits;
  bf16() = default;
  FLEXTRON_HD explicit bf16(float value) {
    const uint32_t raw = bits_as<uint32_t>(value);
    const uint32_t rounded = (raw + 0x7fffu + ((raw >> 16) & 1u)) >> 16;
    bits = static_cast<uint16_t>(value != value ? 0x7fc0u : rounded);
  }
  FLEXTRON_HD explicit operator float() const { return bits_as<float>(static_cast<uint32_t>(bits) << 16); }
};

// IEEE half precision. The conversions let the float unit do the normalising: no branches, so they vectorise.
struct fp16 {
  uint16_t bits;
  fp16() = default;
  FLEXTRON_HD explicit fp16(float value) {
    const uint32_t raw = bits_as<uint32_t>(value);
    const uint32_t sign = (raw >> 16) & 0x8000u;
    const uint32_t magnitude = raw & 0x7fffffffu;
    // A half's subnormals are what is left of |value| after adding 0.5: its last bit then weighs 2^-24.
    const uint32_t subnormal = bits_as<uint32_t>(bits_as<float>(magnitude) + 0.5f) - 0x3f000000u;
    const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
    const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
    bits = static_cast<uint16_t>(sign | (magnitude >= 0x477ff000u ? special : finite));
  }
  FLEXTRON_HD explicit operator float() const {
    const uint32_t sign = (bits & 0x8000u) << 16;
    const uint32_t magnitude = static_cast<uint32_t>(bits & 0x7fffu) << 13;
    const float scaled =
        bits_as<float>(magnitude) * 0x1p112f;  // moves the exponent's bias, subnormals included
    const uint32_t special = bits_as<uint32_t>(scaled) | (magnitude >= 0x0f800000u ? 0x7f800000u : 0u);
    return bits_as<float>(sign | special);
  }
};

// float for everything but double, which keeps itself.
template <class scalar_t>
using accumulate_t = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

}  // namespace flextron
