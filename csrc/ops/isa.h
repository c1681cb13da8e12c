// Which instruction set the CPU kernels use: the best this machine has, or what FLEXTRON_ISA (generic, avx2,
// avx512) names.
#pragma once

#include <cstdlib>
#include <string>

#include "ops/checks.h"

namespace flextron {

enum class Isa { kGeneric, kAvx2, kAvx512 };

inline bool has_avx2() {
#ifdef __x86_64__
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
  return false;
#endif
}

inline bool has_avx512() {
#ifdef __x86_64__
  return has_avx2() && __builtin_cpu_supports("f16c") && __builtin_cpu_supports("avx512f") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq");
#else
  return false;
#endif
}

// Whether the files for AVX-512 can run: a build may have their loops compiled for AVX2.
inline bool runs_avx512() {
#ifdef FLEXTRON_LOWER_AVX512
  return has_avx2();
#else
  return has_avx512();
#endif
}

// The environment is read once.
inline Isa isa() {
  static const Isa chosen = [] {
    const char* name = std::getenv("FLEXTRON_ISA");
    const std::string wanted = name ? name : "";
    if (wanted != "" && wanted != "generic" && wanted != "avx2" && wanted != "avx512")
      fail("FLEXTRON_ISA: value must be generic, avx2 or avx512, got ", wanted);
    if (wanted == "generic") return Isa::kGeneric;
    if ((wanted == "avx2" && !has_avx2()) || (wanted == "avx512" && !runs_avx512()))
      fail("FLEXTRON_ISA: value must be one this machine has, got ", wanted);
    if (wanted == "avx512" || (wanted == "" && has_avx512())) return Isa::kAvx512;
    return has_avx2() ? Isa::kAvx2 : Isa::kGeneric;
  }();
  return chosen;
}

// The launcher `name`_<isa>: of a template with the arguments that follow, and of a function.
#ifdef __x86_64__
#define FLEXTRON_FOR_ISA(name, ...)                    \
  (isa() == Isa::kAvx512 ? &name##_avx512<__VA_ARGS__> \
   : isa() == Isa::kAvx2 ? &name##_avx2<__VA_ARGS__>   \
                         : &name##_cpu<__VA_ARGS__>)
#define FLEXTRON_FOR_PLAIN_ISA(name) \
  (isa() == Isa::kAvx512 ? &name##_avx512 : isa() == Isa::kAvx2 ? &name##_avx2 : &name##_cpu)
#else
#define FLEXTRON_FOR_ISA(name, ...) (&name##_cpu<__VA_ARGS__>)
#define FLEXTRON_FOR_PLAIN_ISA(name) (&name##_cpu)
#endif

}  // namespace flextron
