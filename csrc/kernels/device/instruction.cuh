// How an instruction is written: what a GPU executes beside what the host emulator (tests/emulator) executes
// in its place. The only place, with this folder, where the two worlds differ: kernels have no #if.
//
//   __device__ __forceinline__ void cp_async_commit(FLEXTRON_SITE) {
//     FLEXTRON_INSTRUCTION(asm volatile("cp.async.commit_group;" ::: "memory"),  //
//                          emulator::cp_async_commit(site));
//   }
//
// FLEXTRON_SITE is the last parameter (FLEXTRON_AND_SITE after others): where the kernel stands, for the
// emulator's messages; nothing on a GPU.
#pragma once

#ifdef FLEXTRON_EMULATE
#include "emulator/emulator.h"
#define FLEXTRON_INSTRUCTION(gpu, emulated) emulated
#define FLEXTRON_SITE std::source_location site = std::source_location::current()
#define FLEXTRON_AND_SITE , std::source_location site = std::source_location::current()
#else
#include <cuda_runtime.h>
#define FLEXTRON_INSTRUCTION(gpu, emulated) gpu
#define FLEXTRON_SITE
#define FLEXTRON_AND_SITE
#endif

#include <cstdint>

namespace flextron {

// A thread's registers: an array that must be indexed by what the compiler knows after unrolling. The
// emulator checks every index.
template <class T, int N>
struct Registers {
  static constexpr int kCount = N;
  T data[N];
#ifdef FLEXTRON_EMULATE
  T& operator[](emulator::Index i) { return data[i.within(N)]; }
  const T& operator[](emulator::Index i) const { return data[i.within(N)]; }
#else
  __device__ __forceinline__ T& operator[](int i) { return data[i]; }
  __device__ __forceinline__ const T& operator[](int i) const { return data[i]; }
#endif
};

// Here the compiler forgets what it has computed from `value`: it does so again, and keeps no registers for
// it.
__device__ __forceinline__ void forget(int& value) {
  FLEXTRON_INSTRUCTION(asm volatile("" : "+r"(value)), static_cast<void>(value));
}

// The 32-bit address that instructions know shared memory by.
__device__ __forceinline__ uint32_t shared_address(const void* shared FLEXTRON_AND_SITE) {
  FLEXTRON_INSTRUCTION(return static_cast<uint32_t>(__cvta_generic_to_shared(shared)),
                              return emulator::shared_address(shared, site));
}

// A block's dynamic shared memory, laid out as one struct (or the first of an array); launch() gives its
// size. Aligned to 1024 bytes, as swizzled tiles must be.
template <class Layout>
__device__ __forceinline__ Layout& dynamic_shared() {
#ifdef FLEXTRON_EMULATE
  return *static_cast<Layout*>(emulator::dynamic_shared(sizeof(Layout)));
#else
  extern __shared__ __align__(1024) unsigned char flextron_dynamic_shared[];
  return *reinterpret_cast<Layout*>(flextron_dynamic_shared);
#endif
}

// Shared memory of a size known to the compiler, one object per block and `Layout`.
template <class Layout>
__device__ __forceinline__ Layout& static_shared() {
#ifdef FLEXTRON_EMULATE
  static const char key = 0;
  return *static_cast<Layout*>(emulator::static_shared(&key, sizeof(Layout), alignof(Layout)));
#else
  __shared__ Layout layout;
  return layout;
#endif
}

}  // namespace flextron
