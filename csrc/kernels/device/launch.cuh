// Starting a kernel, and what a launch may ask of the machine: one function for GPUs and the emulator.
#pragma once

#include <stdexcept>
#include <string>

#include "kernels/device/instruction.cuh"

struct CUstream_st;  // cudaStream_t, without the CUDA headers

namespace flextron {

struct LaunchConfig {
  dim3 grid, block;
  CUstream_st* stream;
  size_t dynamic_shared = 0;  // bytes
  unsigned cluster = 1;       // blocks along x that share a cluster. sm_90
  bool programmatic = false;  // may start before the launch ahead has ended: see grid_dependency_wait. sm_90
};

#ifndef FLEXTRON_EMULATE
inline void check_cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // told here: the next caller's errors are his own
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// Whether the kernel's code has grid_dependency_wait: made from the PTX of an older architecture, for a GPU
// newer than all it was built for, it has none.
template <auto kernel>
bool waits_for_the_launch_ahead() {
  static const bool waits = [] {
    cudaFuncAttributes attributes;
    check_cuda(cudaFuncGetAttributes(&attributes, kernel), "attributes of a kernel");
    return attributes.ptxVersion >= 90;
  }();
  return waits;
}
#endif

#ifndef FLEXTRON_EMULATE
// What the driver is told of a launch.
template <auto kernel>
struct DriverConfig {
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t launch{};

  explicit DriverConfig(const LaunchConfig& config) {
    constexpr size_t kUnasked = 48 * 1024;  // what a block gets without raising its limit
    if (config.dynamic_shared > kUnasked)
      check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      static_cast<int>(config.dynamic_shared)),
                 "shared memory of a kernel");
    launch.gridDim = config.grid;
    launch.blockDim = config.block;
    launch.dynamicSmemBytes = config.dynamic_shared;
    launch.stream = config.stream;
    launch.attrs = attributes;
    if (config.cluster > 1) {
      attributes[launch.numAttrs].id = cudaLaunchAttributeClusterDimension;
      attributes[launch.numAttrs++].val.clusterDim = {config.cluster, 1, 1};
    }
    if (config.programmatic && waits_for_the_launch_ahead<kernel>()) {
      attributes[launch.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
      attributes[launch.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
    }
  }
  DriverConfig(const DriverConfig&) = delete;  // `launch` points into it
};
#endif

template <auto kernel, class... Args>
void launch(const LaunchConfig& config, const Args&... args) {
#ifdef FLEXTRON_EMULATE
  emulator::launch(emulator::kernel_name(__PRETTY_FUNCTION__),
                   {config.grid, config.block, config.dynamic_shared, config.cluster, config.programmatic},
                   [=] { kernel(args...); });
#else
  const DriverConfig<kernel> driver(config);
  check_cuda(cudaLaunchKernelEx(&driver.launch, kernel, args...), "kernel launch");
#endif
}

// How many clusters of such a launch the current device holds at once. Asked once for each kernel: GPUs of
// one architecture in one machine are taken for alike, and a wrong number costs time alone.
template <auto kernel>
int clusters_at_once([[maybe_unused]] const LaunchConfig& config) {
#ifdef FLEXTRON_EMULATE
  return emulator::kMultiprocessors;
#else
  static const int count = [&] {
    const DriverConfig<kernel> driver(config);
    int clusters = 0;
    check_cuda(cudaOccupancyMaxActiveClusters(&clusters, kernel, &driver.launch), "clusters of a kernel");
    return clusters > 0 ? clusters : 1;
  }();
  return count;
#endif
}

// Multiprocessors of the current device.
inline int multiprocessors() {
#ifdef FLEXTRON_EMULATE
  return emulator::kMultiprocessors;
#else
  int device = 0, count = 0;
  check_cuda(cudaGetDevice(&device), "device");
  check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "device attribute");
  return count;
#endif
}

// 10 x major + minor of the current device's compute capability.
inline int compute_capability() {
#ifdef FLEXTRON_EMULATE
  return emulator::kComputeCapability;
#else
  int device = 0, major = 0, minor = 0;
  check_cuda(cudaGetDevice(&device), "device");
  check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "device attribute");
  check_cuda(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "device attribute");
  return 10 * major + minor;
#endif
}

}  // namespace flextron
