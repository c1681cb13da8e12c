// Moving bytes by threads: loads and stores, cp.async, and the fence towards the asynchronous proxy.
// PTX ISA, "Data Movement and Conversion Instructions".
#pragma once

#include "kernels/device/instruction.cuh"

namespace flextron {

// One access of sizeof(T) bytes, at most 16, aligned to its size. The emulator counts the bytes, and the
// banks that a warp's accesses to shared memory fall in.
template <class T>
__device__ __forceinline__ T load_global(const T* global FLEXTRON_AND_SITE) {
  FLEXTRON_INSTRUCTION(return *global, return emulator::load_global(global, site));
}
template <class T>
__device__ __forceinline__ void store_global(T* global, T value FLEXTRON_AND_SITE) {
  FLEXTRON_INSTRUCTION(*global = value, emulator::store_global(global, value, site));
}
template <class T>
__device__ __forceinline__ T load_shared(const T* shared FLEXTRON_AND_SITE) {
  FLEXTRON_INSTRUCTION(return *shared, return emulator::load_shared(shared, site));
}
template <class T>
__device__ __forceinline__ void store_shared(T* shared, T value FLEXTRON_AND_SITE) {
  FLEXTRON_INSTRUCTION(*shared = value, emulator::store_shared(shared, value, site));
}

// The first `count` 16-bit elements of 8 from there on, zeros behind them; at any address.
template <class scalar_t>
__device__ __forceinline__ uint4 gathered(const scalar_t* from, int count) {
  Registers<uint32_t, 4> words;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t low = 2 * i < count ? load_global(from + 2 * i).bits : 0;
    const uint32_t high = 2 * i + 1 < count ? load_global(from + 2 * i + 1).bits : 0;
    words[i] = low | high << 16;
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

// 16 bytes of shared memory: the first `bytes` (0 .. 16) from global memory, zeros behind them. Both
// addresses are multiples of 16. `bytes` = 0 reads nothing, and `global` may be anything.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global, int bytes FLEXTRON_AND_SITE) {
  FLEXTRON_INSTRUCTION(
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
                   "l"(__cvta_generic_to_global(global)), "r"(bytes) : "memory"),
      emulator::cp_async_16(shared, global, bytes, site));
}

__device__ __forceinline__ void cp_async_commit(FLEXTRON_SITE) {
  FLEXTRON_INSTRUCTION(asm volatile("cp.async.commit_group;" :: : "memory"), emulator::cp_async_commit(site));
}

// Waits until at most `pending` of this thread's newest groups are under way; others see the bytes after a
// barrier.
template <int pending>
__device__ __forceinline__ void cp_async_wait(FLEXTRON_SITE) {
  FLEXTRON_INSTRUCTION(asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory"),
                       emulator::cp_async_wait(pending, site));
}

// Orders this thread's writes to shared memory before the next reads by the tensor cores (wgmma) and by TMA.
// Every thread that writes needs it, before the barrier. sm_90.
__device__ __forceinline__ void fence_proxy_async(FLEXTRON_SITE) {
  FLEXTRON_INSTRUCTION(asm volatile("fence.proxy.async.shared::cta;" :: : "memory"),
                       emulator::fence_proxy_async(site));
}

// *global += value, without its old value; the order among threads is not fixed.
__device__ __forceinline__ void red_add(float* global, float value FLEXTRON_AND_SITE) {
  FLEXTRON_INSTRUCTION(asm volatile("red.global.add.f32 [%0], %1;" ::"l"(__cvta_generic_to_global(global)),
                                    "f"(value) : "memory"),
                       emulator::red_add(global, value, site));
}

}  // namespace flextron
