// CUDA's C++ as our kernels use it, for a host compiler: stands in for the toolkit's header of this name when
// kernels are compiled for the emulator. No part of the toolkit is needed.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <source_location>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __constant__ const
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) alignas(bytes)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
struct uint3 {
  unsigned x, y, z;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

using std::max;
using std::min;

namespace flextron::emulator {

uint3 thread_index();
uint3 block_index();
dim3 block_size();
dim3 grid_size();

void sync_threads(const std::source_location& site);
void sync_warp(uint32_t mask, const std::source_location& site);
// The value of lane `source` of the lanes in mask, by up to 8 bytes; `source` is worked out from the lane.
enum class Shuffle { kIndex, kUp, kDown, kXor };
uint64_t shuffle(uint32_t mask, uint64_t bits, Shuffle kind, int argument, int width,
                 const std::source_location& site);
uint32_t ballot(uint32_t mask, bool predicate, const std::source_location& site);

template <class T>
T shuffled(uint32_t mask, T value, Shuffle kind, int argument, int width, const std::source_location& site) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = shuffle(mask, bits, kind, argument, width, site);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace flextron::emulator

#define threadIdx (::flextron::emulator::thread_index())
#define blockIdx (::flextron::emulator::block_index())
#define blockDim (::flextron::emulator::block_size())
#define gridDim (::flextron::emulator::grid_size())
constexpr int warpSize = 32;

#define FLEXTRON_HERE const std::source_location& site = std::source_location::current()
inline void __syncthreads(FLEXTRON_HERE) { flextron::emulator::sync_threads(site); }
inline void __syncwarp(uint32_t mask = ~0u, FLEXTRON_HERE) { flextron::emulator::sync_warp(mask, site); }
#define FLEXTRON_SHUFFLE(name, kind)                                               \
  template <class T>                                                               \
  T name(uint32_t mask, T value, int argument, int width = 32, FLEXTRON_HERE) {    \
    using flextron::emulator::Shuffle;                                             \
    return flextron::emulator::shuffled(mask, value, kind, argument, width, site); \
  }
FLEXTRON_SHUFFLE(__shfl_sync, Shuffle::kIndex)
FLEXTRON_SHUFFLE(__shfl_up_sync, Shuffle::kUp)
FLEXTRON_SHUFFLE(__shfl_down_sync, Shuffle::kDown)
FLEXTRON_SHUFFLE(__shfl_xor_sync, Shuffle::kXor)
#undef FLEXTRON_SHUFFLE
inline uint32_t __ballot_sync(uint32_t mask, bool predicate, FLEXTRON_HERE) {
  return flextron::emulator::ballot(mask, predicate, site);
}
inline int __any_sync(uint32_t mask, bool predicate, FLEXTRON_HERE) {
  return flextron::emulator::ballot(mask, predicate, site) != 0;
}
inline int __all_sync(uint32_t mask, bool predicate, FLEXTRON_HERE) {
  return flextron::emulator::ballot(mask, predicate, site) == mask;
}
#undef FLEXTRON_HERE

// Threads of the emulator never run at once, so an atomic is the plain operation.
template <class T>
T atomicAdd(T* address, std::type_identity_t<T> value) {
  const T before = *address;
  *address = before + value;
  return before;
}
template <class T>
T atomicMax(T* address, std::type_identity_t<T> value) {
  const T before = *address;
  *address = before < value ? value : before;
  return before;
}

inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float x, float y) { return x / y; }
