// The emulator as kernels (through csrc/kernels/device) and tests see it; what it is like inside is in
// machine.h.
#pragma once

#include <cuda_runtime.h>

#include <functional>
#include <initializer_list>
#include <source_location>
#include <string>
#include <utility>

namespace flextron {

struct TensorMap;
enum class Swizzle : uint32_t;

namespace emulator {

using Site = std::source_location;

// The device that is played: few multiprocessors, and an odd number, so that persistent blocks take several
// tiles.
constexpr int kMultiprocessors = 3;
constexpr int kComputeCapability = 90;

// ---- tests ----

// The order threads run in, and when asynchronous copies land:
//   forward   in thread order; copies land at once
//   random    drawn from the seed, as are the order of blocks and the landings
//   ahead     one warp, drawn from the seed, runs as far ahead as it can; copies land as late as they can
//   behind    one warp runs only when no other can; copies land at once
void set_order(uint64_t seed, const std::string& order);
// Counts the bytes read from and written to this range apart, under this name.
void watch(const std::string& name, const void* data, size_t bytes);
void clear_watches();
// A JSON list of what every launch since the last call did.
std::string take_counters();
// Runs a kernel of faults.cu; throws what the emulator says of it. Returns the values that it computed.
std::string run_fault(const std::string& name);
std::string fault_names();
// The same for words.cu: their names, and the check of one, which throws what is wrong.
std::string word_names();
void check_word(const std::string& name);

// ---- launches ----

struct Launch {
  dim3 grid, block;
  size_t dynamic_shared;
  unsigned cluster;
  bool programmatic;
};
// Launches are run in their order by synchronize, as those of one stream.
void launch(const std::string& name, const Launch& config, std::function<void()> kernel);
void synchronize();
// "route_order_kernel<float>" out of what the compiler calls launch<kernel>.
std::string kernel_name(const char* pretty_function);

// ---- words; one for each function of csrc/kernels/device ----

// An index, and where it was written.
struct Index {
  template <class T>
  Index(T i, Site site = Site::current()) : value(static_cast<int64_t>(i)), site(site) {}
  int64_t within(int count) const {
    if (value < 0 || value >= count) out_of_range(count);
    return value;
  }

 private:
  [[noreturn]] void out_of_range(int count) const;
  int64_t value;
  Site site;
};

uint32_t shared_address(const void* shared, const Site& site);
void* dynamic_shared(size_t bytes);
void* static_shared(const void* key, size_t bytes, size_t alignment);
void* cluster_shared(void* shared, unsigned rank, const Site& site);

// Alignment, range where it is known, and counting; then the caller moves the bytes.
void touch_global(const void* address, size_t bytes, bool writes, const Site& site);
void touch_shared(const void* address, size_t bytes, bool writes, const Site& site);
template <class T>
T load_global(const T* global, const Site& site) {
  touch_global(global, sizeof(T), false, site);
  return *global;
}
template <class T>
void store_global(T* global, T value, const Site& site) {
  touch_global(global, sizeof(T), true, site);
  *global = value;
}
template <class T>
T load_shared(const T* shared, const Site& site) {
  touch_shared(shared, sizeof(T), false, site);
  return *shared;
}
template <class T>
void store_shared(T* shared, T value, const Site& site) {
  touch_shared(shared, sizeof(T), true, site);
  *shared = value;
}
void red_add(float* global, float value, const Site& site);

void cp_async_16(void* shared, const void* global, int bytes, const Site& site);
void cp_async_commit(const Site& site);
void cp_async_wait(int pending, const Site& site);
void fence_proxy_async(const Site& site);

void named_barrier(int id, int threads, bool waits, const Site& site);
void mbarrier_init(void* barrier, int arrivals, const Site& site);
void fence_mbarrier_init(const Site& site);
void mbarrier_arrive(void* barrier, int expected_bytes, const Site& site);
void mbarrier_arrive_cluster(void* barrier, unsigned rank, const Site& site);
void mbarrier_wait(void* barrier, unsigned parity, const Site& site);
unsigned cluster_rank(const Site& site);
void cluster_arrive(const Site& site);
void cluster_wait(const Site& site);
void grid_dependency_wait(const Site& site);
void grid_launch_dependents(const Site& site);
void set_registers(int count, const Site& site);

TensorMap make_tensor_map(const void* data, int rank, const uint64_t* size, const uint64_t* stride,
                          const uint32_t* box, Swizzle swizzle);
void check_tensor_map(const TensorMap* map, const Site& site);
void tma_load(void* tile, const TensorMap* map, void* barrier, std::initializer_list<int> at, uint16_t blocks,
              const Site& site);
void tma_store(const TensorMap* map, const void* tile, std::initializer_list<int> at, const Site& site);
void tma_store_commit(const Site& site);
void tma_store_wait(int pending, const Site& site);

void ldmatrix_x4(uint32_t* registers, const void* row, bool transposed, const Site& site);
void stmatrix_x4(void* row, const uint32_t* registers, const Site& site);
uint32_t pack(bool is_bf16, float low, float high);
void mma_m16n8k16(bool is_bf16, float* d, const uint32_t* a, uint32_t b0, uint32_t b1, const Site& site);
void hold(const float* d, const Site& site);
void wgmma_fence(const Site& site);
void wgmma_commit(const Site& site);
void wgmma_wait(int pending, const Site& site);
// A from registers where a_registers is not null, by its descriptor otherwise.
void wgmma(bool is_bf16, int N, float* d, const uint32_t* a_registers, uint64_t a, bool a_mn_major,
           uint64_t b, bool b_mn_major, int accumulate, const Site& site);

}  // namespace emulator
}  // namespace flextron
