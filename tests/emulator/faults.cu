// Kernels with a planted fault, each with its corrected twin: what the emulator must catch, and must not.
#include <functional>
#include <stdexcept>
#include <vector>

#include "core/types.h"
#include "emulator/both.h"
#include "kernels/device/copy.cuh"
#include "kernels/device/launch.cuh"
#include "kernels/device/mma.cuh"
#include "kernels/device/tma.cuh"
#include "kernels/device/wgmma.cuh"

namespace flextron {
namespace {

// ---- threads and barriers ----

struct Floats {
  float value[256];
};

template <bool planted>
__global__ void missing_barrier_kernel(float* y) {
  auto& shared = static_shared<Floats>();
  shared.value[threadIdx.x] = static_cast<float>(threadIdx.x);
  if (!planted) __syncthreads();
  y[threadIdx.x] = shared.value[(threadIdx.x + 32) % blockDim.x];
}

// Two rounds through one buffer: the second write may overtake a slow reader of the first.
template <bool planted>
__global__ void missing_second_barrier_kernel(float* y) {
  auto& shared = static_shared<Floats>();
  float sum = 0;
  for (int round = 0; round < 3; ++round) {
    shared.value[threadIdx.x] = static_cast<float>(round * 1000 + static_cast<int>(threadIdx.x));
    __syncthreads();
    sum += shared.value[(threadIdx.x + 32) % blockDim.x];
    if (!planted) __syncthreads();
  }
  y[threadIdx.x] = sum;
}

template <bool planted>
__global__ void unwritten_shared_kernel(float* y) {
  auto& shared = static_shared<Floats>();
  if (!planted || threadIdx.x > 0) shared.value[threadIdx.x] = 1;
  __syncthreads();
  y[threadIdx.x] = shared.value[threadIdx.x];
}

template <bool planted>
__global__ void divergent_barrier_kernel(float* y) {
  if (planted && threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  y[threadIdx.x] = 1;
}

template <bool planted>
__global__ void exit_before_barrier_kernel(float* y) {
  y[threadIdx.x] = 1;
  if (planted && threadIdx.x == 5) return;
  __syncthreads();
}

template <bool planted>
__global__ void divergent_shuffle_kernel(float* y) {
  const auto value = static_cast<float>(threadIdx.x);
  if (planted && threadIdx.x % 2) {
    y[threadIdx.x] = __shfl_xor_sync(~0u, value, 1);
  } else {
    y[threadIdx.x] = __shfl_xor_sync(~0u, value, 1);
  }
}

template <bool planted>
__global__ void shuffle_outside_the_mask_kernel(float* y) {
  y[threadIdx.x] = 0;
  if (threadIdx.x < 16)
    y[threadIdx.x] = __shfl_sync(0xffffu, static_cast<float>(threadIdx.x), planted ? 20 : 10);
}

template <bool planted>
__global__ void barrier_count_kernel(float* y) {
  if (threadIdx.x < 64) named_barrier_sync(1, planted && threadIdx.x >= 32 ? 96 : 64);
  y[threadIdx.x] = 1;
}

template <bool planted>
__global__ void register_index_kernel(float* y) {
  Registers<float, 4> r{};
  for (int i = 0; i < (planted ? 5 : 4); ++i) r[i] = static_cast<float>(i);
  y[threadIdx.x] = r[3];
}

template <bool planted>
__global__ void register_count_kernel(float* y) {
  if (threadIdx.x < 128) {
    fewer_registers<40>();
  } else {
    more_registers<planted ? 240 : 232>();
  }
  y[threadIdx.x % 256] = 1;
}

// ---- addresses ----

template <bool planted>
__global__ void misaligned_load_kernel(const float* x, float* y) {
  const auto* vector = reinterpret_cast<const float4*>(x + (planted ? 1 : 4));
  y[threadIdx.x] = load_global(vector).x;
}

template <bool planted>
__global__ void misaligned_copy_kernel(const float* x, float* y) {
  auto& shared = dynamic_shared<Floats>();
  if (threadIdx.x == 0) cp_async_16(&shared, x + (planted ? 2 : 4), 16);
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  y[threadIdx.x] = shared.value[threadIdx.x % 4];
}

template <bool planted>
__global__ void outside_shared_kernel(float* y) {
  auto& shared = dynamic_shared<Floats>();
  store_shared(&shared.value[threadIdx.x] + (planted ? 130 : 0), 1.0f);
  y[threadIdx.x] = load_shared(&shared.value[threadIdx.x]);
}

// Plain C++ beyond the block's shared memory, and beyond a tensor: AddressSanitizer's to find.
template <bool planted>
__global__ void outside_shared_plain_kernel(float* y) {
  auto& shared = dynamic_shared<Floats>();
  auto* volatile value = shared.value;
  value[threadIdx.x + (planted ? 130 : 0)] = 1;
  y[threadIdx.x] = value[threadIdx.x];
}

template <bool planted>
__global__ void outside_global_kernel(float* y) {
  y[threadIdx.x + (planted ? 256 : 0)] = 1;
}

// ---- cp.async ----

template <bool planted>
__global__ void missing_copy_wait_kernel(const float* x, float* y) {
  auto& shared = dynamic_shared<Floats>();
  cp_async_16(&shared.value[4 * threadIdx.x], x + 4 * threadIdx.x, 16);
  cp_async_commit();
  if (!planted) cp_async_wait<0>();
  y[threadIdx.x] = shared.value[4 * threadIdx.x];
  cp_async_wait<0>();
}

// The same, read through a word: an error that names the copy.
template <bool planted>
__global__ void read_in_flight_kernel(const float* x, float* y) {
  auto& shared = dynamic_shared<Floats>();
  cp_async_16(&shared.value[4 * threadIdx.x], x + 4 * threadIdx.x, 16);
  cp_async_commit();
  if (!planted) cp_async_wait<0>();
  y[threadIdx.x] = load_shared(&shared.value[4 * threadIdx.x]);
  cp_async_wait<0>();
}

template <bool planted>
__global__ void missing_copy_barrier_kernel(const float* x, float* y) {
  auto& shared = dynamic_shared<Floats>();
  cp_async_16(&shared.value[4 * threadIdx.x], x + 4 * threadIdx.x, 16);
  cp_async_commit();
  cp_async_wait<0>();
  if (!planted) __syncthreads();
  y[threadIdx.x] = shared.value[4 * ((threadIdx.x + 32) % blockDim.x)];
}

template <bool planted>
__global__ void copy_in_flight_at_exit_kernel(const float* x, float* y) {
  auto& shared = dynamic_shared<Floats>();
  cp_async_16(&shared.value[4 * threadIdx.x], x, 16);
  cp_async_commit();
  y[threadIdx.x] = 1;
  if (!planted) cp_async_wait<0>();
}

// ---- mbarriers ----

struct Pipe {
  float value[2];
  Mbarrier full[2], empty[2];
};

enum class Fault {
  kNone,
  kSamePhase,
  kNoArrive,
  kTwice,
  kNoInit,
  kBytes,
  kNoRelease,
  kCoordinate,
  kNegative
};

// A producer (thread 0) hands 6 numbers to a consumer (thread 32) through two stages.
template <Fault fault>
__global__ void pipe_kernel(float* y) {
  auto& shared = static_shared<Pipe>();
  if (threadIdx.x == 0 && fault != Fault::kNoInit) {
    for (int s = 0; s < 2; ++s) {
      mbarrier_init(shared.full[s], 1);
      mbarrier_init(shared.empty[s], 1);
    }
    fence_mbarrier_init();
  }
  __syncthreads();
  for (int i = 0; i < 6; ++i) {
    const int s = i % 2;
    const unsigned round = i / 2 % 2;
    if (threadIdx.x == 0) {
      if (fault != Fault::kNoRelease) mbarrier_wait(shared.empty[s], round ^ 1u);
      shared.value[s] = static_cast<float>(i);
      if (fault == Fault::kBytes)
        mbarrier_arrive_expect(shared.full[s], 16);
      else if (fault != Fault::kNoArrive || i < 3)
        mbarrier_arrive(shared.full[s]);
      if (fault == Fault::kTwice) mbarrier_arrive(shared.full[s]);
    }
    if (threadIdx.x == 32) {
      mbarrier_wait(shared.full[s], round);
      if (fault == Fault::kSamePhase && i == 0) mbarrier_wait(shared.full[s], round);
      y[i] = shared.value[s];
      mbarrier_arrive(shared.empty[s]);
    }
  }
}

// ---- TMA ----

struct alignas(1024) Tile {
  bf16 value[64 * 64];  // 64 rows of 128 bytes
};
struct Tiles {
  Tile a, b;
  Mbarrier landed;
};

// A tile in and out again.
template <Fault fault, bool no_wait, bool no_fence, bool no_store_wait, bool overwrites>
__global__ void tile_copy_kernel(const __grid_constant__ TensorMap from,
                                 const __grid_constant__ TensorMap to) {
  auto& shared = dynamic_shared<Tiles>();
  if (threadIdx.x == 0) {
    mbarrier_init(shared.landed, 1);
    fence_mbarrier_init();
    mbarrier_arrive_expect(shared.landed, sizeof(Tile) + (fault == Fault::kBytes ? 16 : 0));
    tma_load_2d(&shared.a, from, shared.landed, fault == Fault::kCoordinate ? 4 : 0, 0);
  }
  __syncthreads();
  if (!no_wait) mbarrier_wait(shared.landed, 0);
  for (int i = static_cast<int>(threadIdx.x); i < 64 * 64 / 2; i += 128) {
    const auto* in = reinterpret_cast<const uint32_t*>(shared.a.value) + i;
    store_shared(reinterpret_cast<uint32_t*>(shared.b.value) + i, no_wait ? *in : load_shared(in));
  }
  if (!no_fence || threadIdx.x == 7) fence_proxy_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    tma_store_2d(to, &shared.b, 0, fault == Fault::kNegative ? -1 : 0);
    tma_store_commit();
    if (overwrites) shared.b.value[5] = bf16(77.0f);
    if (!no_store_wait) tma_store_wait_read<0>();
    if (no_wait) mbarrier_wait(shared.landed, 0);
  }
}

// Two blocks of a cluster, the first fills both.
template <bool planted>
__global__ void multicast_kernel(const __grid_constant__ TensorMap from, float* y) {
  auto& shared = dynamic_shared<Tiles>();
  if (threadIdx.x == 0) {
    mbarrier_init(shared.landed, 1);
    fence_mbarrier_init();
    mbarrier_arrive_expect(shared.landed, sizeof(Tile));
  }
  if (!planted) {
    cluster_arrive();
    cluster_wait();
  }
  if (threadIdx.x == 0 && cluster_rank() == 0) tma_load_2d_multicast(&shared.a, from, shared.landed, 0, 0, 3);
  mbarrier_wait(shared.landed, 0);
  y[blockIdx.x * 32 + threadIdx.x] = static_cast<float>(shared.a.value[threadIdx.x]);
  cluster_arrive();
  cluster_wait();
}

// ---- wgmma ----

struct WgmmaFault {
  bool no_fence = false, no_wait = false, overwrites = false, early = false, swizzle = false,
       unaligned = false, unequal = false, writes_accumulator = false, holds_early = false,
       no_barrier = false;
};

// y[64, 64] = a b^T of two tiles.
template <WgmmaFault fault>
__global__ void wgmma_kernel(const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b,
                             float* y) {
  auto& shared = dynamic_shared<Tiles>();
  if (threadIdx.x == 0) {
    mbarrier_init(shared.landed, 1);
    fence_mbarrier_init();
    mbarrier_arrive_expect(shared.landed, 2 * sizeof(Tile));
    tma_load_2d(&shared.a, a, shared.landed, 0, 0);
    tma_load_2d(&shared.b, b, shared.landed, 0, 0);
  }
  __syncthreads();
  if (!fault.early) mbarrier_wait(shared.landed, 0);
  Registers<float, 32> d{};
  const Swizzle swizzle = fault.swizzle ? Swizzle::k64 : Swizzle::k128;
  const auto* begin = reinterpret_cast<const unsigned char*>(&shared.a) + (fault.unaligned ? 256 : 0);
  const uint64_t left = wgmma_descriptor(begin, swizzle, 0, 1024);
  const uint64_t right = wgmma_descriptor(&shared.b, Swizzle::k128, 0, 1024);
  if (!fault.no_fence) wgmma_fence();
  for (uint32_t k = 0; k < 4; ++k)
    wgmma<bf16, 64>(d, wgmma_advance(left, 32 * k), wgmma_advance(right, 32 * k),
                    fault.unequal && k == 2 && threadIdx.x >= 96 ? 0 : 1);
  wgmma_commit();
  if (fault.writes_accumulator) d[3] = 1;
  if (fault.overwrites && threadIdx.x == 0) shared.a.value[100] = bf16(5.0f);
  if (!fault.no_wait) wgmma_wait<0>();
  if (fault.holds_early || !fault.no_wait) hold(d);
  if (!fault.no_barrier) __syncthreads();  // a warp's rows of A are free when the others' wgmma has read them
  if (!fault.no_wait && threadIdx.x % 32 == 0)
    store_shared(&shared.a.value[threadIdx.x / 32 * 16 * 64], bf16(5.0f));
  const int row = static_cast<int>(threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4),
            column = threadIdx.x % 4 * 2;
  for (int i = 0; i < 32; ++i) y[(row + i / 2 % 2 * 8) * 64 + i / 4 * 8 + column + i % 2] = d[i];
  if (fault.no_wait) wgmma_wait<0>();
  if (fault.early) mbarrier_wait(shared.landed, 0);
}

// ---- dependent launches ----

__global__ void first_kernel(float* x) {
  grid_launch_dependents();
  auto& shared = static_shared<Floats>();
  shared.value[threadIdx.x] = 3;
  x[threadIdx.x] = shared.value[threadIdx.x];
}
template <bool planted>
__global__ void second_kernel(const float* x, float* y) {
  auto& shared = static_shared<Floats>();
  shared.value[threadIdx.x] =
      planted ? x[threadIdx.x] : 5;  // before the wait: only what the first does not write
  grid_dependency_wait();
  y[threadIdx.x] = shared.value[threadIdx.x] + (planted ? 5 : x[threadIdx.x]);
}

// ---- the table ----

using Values = std::vector<float>;

struct Case {
  const char* name;
  const char* outcome;  // of the planted one: "error", "seeds" (results differ between them), "poison" (NaN),
                        // "stale" (other results than the twin's), "asan" (an error of AddressSanitizer's)
  const char* words;    // that the error's text has, separated by |
  std::function<Values(bool planted)> run;
};

Values values_of(const Buffer<float>& y) { return {&y[0], &y[0] + y.size()}; }

// One block of `threads` writing y, with or without an x to read.
#define FLEXTRON_RUN(kernel, threads, ...)                                                                 \
  [](bool planted) {                                                                                       \
    Buffer<float> x(1024), y(256, -1.0f);                                                                  \
    for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i);                                    \
    const LaunchConfig config{.grid = {1}, .block = {threads}, .stream = nullptr, .dynamic_shared = 1024}; \
    planted ? launch<kernel<true>>(config, __VA_ARGS__) : launch<kernel<false>>(config, __VA_ARGS__);      \
    finish();                                                                                              \
    return values_of(y);                                                                                   \
  }

template <Fault fault>
Values run_pipe(bool planted) {
  Buffer<float> y(6, -1.0f);
  const LaunchConfig config{.grid = {1}, .block = {64}, .stream = nullptr};
  planted ? launch<pipe_kernel<fault>>(config, y.data())
          : launch<pipe_kernel<Fault::kNone>>(config, y.data());
  finish();
  return values_of(y);
}

struct Matrix {
  Buffer<bf16> value;
  explicit Matrix(float step) : value(64 * 64) {
    for (size_t i = 0; i < value.size(); ++i) value[i] = bf16(step * static_cast<float>(i % 61) - 1.0f);
  }
  TensorMap map(Swizzle swizzle) {
    return make_tensor_map(TensorShape<2>{value.data(), {64, 64}, {128}, {64, 64}, swizzle}, true);
  }
};

template <Fault fault, bool no_wait, bool no_fence, bool no_store_wait, bool overwrites>
Values run_tile_copy(bool planted) {
  Matrix from(0.25f), to(0);
  const LaunchConfig config{.grid = {1}, .block = {128}, .stream = nullptr, .dynamic_shared = sizeof(Tiles)};
  const TensorMap in = from.map(Swizzle::k128), out = to.map(Swizzle::k128);
  if (planted)
    launch<tile_copy_kernel<fault, no_wait, no_fence, no_store_wait, overwrites>>(config, in, out);
  else
    launch<tile_copy_kernel<Fault::kNone, false, false, false, false>>(config, in, out);
  finish();
  Values y(to.value.size());
  for (size_t i = 0; i < y.size(); ++i) y[i] = static_cast<float>(to.value[i]);
  return y;
}

Values run_multicast(bool planted) {
  Matrix from(0.25f);
  Buffer<float> y(64, -1.0f);
  const LaunchConfig config{
      .grid = {2}, .block = {32}, .stream = nullptr, .dynamic_shared = sizeof(Tiles), .cluster = 2};
  const TensorMap map = from.map(Swizzle::kNone);
  planted ? launch<multicast_kernel<true>>(config, map, y.data())
          : launch<multicast_kernel<false>>(config, map, y.data());
  finish();
  return values_of(y);
}

template <WgmmaFault fault>
Values run_wgmma(bool planted) {
  Matrix a(0.25f), b(0.5f);
  Buffer<float> y(64 * 64, -1.0f);
  const LaunchConfig config{.grid = {1}, .block = {128}, .stream = nullptr, .dynamic_shared = sizeof(Tiles)};
  const TensorMap left = a.map(Swizzle::k128), right = b.map(Swizzle::k128);
  planted ? launch<wgmma_kernel<fault>>(config, left, right, y.data())
          : launch<wgmma_kernel<WgmmaFault{}>>(config, left, right, y.data());
  finish();
  if (!planted) {  // the twin is right, not only quiet
    for (size_t i = 0; i < 64; ++i)
      for (size_t j = 0; j < 64; ++j) {
        float sum = 0;
        for (size_t k = 0; k < 64; ++k)
          sum += static_cast<float>(a.value[i * 64 + k]) * static_cast<float>(b.value[j * 64 + k]);
        if (!(std::abs(y[i * 64 + j] - sum) <= 1e-4f * (1 + std::abs(sum))))
          throw std::runtime_error("wgmma: the product is wrong at " + std::to_string(i) + ", " +
                                   std::to_string(j));
      }
  }
  return values_of(y);
}

Values run_dependent(bool planted) {
  Buffer<float> x(32, 1.0f), y(32, -1.0f);
  const LaunchConfig config{.grid = {1}, .block = {32}, .stream = nullptr};
  LaunchConfig dependent = config;
  dependent.programmatic = true;
  launch<first_kernel>(config, x.data());
  planted ? launch<second_kernel<true>>(dependent, x.data(), y.data())
          : launch<second_kernel<false>>(dependent, x.data(), y.data());
  finish();
  return values_of(y);
}

Values run_refused_map(bool planted) {
  Matrix a(1);
  make_tensor_map(TensorShape<2>{a.value.data(), {60, 64}, {planted ? 120u : 128u}, {64, 64}, Swizzle::k128},
                  true);
  return {1};
}

Values run_large_shared(bool planted) {
  Buffer<float> y(256);
  launch<missing_barrier_kernel<false>>(
      {.grid = {1}, .block = {64}, .stream = nullptr, .dynamic_shared = planted ? size_t{1} << 20 : 0},
      y.data());
  finish();
  return {y[0]};
}

const std::vector<Case>& cases() {
  static const std::vector<Case> table{
      {"missing_barrier", "seeds", "", FLEXTRON_RUN(missing_barrier_kernel, 128, y.data())},
      {"missing_second_barrier", "seeds", "", FLEXTRON_RUN(missing_second_barrier_kernel, 128, y.data())},
      {"unwritten_shared", "poison", "", FLEXTRON_RUN(unwritten_shared_kernel, 64, y.data())},
      {"divergent_barrier", "error",
       "divergent|__syncthreads|thread (|faults.cu:", FLEXTRON_RUN(divergent_barrier_kernel, 64, y.data())},
      {"exit_before_barrier", "error", "__syncthreads",
       FLEXTRON_RUN(exit_before_barrier_kernel, 64, y.data())},
      {"divergent_shuffle", "error", "divergent shuffle",
       FLEXTRON_RUN(divergent_shuffle_kernel, 32, y.data())},
      {"shuffle_outside_the_mask", "error", "lane 20",
       FLEXTRON_RUN(shuffle_outside_the_mask_kernel, 32, y.data())},
      {"barrier_count", "error", "barrier 1", FLEXTRON_RUN(barrier_count_kernel, 64, y.data())},
      {"register_index", "error", "register array|[0, 4)|got 4|block (0, 0, 0), thread (|faults.cu:",
       FLEXTRON_RUN(register_index_kernel, 32, y.data())},
      {"register_count", "error", "66560|64512", FLEXTRON_RUN(register_count_kernel, 384, y.data())},
      {"misaligned_load", "error", "16 bytes must be aligned",
       FLEXTRON_RUN(misaligned_load_kernel, 32, x.data(), y.data())},
      {"misaligned_copy", "error", "multiple of 16",
       FLEXTRON_RUN(misaligned_copy_kernel, 32, x.data(), y.data())},
      {"outside_shared", "error", "outside the block's", FLEXTRON_RUN(outside_shared_kernel, 128, y.data())},
      {"outside_shared_plain", "asan", "", FLEXTRON_RUN(outside_shared_plain_kernel, 128, y.data())},
      {"outside_global", "asan", "", FLEXTRON_RUN(outside_global_kernel, 128, y.data())},
      {"missing_copy_wait", "poison", "", FLEXTRON_RUN(missing_copy_wait_kernel, 64, x.data(), y.data())},
      {"read_in_flight", "error", "still on its way",
       FLEXTRON_RUN(read_in_flight_kernel, 64, x.data(), y.data())},
      {"missing_copy_barrier", "seeds", "",
       FLEXTRON_RUN(missing_copy_barrier_kernel, 64, x.data(), y.data())},
      {"copy_in_flight_at_exit", "error", "cp_async_wait",
       FLEXTRON_RUN(copy_in_flight_at_exit_kernel, 64, x.data(), y.data())},
      {"same_phase_again", "error", "wrong phase|phase 0", run_pipe<Fault::kSamePhase>},
      {"missing_arrive", "error", "every thread waits|phase 1|1 of 1 arrivals|thread",
       run_pipe<Fault::kNoArrive>},
      {"arrive_twice", "seeds|error", "", run_pipe<Fault::kTwice>},
      {"missing_init", "error", "mbarrier_init has not been called", run_pipe<Fault::kNoInit>},
      {"missing_release", "seeds|error", "", run_pipe<Fault::kNoRelease>},
      {"bytes_that_never_come", "error", "every thread waits|16 bytes to come", run_pipe<Fault::kBytes>},
      {"missing_landing_wait", "poison", "", run_tile_copy<Fault::kNone, true, false, false, false>},
      {"wrong_byte_count", "error", "every thread waits|16 bytes to come",
       run_tile_copy<Fault::kBytes, false, false, false, false>},
      {"misaligned_coordinate", "error", "multiple of 16 bytes, got 4 elements",
       run_tile_copy<Fault::kCoordinate, false, false, false, false>},
      {"negative_store", "error", "must not be negative, got -1",
       run_tile_copy<Fault::kNegative, false, false, false, false>},
      {"missing_proxy_fence", "error", "fence_proxy_async",
       run_tile_copy<Fault::kNone, false, true, false, false>},
      {"missing_store_wait", "error", "tma_store_wait_read",
       run_tile_copy<Fault::kNone, false, false, true, false>},
      {"overwritten_store", "error", "overwritten", run_tile_copy<Fault::kNone, false, false, false, true>},
      {"multicast_before_init", "error", "", run_multicast},
      {"missing_wgmma_fence", "error", "wgmma_fence", run_wgmma<WgmmaFault{.no_fence = true}>},
      {"missing_wgmma_wait", "poison", "", run_wgmma<WgmmaFault{.no_wait = true}>},
      {"overwritten_operand", "error", "overwritten before this wait",
       run_wgmma<WgmmaFault{.overwrites = true}>},
      {"operand_still_flying", "error", "still on its way", run_wgmma<WgmmaFault{.early = true}>},
      {"swizzle_mismatch", "error", "swizzle", run_wgmma<WgmmaFault{.swizzle = true}>},
      {"unaligned_descriptor", "error", "multiple of 1024", run_wgmma<WgmmaFault{.unaligned = true}>},
      {"unequal_wgmma", "error", "divergent wgmma", run_wgmma<WgmmaFault{.unequal = true}>},
      {"missing_wgmma_wait_seen", "error", "hold|under way",
       run_wgmma<WgmmaFault{.no_wait = true, .holds_early = true}>},
      {"reused_operand", "error", "shared memory at offset", run_wgmma<WgmmaFault{.no_barrier = true}>},
      {"written_accumulator", "error", "accumulator 3", run_wgmma<WgmmaFault{.writes_accumulator = true}>},
      {"missing_grid_wait", "stale", "", run_dependent},
      {"refused_tensor_map", "error", "strides must be multiples of 16 bytes", run_refused_map},
      {"too_much_shared", "error", "shared memory must be at most", run_large_shared},
  };
  return table;
}

}  // namespace

namespace emulator {

std::string fault_names() {
  std::string json = "[";
  for (const Case& c : cases())
    json += std::string(json.size() > 1 ? ", " : "") + "{\"name\": \"" + c.name + "\", \"outcome\": \"" +
            c.outcome + "\", \"words\": \"" + c.words + "\"}";
  return json + "]";
}

std::string run_fault(const std::string& name) {
  const size_t slash = name.find('/');
  for (const Case& c : cases()) {
    if (name.substr(0, slash) != c.name) continue;
    std::string values;
    for (const float value : c.run(slash == std::string::npos)) values += std::to_string(value) + " ";
    return values;
  }
  throw std::runtime_error("emulator: there is no fault named " + name);
}

}  // namespace emulator
}  // namespace flextron
