// Waiting for each other: named barriers, mbarriers, clusters, dependent launches; and the registers of a
// warpgroup. PTX ISA, "Parallel Synchronization and Communication Instructions".
#pragma once

#include "kernels/device/instruction.cuh"

namespace flextron {

// Barrier `id` (1 .. 15; 0 is __syncthreads) of `threads` threads, a multiple of 32. arrive does not wait.
__device__ __forceinline__ void named_barrier_sync(int id, int threads FLEXTRON_AND_SITE) {
  FLEXTRON_INSTRUCTION(asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"),
                       emulator::named_barrier(id, threads, true, site));
}
__device__ __forceinline__ void named_barrier_arrive(int id, int threads FLEXTRON_AND_SITE) {
  FLEXTRON_INSTRUCTION(asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory"),
                       emulator::named_barrier(id, threads, false, site));
}

// A barrier in shared memory that counts arrivals and bytes; its phases alternate in parity, starting at 0.
// A phase completes when `arrivals` threads have arrived and every byte expected has landed. sm_90.
struct alignas(8) Mbarrier {
  uint64_t state;
};

__device__ __forceinline__ void mbarrier_init(Mbarrier& barrier, int arrivals FLEXTRON_AND_SITE) {
  FLEXTRON_INSTRUCTION(asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)),
                                    "r"(arrivals) : "memory"),
                       emulator::mbarrier_init(&barrier, arrivals, site));
}

// After the inits, before the barrier that shows them to other threads, TMA and the cluster.
__device__ __forceinline__ void fence_mbarrier_init(FLEXTRON_SITE) {
  FLEXTRON_INSTRUCTION(asm volatile("fence.mbarrier_init.release.cluster;" :: : "memory"),
                       emulator::fence_mbarrier_init(site));
}

__device__ __forceinline__ void mbarrier_arrive(Mbarrier& barrier FLEXTRON_AND_SITE) {
  FLEXTRON_INSTRUCTION(
      asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&barrier)) : "memory"),
      emulator::mbarrier_arrive(&barrier, 0, site));
}

// Arrives, and makes the phase wait for `bytes` more from TMA.
__device__ __forceinline__ void mbarrier_arrive_expect(Mbarrier& barrier, int bytes FLEXTRON_AND_SITE) {
  FLEXTRON_INSTRUCTION(
      asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&barrier)),
                   "r"(bytes) : "memory"),
      emulator::mbarrier_arrive(&barrier, bytes, site));
}

// Arrives at the barrier at the same place of the cluster's block `rank`.
__device__ __forceinline__ void mbarrier_arrive_cluster(Mbarrier& barrier, unsigned rank FLEXTRON_AND_SITE) {
  FLEXTRON_INSTRUCTION(
      asm volatile("{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %0, %1;\n"
                   "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [remote];\n}" ::"r"(
                       shared_address(&barrier)),
                   "r"(rank) : "memory"),
      emulator::mbarrier_arrive_cluster(&barrier, rank, site));
}

// Waits until the phase of this parity has completed. A barrier that has completed none passes parity 1.
__device__ __forceinline__ void mbarrier_wait(Mbarrier& barrier, unsigned parity FLEXTRON_AND_SITE) {
  FLEXTRON_INSTRUCTION(
      asm volatile("{\n.reg .pred done;\nwait:\n"
                   "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
                   "@!done bra wait;\n}" ::"r"(shared_address(&barrier)),
                   "r"(parity) : "memory"),
      emulator::mbarrier_wait(&barrier, parity, site));
}

// This block's number in its cluster. sm_90, as are the rest.
__device__ __forceinline__ unsigned cluster_rank(FLEXTRON_SITE) {
  unsigned rank;
  FLEXTRON_INSTRUCTION(asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank)),
                       rank = emulator::cluster_rank(site));
  return rank;
}

// The same place in the shared memory of the cluster's block `rank`, for plain loads and stores.
template <class T>
__device__ __forceinline__ T* cluster_shared(T* shared, unsigned rank FLEXTRON_AND_SITE) {
  T* remote;
  FLEXTRON_INSTRUCTION(asm("mapa.u64 %0, %1, %2;" : "=l"(remote) : "l"(shared), "r"(rank)),
                       remote = static_cast<T*>(emulator::cluster_shared(shared, rank, site)));
  return remote;
}

// Every thread of the cluster arrives, then waits.
__device__ __forceinline__ void cluster_arrive(FLEXTRON_SITE) {
  FLEXTRON_INSTRUCTION(asm volatile("barrier.cluster.arrive.release.aligned;" :: : "memory"),
                       emulator::cluster_arrive(site));
}
__device__ __forceinline__ void cluster_wait(FLEXTRON_SITE) {
  FLEXTRON_INSTRUCTION(asm volatile("barrier.cluster.wait.acquire.aligned;" :: : "memory"),
                       emulator::cluster_wait(site));
}

// A launch with `programmatic` set may start before the one ahead of it in the stream has ended: it reads
// what that one wrote only after wait. launch_dependents lets the next one start.
// Nothing on older GPUs, where no launch is programmatic.
__device__ __forceinline__ void grid_dependency_wait(FLEXTRON_SITE) {
#if defined(FLEXTRON_EMULATE) || __CUDA_ARCH__ >= 900
  FLEXTRON_INSTRUCTION(asm volatile("griddepcontrol.wait;" :: : "memory"),
                       emulator::grid_dependency_wait(site));
#endif
}
__device__ __forceinline__ void grid_launch_dependents(FLEXTRON_SITE) {
#if defined(FLEXTRON_EMULATE) || __CUDA_ARCH__ >= 900
  FLEXTRON_INSTRUCTION(asm volatile("griddepcontrol.launch_dependents;" :: : "memory"),
                       emulator::grid_launch_dependents(site));
#endif
}

// Registers per thread of this warpgroup from here on, a multiple of 8 in 24 .. 256.
template <int count>
__device__ __forceinline__ void more_registers(FLEXTRON_SITE) {
  FLEXTRON_INSTRUCTION(asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count)),
                       emulator::set_registers(count, site));
}
template <int count>
__device__ __forceinline__ void fewer_registers(FLEXTRON_SITE) {
  FLEXTRON_INSTRUCTION(asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count)),
                       emulator::set_registers(count, site));
}

}  // namespace flextron
