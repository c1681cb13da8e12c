// Which instruction set the CPU kernels use: the best this machine has, or what FLEXTRON_ISA (generic, avx2,
// avx512, avx512_vnni, avx512_bf16, amx, arm_dot, arm_bf16) names. On ARM what is generic is NEON.
#pragma once

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <iterator>
#include <string>

#include "ops/checks.h"

namespace flextron {

// Each has all of those before, of its processors.
enum class Isa { kGeneric, kAvx2, kAvx512, kAvx512Vnni, kAvx512Bf16, kAmx, kArmDot, kArmBf16 };

constexpr const char* kIsaNames[] = {"generic",     "avx2", "avx512",  "avx512_vnni",
                                     "avx512_bf16", "amx",  "arm_dot", "arm_bf16"};
inline const char* name_of(Isa isa) { return kIsaNames[static_cast<int>(isa)]; }

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

inline bool has_avx512_vnni() {
#ifdef __x86_64__
  return has_avx512() && __builtin_cpu_supports("avx512vnni");
#else
  return false;
#endif
}

inline bool has_avx512_bf16() {
#ifdef __x86_64__
  return has_avx512_vnni() && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

// Whether there is a matrix unit for bfloat16 and int8 (Intel AMX), and the system lets this process use it.
inline bool has_amx() {
#if defined(__x86_64__) && defined(__linux__) && !defined(FLEXTRON_EMULATE_AMX)
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!has_avx512_bf16()) return false;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned kAll = 1u << 22 | 1u << 24 | 1u << 25;  // AMX-BF16, AMX-TILE, AMX-INT8
  constexpr long kAskForState = 0x1023, kTileData = 18;      // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return (d & kAll) == kAll && syscall(SYS_arch_prctl, kAskForState, kTileData) == 0;
#else
  return false;
#endif
}

// Whether there are ARM's dot products of bytes.
inline bool has_arm_dot() {
#if defined(__aarch64__) && defined(__linux__)
  constexpr unsigned long kDot = 1ul << 20;  // HWCAP_ASIMDDP
  return (getauxval(AT_HWCAP) & kDot) != 0;
#else
  return false;
#endif
}

// Whether there are those of bfloat16 pairs too.
inline bool has_arm_bf16() {
#if defined(__aarch64__) && defined(__linux__)
  constexpr unsigned long kBf16 = 1ul << 14;  // HWCAP2_BF16
  return has_arm_dot() && (getauxval(AT_HWCAP2) & kBf16) != 0;
#else
  return false;
#endif
}

// Whether the files of an instruction set can run: a build may have the loops for AVX-512 compiled for AVX2,
// and what is beyond emulated.
inline bool runs(Isa isa) {
#ifdef FLEXTRON_LOWER_AVX512
  return isa == Isa::kGeneric || (has_avx2() && isa < Isa::kArmDot);
#else
  switch (isa) {
    case Isa::kGeneric:
      return true;
    case Isa::kAvx2:
      return has_avx2();
    case Isa::kAvx512:
      return has_avx512();
    case Isa::kAvx512Vnni:
      return has_avx512_vnni();
    case Isa::kAvx512Bf16:
      return has_avx512_bf16();
    case Isa::kAmx:
      return has_amx();
    case Isa::kArmDot:
      return has_arm_dot();
    case Isa::kArmBf16:
      return has_arm_bf16();
  }
  return false;
#endif
}

// The environment is read once.
inline Isa isa() {
  static const Isa chosen = [] {
    const char* name = std::getenv("FLEXTRON_ISA");
    const std::string wanted = name ? name : "";
    if (wanted == "")
      return has_amx()           ? Isa::kAmx
             : has_avx512_bf16() ? Isa::kAvx512Bf16
             : has_avx512_vnni() ? Isa::kAvx512Vnni
             : has_avx512()      ? Isa::kAvx512
             : has_avx2()        ? Isa::kAvx2
             : has_arm_bf16()    ? Isa::kArmBf16
             : has_arm_dot()     ? Isa::kArmDot
                                 : Isa::kGeneric;
    const auto named = std::find(std::begin(kIsaNames), std::end(kIsaNames), wanted);
    if (named == std::end(kIsaNames))
      fail(
          "FLEXTRON_ISA: value must be generic, avx2, avx512, avx512_vnni, avx512_bf16, amx, arm_dot or "
          "arm_bf16, got ",
          wanted);
    const Isa asked = static_cast<Isa>(named - kIsaNames);
    if (!runs(asked)) fail("FLEXTRON_ISA: value must be one this machine has, got ", wanted);
    return asked;
  }();
  return chosen;
}

// The launcher `name`_<isa>: of a template with the arguments that follow, and of a function.
// FLEXTRON_FOR_PAIRS_ISA is of what those that multiply pairs have; nobody calls it where isa() is another.
// FLEXTRON_FOR_QUANTISED_ISA is of what multiplies integers.
#ifdef __x86_64__
#define FLEXTRON_FOR_ISA(name, ...)                    \
  (isa() >= Isa::kAvx512 ? &name##_avx512<__VA_ARGS__> \
   : isa() == Isa::kAvx2 ? &name##_avx2<__VA_ARGS__>   \
                         : &name##_cpu<__VA_ARGS__>)
#define FLEXTRON_FOR_PAIRS_ISA(name) (isa() == Isa::kAmx ? &name##_amx : &name##_avx512_bf16)
#define FLEXTRON_FOR_QUANTISED_ISA(name)             \
  (isa() == Isa::kAmx          ? &name##_amx         \
   : isa() >= Isa::kAvx512Vnni ? &name##_avx512_vnni \
                               : FLEXTRON_FOR_PLAIN_ISA(name))
#define FLEXTRON_FOR_PLAIN_ISA(name) \
  (isa() >= Isa::kAvx512 ? &name##_avx512 : isa() == Isa::kAvx2 ? &name##_avx2 : &name##_cpu)
#else
#define FLEXTRON_FOR_ISA(name, ...) (&name##_cpu<__VA_ARGS__>)
#ifdef __aarch64__
#define FLEXTRON_FOR_PAIRS_ISA(name) (&name##_arm_bf16)
#define FLEXTRON_FOR_QUANTISED_ISA(name) (isa() >= Isa::kArmDot ? &name##_arm_dot : &name##_cpu)
#else
#define FLEXTRON_FOR_PAIRS_ISA(name) (static_cast<decltype(&name##_amx)>(nullptr))
#define FLEXTRON_FOR_QUANTISED_ISA(name) (&name##_cpu)
#endif
#define FLEXTRON_FOR_PLAIN_ISA(name) (&name##_cpu)
#endif

}  // namespace flextron
