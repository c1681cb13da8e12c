// What a kernel's host side needs to run on a GPU and in the emulator alike.
#pragma once

#include <cstring>
#include <vector>

#include "kernels/device/launch.cuh"

namespace flextron {

// Memory that host and kernels share.
template <class T>
class Buffer {
 public:
  explicit Buffer(size_t count, T value = T{}) : count_(count) {
#ifdef FLEXTRON_EMULATE
    data_ = new (std::align_val_t(256)) T[count];
#else
    check_cuda(cudaMallocManaged(&data_, count * sizeof(T)), "managed memory");
#endif
    for (size_t i = 0; i < count; ++i) data_[i] = value;
  }
  ~Buffer() {
#ifdef FLEXTRON_EMULATE
    operator delete[](data_, std::align_val_t(256));
#else
    cudaFree(data_);
#endif
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  T* data() { return data_; }
  T& operator[](size_t i) { return data_[i]; }
  const T& operator[](size_t i) const { return data_[i]; }
  size_t size() const { return count_; }

 private:
  T* data_ = nullptr;
  size_t count_;
};

// Waits for what was launched; throws what went wrong.
inline void finish() {
#ifdef FLEXTRON_EMULATE
  emulator::synchronize();
#else
  check_cuda(cudaDeviceSynchronize(), "kernel");
#endif
}

}  // namespace flextron
