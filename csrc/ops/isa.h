// Which instruction set the CPU kernels use: the best this machine has, or what FLEXTRON_ISA (generic, avx2)
// names.
#pragma once

#include <cstdlib>
#include <string>

#include "ops/checks.h"

namespace flextron {

enum class Isa { kGeneric, kAvx2 };

inline bool has_avx2() {
#ifdef __x86_64__
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
  return false;
#endif
}

// The environment is read once.
inline Isa isa() {
  static const Isa chosen = [] {
    const char* name = std::getenv("FLEXTRON_ISA");
    const std::string wanted = name ? name : "";
    if (wanted == "generic") return Isa::kGeneric;
    if (wanted == "avx2" && !has_avx2()) fail("FLEXTRON_ISA: value must be one this machine has, got avx2");
    if (wanted != "avx2" && wanted != "") fail("FLEXTRON_ISA: value must be generic or avx2, got ", wanted);
    return has_avx2() ? Isa::kAvx2 : Isa::kGeneric;
  }();
  return chosen;
}

// The launcher `name`_<isa> with the template arguments that follow.
#ifdef __x86_64__
#define FLEXTRON_FOR_ISA(name, ...) \
  (isa() == Isa::kAvx2 ? &name##_avx2<__VA_ARGS__> : &name##_cpu<__VA_ARGS__>)
#else
#define FLEXTRON_FOR_ISA(name, ...) (&name##_cpu<__VA_ARGS__>)
#endif

}  // namespace flextron
