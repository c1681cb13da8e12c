// TMA, the Tensor Memory Accelerator, Hopper's copy engine: moves tiles of a tensor between global and shared
// memory, asynchronously; one thread asks. PTX ISA, "cp.async.bulk.tensor". sm_90.
#pragma once

#include "kernels/device/sync.cuh"
#include "kernels/device/tensor_map.h"

namespace flextron {

// A hint: the map will be used soon.
__device__ __forceinline__ void prefetch_tensor_map(const TensorMap& map FLEXTRON_AND_SITE) {
  FLEXTRON_INSTRUCTION(asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory"),
                       emulator::check_tensor_map(&map, site));
}

// The box at coordinates (x innermost, y, z) into shared memory at `tile`, swizzled as the map says; its
// whole size in bytes, zeros outside the tensor included, is counted off `barrier`.
__device__ __forceinline__ void tma_load_2d(void* tile, const TensorMap& map, Mbarrier& barrier, int x,
                                            int y FLEXTRON_AND_SITE) {
  FLEXTRON_INSTRUCTION(
      asm volatile(
          "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, "
          "%4}], [%2];" ::"r"(shared_address(tile)),
          "l"(&map), "r"(shared_address(&barrier)), "r"(x), "r"(y) : "memory"),
      emulator::tma_load(tile, &map, &barrier, {x, y}, 0, site));
}
__device__ __forceinline__ void tma_load_3d(void* tile, const TensorMap& map, Mbarrier& barrier, int x, int y,
                                            int z FLEXTRON_AND_SITE) {
  FLEXTRON_INSTRUCTION(
      asm volatile(
          "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, "
          "%4, %5}], [%2];" ::"r"(shared_address(tile)),
          "l"(&map), "r"(shared_address(&barrier)), "r"(x), "r"(y), "r"(z) : "memory"),
      emulator::tma_load(tile, &map, &barrier, {x, y, z}, 0, site));
}

// The same box into every block of the cluster whose bit is set in `blocks`: same place, same barrier, in
// each.
__device__ __forceinline__ void tma_load_2d_multicast(void* tile, const TensorMap& map, Mbarrier& barrier,
                                                      int x, int y, uint16_t blocks FLEXTRON_AND_SITE) {
  FLEXTRON_INSTRUCTION(
      asm volatile(
          "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
          "[%0], [%1, {%3, %4}], [%2], %5;" ::"r"(shared_address(tile)),
          "l"(&map), "r"(shared_address(&barrier)), "r"(x), "r"(y), "h"(blocks) : "memory"),
      emulator::tma_load(tile, &map, &barrier, {x, y}, blocks, site));
}
__device__ __forceinline__ void tma_load_3d_multicast(void* tile, const TensorMap& map, Mbarrier& barrier,
                                                      int x, int y, int z,
                                                      uint16_t blocks FLEXTRON_AND_SITE) {
  FLEXTRON_INSTRUCTION(
      asm volatile(
          "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
          "[%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(shared_address(tile)),
          "l"(&map), "r"(shared_address(&barrier)), "r"(x), "r"(y), "r"(z), "h"(blocks) : "memory"),
      emulator::tma_load(tile, &map, &barrier, {x, y, z}, blocks, site));
}

// Shared memory back to the box; what lies outside the tensor is left out. The writing threads have passed
// fence_proxy_async and a barrier before.
__device__ __forceinline__ void tma_store_2d(const TensorMap& map, const void* tile, int x,
                                             int y FLEXTRON_AND_SITE) {
  FLEXTRON_INSTRUCTION(
      asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(&map),
                   "r"(shared_address(tile)), "r"(x), "r"(y) : "memory"),
      emulator::tma_store(&map, tile, {x, y}, site));
}
__device__ __forceinline__ void tma_store_3d(const TensorMap& map, const void* tile, int x, int y,
                                             int z FLEXTRON_AND_SITE) {
  FLEXTRON_INSTRUCTION(
      asm volatile(
          "cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(&map),
          "r"(shared_address(tile)), "r"(x), "r"(y), "r"(z) : "memory"),
      emulator::tma_store(&map, tile, {x, y, z}, site));
}

// This thread's stores since the last commit make a group; wait_read returns when at most `pending` of the
// newest groups still read shared memory, wait when they have written global memory too.
__device__ __forceinline__ void tma_store_commit(FLEXTRON_SITE) {
  FLEXTRON_INSTRUCTION(asm volatile("cp.async.bulk.commit_group;" :: : "memory"),
                       emulator::tma_store_commit(site));
}
template <int pending>
__device__ __forceinline__ void tma_store_wait_read(FLEXTRON_SITE) {
  FLEXTRON_INSTRUCTION(asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(pending) : "memory"),
                       emulator::tma_store_wait(pending, site));
}
template <int pending>
__device__ __forceinline__ void tma_store_wait(FLEXTRON_SITE) {
  FLEXTRON_INSTRUCTION(asm volatile("cp.async.bulk.wait_group %0;" ::"n"(pending) : "memory"),
                       emulator::tma_store_wait(pending, site));
}

}  // namespace flextron
