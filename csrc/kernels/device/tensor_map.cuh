// Making tensor maps on the host: by the driver, whose function is asked for at run time so that the library
// loads where no driver is, or by the emulator.
#pragma once

#include <string>

#include "kernels/device/launch.cuh"
#include "kernels/device/tensor_map.h"

#ifndef FLEXTRON_EMULATE
#include <cuda.h>
#endif

namespace flextron {

inline void check_tensor_map(bool holds, const char* requirement, uint64_t got) {
  if (!holds)
    throw std::runtime_error(std::string("tensor map: ") + requirement + ", got " + std::to_string(got));
}

template <int rank>
void check_tensor_shape(const TensorShape<rank>& shape) {
  constexpr uint64_t kElementBytes = 2;
  const uint64_t address = reinterpret_cast<uintptr_t>(shape.data);
  check_tensor_map(address % 16 == 0, "the tensor's address must be a multiple of 16", address);
  for (const uint64_t size : shape.size)
    check_tensor_map(size >= 1 && size <= uint64_t{1} << 32, "sizes must be in 1 .. 2^32", size);
  for (const uint64_t stride : shape.stride)
    check_tensor_map(stride % 16 == 0 && stride < uint64_t{1} << 40,
                     "strides must be multiples of 16 bytes below 2^40", stride);
  for (const uint32_t box : shape.box)
    check_tensor_map(box >= 1 && box <= 256, "a box's sides must be in 1 .. 256 elements", box);
  const uint64_t inner = shape.box[0] * kElementBytes;
  check_tensor_map(inner % 16 == 0, "a box's inner side must be a multiple of 16 bytes", inner);
  check_tensor_map(shape.swizzle == Swizzle::kNone || inner <= swizzle_mask(shape.swizzle) + 16,
                   "a box's inner side must not exceed the swizzle's width in bytes", inner);
}

#ifdef FLEXTRON_EMULATE

template <int rank>
TensorMap encode_tensor_map(const TensorShape<rank>& shape, bool) {
  return emulator::make_tensor_map(shape.data, rank, shape.size.data(), shape.stride.data(), shape.box.data(),
                                   shape.swizzle);
}

#else

inline auto tensor_map_encoder() {
  using Encoder = decltype(&cuTensorMapEncodeTiled);
  static const Encoder encoder = [] {
    constexpr unsigned kSince = 12000;  // the CUDA version that brought it
    void* found = nullptr;
    auto outcome = cudaDriverEntryPointSymbolNotFound;
    check_cuda(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, kSince, cudaEnableDefault,
                                                &outcome),
               "tensor map: asking the driver for cuTensorMapEncodeTiled");
    if (outcome != cudaDriverEntryPointSuccess || !found)
      throw std::runtime_error(
          "tensor map: the GPU's driver has no cuTensorMapEncodeTiled: it must be one for CUDA 12.0 or "
          "newer");
    return reinterpret_cast<Encoder>(found);
  }();
  return encoder;
}

template <int rank>
TensorMap encode_tensor_map(const TensorShape<rank>& shape, bool is_bf16) {
  constexpr CUtensorMapSwizzle kSwizzles[] = {CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                              CU_TENSOR_MAP_SWIZZLE_64B, CU_TENSOR_MAP_SWIZZLE_32B};
  std::array<uint32_t, rank> every;
  every.fill(1);
  CUtensorMap map;
  const auto encode = [&] {
    return tensor_map_encoder()(
        &map, is_bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, rank,
        const_cast<void*>(shape.data), shape.size.data(), shape.stride.data(), shape.box.data(), every.data(),
        CU_TENSOR_MAP_INTERLEAVE_NONE, kSwizzles[static_cast<uint32_t>(shape.swizzle)],
        CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  };
  CUresult result = encode();
  if (result == CUDA_ERROR_INVALID_CONTEXT) {  // a thread that has done nothing on a GPU yet: autograd's
    int device;
    check_cuda(cudaGetDevice(&device), "tensor map: the current device");
    check_cuda(cudaSetDevice(device), "tensor map: making its context current");
    result = encode();
  }
  check_tensor_map(result == CUDA_SUCCESS, "the driver must take it, CUresult 0", result);
  return bits_as<TensorMap>(map);
}

#endif

template <int rank>
TensorMap make_tensor_map(const TensorShape<rank>& shape, bool is_bf16) {
  check_tensor_shape(shape);
  return encode_tensor_map(shape, is_bf16);
}

}  // namespace flextron
