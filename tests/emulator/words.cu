// Every word of csrc/kernels/device at work on numbers whose results are exact (small integers), so that the
// emulator, a GPU and a plain loop must agree bit for bit, whatever order hardware adds in.
#include <cstdio>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/types.h"
#include "emulator/both.h"
#include "kernels/device/copy.cuh"
#include "kernels/device/mma.cuh"
#include "kernels/device/tma.cuh"
#include "kernels/device/wgmma.cuh"

namespace flextron {
namespace {

// Whole numbers in [-4, 4], the same for every run.
template <class scalar_t>
void fill(Buffer<scalar_t>& values, unsigned seed) {
  for (size_t i = 0; i < values.size(); ++i) {
    seed = seed * 1664525u + 1013904223u;
    values[i] = scalar_t(static_cast<float>(static_cast<int>(seed >> 20) % 9 - 4));
  }
}

void expect(const std::string& what, size_t i, double got, double wanted) {
  if (got != wanted)
    throw std::runtime_error(what + ": element " + std::to_string(i) + " must be " + std::to_string(wanted) +
                             ", got " + std::to_string(got));
}

struct alignas(1024) Shared {
  unsigned char tile[3][64 * 256 * 2];
  Mbarrier landed, empty;
};
static_assert(sizeof(Shared) <= 227 * 1024);

LaunchConfig one_block(unsigned threads) {
  return {.grid = {1}, .block = {threads}, .stream = nullptr, .dynamic_shared = sizeof(Shared)};
}

// ---- a warp's matrices ----

// y[16, 8] = a[16, 16] b^T, with b[8, 16], or b[16, 8] read transposed.
template <class scalar_t, bool transposed>
__global__ void mma_kernel(const scalar_t* a, const scalar_t* b, float* y) {
  auto& shared = dynamic_shared<Shared>();
  auto* left = reinterpret_cast<scalar_t*>(shared.tile[0]);
  auto* right = reinterpret_cast<scalar_t*>(shared.tile[1]);
  const int lane = static_cast<int>(threadIdx.x);
  for (int i = lane; i < 256; i += 32) left[i] = a[i];
  for (int i = lane; i < 128; i += 32) right[i] = b[i];
  __syncwarp();
  Registers<uint32_t, 4> fragment_a, fragment_b;
  ldmatrix_x4(fragment_a, left + lane % 16 * 16 + lane / 16 * 8);
  if (transposed)
    ldmatrix_x4_trans(fragment_b, right + lane % 16 * 8);
  else
    ldmatrix_x4(fragment_b, right + lane % 8 * 16 + lane / 8 % 2 * 8);
  Registers<float, 4> d{};
  mma_m16n8k16<scalar_t>(d, fragment_a, fragment_b[0], fragment_b[1]);
  for (int i = 0; i < 4; ++i) y[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = d[i];
}

template <class scalar_t, bool transposed>
void check_mma() {
  Buffer<scalar_t> a(256), b(128);
  Buffer<float> y(128, -1.0f);
  fill(a, 1);
  fill(b, 2);
  launch<mma_kernel<scalar_t, transposed>>(one_block(32), a.data(), b.data(), y.data());
  finish();
  for (size_t i = 0; i < 128; ++i) {
    float sum = 0;
    for (size_t k = 0; k < 16; ++k)
      sum += float(a[i / 8 * 16 + k]) * float(transposed ? b[k * 8 + i % 8] : b[i % 8 * 16 + k]);
    expect("mma", i, y[i], sum);
  }
}

__global__ void stmatrix_kernel(uint16_t* y) {
  auto& shared = dynamic_shared<Shared>();
  auto* rows = reinterpret_cast<uint16_t*>(shared.tile[0]);
  const uint32_t lane = threadIdx.x;
  Registers<uint32_t, 4> r;
  for (uint32_t b = 0; b < 4; ++b) {
    const uint32_t first =
        b * 64 + lane / 4 * 8 + lane % 4 * 2;  // element (lane / 4, 2 (lane % 4)) of block b
    r[b] = first | (first + 1) << 16;
  }
  stmatrix_x4(rows + lane * 8, r);
  __syncwarp();
  for (uint32_t i = lane; i < 256; i += 32) y[i] = rows[i];
}

void check_stmatrix() {
  Buffer<uint16_t> y(256);
  launch<stmatrix_kernel>(one_block(32), y.data());
  finish();
  for (size_t i = 0; i < 256; ++i) expect("stmatrix", i, y[i], static_cast<double>(i));
}

template <class scalar_t>
__global__ void pack_kernel(const float* x, uint32_t* y, int count) {
  for (int i = static_cast<int>(threadIdx.x); i < count; i += 32)
    y[i] = pack<scalar_t>(x[i], x[count - 1 - i]);
}

template <class scalar_t>
void check_pack() {
  constexpr int kCount = 4096;
  Buffer<float> x(kCount);
  Buffer<uint32_t> y(kCount);
  for (uint32_t i = 0; i < kCount; ++i)
    x[i] = bits_as<float>(i * 1048583u + i);  // every exponent, both signs
  launch<pack_kernel<scalar_t>>(one_block(32), x.data(), y.data(), kCount);
  finish();
  const auto rounded = [](float value) {
    return value != value ? uint32_t{0x7fff} : uint32_t{scalar_t(value).bits};
  };
  for (size_t i = 0; i < kCount; ++i)
    expect("pack", i, y[i], rounded(x[i]) | rounded(x[kCount - 1 - i]) << 16);
}

// ---- threads ----

__global__ void lanes_kernel(int* y) {
  const int lane = static_cast<int>(threadIdx.x);
  y[lane] = __shfl_sync(~0u, lane * 3, 5);
  y[32 + lane] = __shfl_up_sync(~0u, lane * 3, 4, 16);
  y[64 + lane] = __shfl_down_sync(~0u, lane * 3, 4, 16);
  y[96 + lane] = __shfl_xor_sync(~0u, lane * 3, 9);
  y[128 + lane] = static_cast<int>(__ballot_sync(~0u, lane % 3 == 0));
  y[160 + lane] = __any_sync(~0u, lane == 40) + 2 * __all_sync(~0u, lane < 32);
}

void check_lanes() {
  Buffer<int> y(192);
  launch<lanes_kernel>(one_block(32), y.data());
  finish();
  uint32_t thirds = 0;
  for (uint32_t lane = 0; lane < 32; lane += 3) thirds |= 1u << lane;
  for (int lane = 0; lane < 32; ++lane) {
    const auto at = [&](int i) { return static_cast<size_t>(32 * i + lane); };
    expect("shfl", at(0), y[at(0)], 15);
    expect("shfl_up", at(1), y[at(1)], 3 * (lane % 16 < 4 ? lane : lane - 4));
    expect("shfl_down", at(2), y[at(2)], 3 * (lane % 16 >= 12 ? lane : lane + 4));
    expect("shfl_xor", at(3), y[at(3)], 3 * (lane ^ 9));
    expect("ballot", at(4), y[at(4)], static_cast<int>(thirds));
    expect("any, all", at(5), y[at(5)], 2);
  }
}

// Warp 0 hands numbers to warp 1 with one barrier and takes the buffer back with another.
__global__ void named_barrier_kernel(int* y) {
  auto& shared = dynamic_shared<Shared>();
  auto* numbers = reinterpret_cast<int*>(shared.tile[0]);
  const int lane = static_cast<int>(threadIdx.x % 32);
  for (int round = 0; round < 4; ++round) {
    if (threadIdx.x < 32) {
      if (round > 0) named_barrier_sync(2, 64);
      numbers[lane] = 100 * round + lane;
      named_barrier_arrive(1, 64);
    } else {
      named_barrier_sync(1, 64);
      y[32 * round + lane] = numbers[31 - lane];
      if (round < 3) named_barrier_arrive(2, 64);
    }
  }
}

void check_named_barriers() {
  Buffer<int> y(128);
  launch<named_barrier_kernel>(one_block(64), y.data());
  finish();
  for (int i = 0; i < 128; ++i)
    expect("named barrier", static_cast<size_t>(i), y[static_cast<size_t>(i)], 100 * (i / 32) + 31 - i % 32);
}

__global__ void reduce_kernel(float* sum, int* count) {
  red_add(sum, static_cast<float>(threadIdx.x));
  atomicAdd(count, 1);
}

void check_reduce() {
  Buffer<float> sum(1);
  Buffer<int> count(1);
  launch<reduce_kernel>(one_block(96), sum.data(), count.data());
  finish();
  expect("red_add", 0, sum[0], 95 * 96 / 2);
  expect("atomicAdd", 0, count[0], 96);
}

// ---- copies ----

__global__ void partial_copy_kernel(const uint8_t* x, uint8_t* y) {
  auto& shared = dynamic_shared<Shared>();
  if (threadIdx.x <= 16) cp_async_16(shared.tile[0] + 16 * threadIdx.x, x, static_cast<int>(threadIdx.x));
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  for (unsigned i = threadIdx.x; i < 17 * 16; i += 32) y[i] = shared.tile[0][i];
}

void check_partial_copy() {
  Buffer<uint8_t> x(16), y(17 * 16, 9);
  for (size_t i = 0; i < 16; ++i) x[i] = static_cast<uint8_t>(i + 1);
  launch<partial_copy_kernel>(one_block(32), x.data(), y.data());
  finish();
  for (size_t i = 0; i < y.size(); ++i)
    expect("cp.async", i, y[i], i % 16 < i / 16 ? static_cast<double>(i % 16 + 1) : 0);
}

// One box of a 3-d tensor, at coordinates that leave it on every side, as it lies in shared memory; and out
// again, to the same place of another tensor, where it begins inside.
__global__ void box_kernel(const __grid_constant__ TensorMap from, const __grid_constant__ TensorMap to,
                           uint16_t* y, int bytes, int at_x, int at_y, int at_z) {
  auto& shared = dynamic_shared<Shared>();
  if (threadIdx.x == 0) {
    prefetch_tensor_map(from);
    mbarrier_init(shared.landed, 1);
    fence_mbarrier_init();
    mbarrier_arrive_expect(shared.landed, bytes);
    tma_load_3d(shared.tile[0], from, shared.landed, at_x, at_y, at_z);
  }
  __syncthreads();
  mbarrier_wait(shared.landed, 0);
  const auto* held = reinterpret_cast<const uint16_t*>(shared.tile[0]);
  for (int i = static_cast<int>(threadIdx.x); i < bytes / 2; i += 32) y[i] = held[i];
  if (threadIdx.x == 0 && at_x >= 0 && at_y >= 0 && at_z >= 0) {
    tma_store_3d(to, shared.tile[0], at_x, at_y, at_z);
    tma_store_commit();
    tma_store_wait<0>();
  }
}

void check_box(Swizzle swizzle, uint32_t width, int at_x, int at_y, int at_z) {
  constexpr uint32_t kX = 40, kY = 7, kZ = 3, kPitch = 48;  // elements; rows are kPitch apart
  const uint32_t box[3] = {width, 5, 2};
  const size_t count = box[0] * box[1] * box[2];
  Buffer<uint16_t> from(kPitch * kY * kZ), to(from.size()), y(count);
  for (size_t i = 0; i < from.size(); ++i) from[i] = static_cast<uint16_t>(i + 1);
  const auto map = [&](Buffer<uint16_t>& data) {
    return make_tensor_map(
        TensorShape<3>{
            data.data(), {kX, kY, kZ}, {2 * kPitch, 2 * kPitch * kY}, {box[0], box[1], box[2]}, swizzle},
        true);
  };
  launch<box_kernel>(one_block(32), map(from), map(to), y.data(), static_cast<int>(2 * count), at_x, at_y,
                     at_z);
  finish();
  Buffer<uint16_t> written(to.size());
  for (size_t i = 0; i < count; ++i) {
    const int64_t x = at_x + static_cast<int64_t>(i % box[0]),
                  row = at_y + static_cast<int64_t>(i / box[0] % box[1]),
                  z = at_z + static_cast<int64_t>(i / box[0] / box[1]);
    const bool inside = x >= 0 && x < kX && row >= 0 && row < kY && z >= 0 && z < kZ;
    const auto place = static_cast<size_t>((z * kY + row) * kPitch + x);
    expect("box in shared memory", i, y[swizzled(static_cast<uint32_t>(2 * i), swizzle) / 2],
           inside ? from[place] : 0);
    if (inside && at_x >= 0 && at_y >= 0 && at_z >= 0) written[place] = from[place];
  }
  for (size_t i = 0; i < to.size(); ++i) expect("box stored", i, to[i], written[i]);
}

void check_boxes() {
  for (const auto& [swizzle, width] :
       {std::pair{Swizzle::kNone, 24u}, {Swizzle::k32, 16u}, {Swizzle::k64, 32u}, {Swizzle::k128, 64u}})
    for (const auto& [x, y, z] : {std::array{0, 0, 0}, {-8, -2, -1}, {32, 4, 2}, {8, 1, 1}, {104, 0, 0}})
      check_box(swizzle, width, x, y, z);
}

// ---- clusters ----

// Block r loads half r of the tile into both blocks, each waits for both halves, then reads the other's
// memory.
__global__ void cluster_kernel(const __grid_constant__ TensorMap map, float* y) {
  auto& shared = dynamic_shared<Shared>();
  auto* tile = reinterpret_cast<bf16*>(shared.tile[0]);
  const unsigned rank = cluster_rank();
  if (threadIdx.x == 0) {
    mbarrier_init(shared.landed, 1);
    mbarrier_init(shared.empty, 2);
    fence_mbarrier_init();
    mbarrier_arrive_expect(shared.landed, 2 * 32 * 64 * 2);
  }
  cluster_arrive();
  cluster_wait();
  if (threadIdx.x == 0)
    tma_load_2d_multicast(tile + rank * 32 * 64, map, shared.landed, 0, static_cast<int>(rank * 32), 3);
  mbarrier_wait(shared.landed, 0);
  const auto* others = cluster_shared(tile, rank ^ 1);
  y[blockIdx.x * 32 + threadIdx.x] =
      static_cast<float>(tile[threadIdx.x * 65]) + static_cast<float>(others[threadIdx.x]);
  __syncwarp();
  if (threadIdx.x < 2) mbarrier_arrive_cluster(shared.empty, threadIdx.x);
  mbarrier_wait(shared.empty, 0);
  cluster_arrive();
  cluster_wait();
}

void check_cluster() {
  Buffer<bf16> x(64 * 64);
  Buffer<float> y(128, -1.0f);
  fill(x, 3);
  LaunchConfig config = one_block(32);
  config.grid = {4};
  config.cluster = 2;
  launch<cluster_kernel>(
      config, make_tensor_map(TensorShape<2>{x.data(), {64, 64}, {128}, {64, 32}, Swizzle::kNone}, true),
      y.data());
  finish();
  for (size_t i = 0; i < 128; ++i)
    expect("cluster", i, y[i], static_cast<float>(x[i % 32 * 65]) + static_cast<float>(x[i % 32]));
}

// ---- a warpgroup's matrices ----

// How an operand of `rows` (M or N) x 64 (K) lies in shared memory.
struct Layout {
  Major major;
  Swizzle swizzle;
};

// Boxes of one swizzle width each (16 bytes without swizzle), one after another, make any of the canonical
// layouts.
struct Boxes {
  uint32_t leading, stride;  // of the descriptor
  int across, count, bytes;  // elements of a box's inner side; boxes; bytes of each
};
__device__ __host__ constexpr Boxes boxes_of(Layout layout, int rows) {
  const int width = static_cast<int>(swizzle_mask(layout.swizzle)) + 16, across = width / 2;
  const auto group = static_cast<uint32_t>(8 * width);  // 8 rows of a box
  if (layout.major == Major::kK)
    return {static_cast<uint32_t>(width * rows), group, across, 64 / across, width * rows};
  const auto box = static_cast<uint32_t>(width * 64);
  const bool plain = layout.swizzle == Swizzle::kNone;
  return {plain ? group : box, plain ? box : group, across, rows / across, width * 64};
}
// Where the k-th 16 of K begin: for K-major further along a box's rows, or in a later box.
__device__ __host__ constexpr int step_of(Layout layout, int rows, int k) {
  const Boxes boxes = boxes_of(layout, rows);
  if (layout.major == Major::kMN) return k * 16 * 2 * boxes.across;
  return 16 * k / boxes.across * boxes.bytes + 2 * (16 * k % boxes.across);
}

template <class scalar_t, int N, Major major_a, Swizzle swizzle_a, Major major_b, Swizzle swizzle_b,
          bool a_in_registers>
__global__ void wgmma_kernel(const __grid_constant__ TensorMap map_a, const __grid_constant__ TensorMap map_b,
                             const scalar_t* a, float* y) {
  auto& shared = dynamic_shared<Shared>();
  constexpr Layout layout_a{major_a, swizzle_a}, layout_b{major_b, swizzle_b};
  constexpr Boxes boxes_a = boxes_of(layout_a, 64), boxes_b = boxes_of(layout_b, N);
  if (threadIdx.x == 0) {
    mbarrier_init(shared.landed, 1);
    fence_mbarrier_init();
    mbarrier_arrive_expect(shared.landed, boxes_a.count * boxes_a.bytes + boxes_b.count * boxes_b.bytes);
    for (int i = 0; i < boxes_a.count; ++i)
      tma_load_2d(shared.tile[0] + i * boxes_a.bytes, map_a, shared.landed, i * boxes_a.across, 0);
    for (int i = 0; i < boxes_b.count; ++i)
      tma_load_2d(shared.tile[1] + i * boxes_b.bytes, map_b, shared.landed, i * boxes_b.across, 0);
  }
  __syncthreads();
  mbarrier_wait(shared.landed, 0);
  const int lane = static_cast<int>(threadIdx.x % 32),
            row = static_cast<int>(threadIdx.x / 32) * 16 + lane / 4;
  Registers<float, N / 2> d;
  for (int i = 0; i < N / 2; ++i) d[i] = 1000;  // the first wgmma leaves it out
  Registers<uint32_t, 4> fragments[4];
  for (int k = 0; k < 4; ++k)
    for (int r = 0; r < 4; ++r) {
      const scalar_t* pair = a + (row + r % 2 * 8) * 64 + 16 * k + r / 2 * 8 + lane % 4 * 2;
      fragments[k][r] = pair[0].bits | static_cast<uint32_t>(pair[1].bits) << 16;
    }
  hold(d);
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const uint64_t left = wgmma_descriptor(shared.tile[0] + step_of(layout_a, 64, k), layout_a.swizzle,
                                           boxes_a.leading, boxes_a.stride);
    const uint64_t right = wgmma_descriptor(shared.tile[1] + step_of(layout_b, N, k), layout_b.swizzle,
                                            boxes_b.leading, boxes_b.stride);
    if constexpr (a_in_registers)
      wgmma<scalar_t, N, major_b>(d, fragments[k], right, k > 0);
    else
      wgmma<scalar_t, N, major_a, major_b>(d, left, right, k > 0);
  }
  wgmma_commit();
  wgmma_wait<0>();
  hold(d);
  for (int i = 0; i < N / 2; ++i) y[(row + i / 2 % 2 * 8) * N + i / 4 * 8 + lane % 4 * 2 + i % 2] = d[i];
}

// rows x 64 in K-major, or its transpose in memory.
template <class scalar_t>
TensorMap operand_map(Buffer<scalar_t>& x, int rows, Layout layout) {
  const Boxes boxes = boxes_of(layout, rows);
  const auto inner = static_cast<uint64_t>(layout.major == Major::kK ? 64 : rows);
  const auto outer = static_cast<uint64_t>(layout.major == Major::kK ? rows : 64);
  return make_tensor_map(TensorShape<2>{x.data(),
                                        {inner, outer},
                                        {2 * inner},
                                        {static_cast<uint32_t>(boxes.across), static_cast<uint32_t>(outer)},
                                        layout.swizzle},
                         std::is_same_v<scalar_t, bf16>);
}

template <class scalar_t, int N, Major major_a, Swizzle swizzle_a, Major major_b, Swizzle swizzle_b,
          bool a_in_registers = false>
void check_wgmma() {
  constexpr Layout layout_a{major_a, swizzle_a}, layout_b{major_b, swizzle_b};
  Buffer<scalar_t> a(64 * 64), b(static_cast<size_t>(N) * 64), plain_a(64 * 64);
  Buffer<float> y(static_cast<size_t>(64) * N, -1.0f);
  fill(a, 4);
  fill(b, 5);
  const auto at = [](const Buffer<scalar_t>& x, size_t rows, size_t row, size_t k, Layout layout) {
    return float(layout.major == Major::kK ? x[row * 64 + k] : x[k * rows + row]);
  };
  for (size_t i = 0; i < plain_a.size(); ++i) plain_a[i] = scalar_t(at(a, 64, i / 64, i % 64, layout_a));
  launch<wgmma_kernel<scalar_t, N, major_a, swizzle_a, major_b, swizzle_b, a_in_registers>>(
      one_block(128), operand_map(a, 64, layout_a), operand_map(b, N, layout_b), plain_a.data(), y.data());
  finish();
  for (size_t i = 0; i < y.size(); ++i) {
    float sum = 0;
    for (size_t k = 0; k < 64; ++k) sum += at(a, 64, i / N, k, layout_a) * at(b, N, i % N, k, layout_b);
    expect("wgmma, N = " + std::to_string(N), i, y[i], sum);
  }
}

constexpr Major kK = Major::kK, kMN = Major::kMN;
constexpr Swizzle k0 = Swizzle::kNone, k32 = Swizzle::k32, k64 = Swizzle::k64, k128 = Swizzle::k128;

// ---- the table ----

struct Word {
  const char* name;
  std::function<void()> check;
};

const std::vector<Word>& words() {
  static const std::vector<Word> table{
      {"mma_bf16", check_mma<bf16, false>},
      {"mma_fp16", check_mma<fp16, false>},
      {"ldmatrix_trans", check_mma<bf16, true>},
      {"stmatrix", check_stmatrix},
      {"pack_bf16", check_pack<bf16>},
      {"pack_fp16", check_pack<fp16>},
      {"lanes", check_lanes},
      {"named_barriers", check_named_barriers},
      {"reduce", check_reduce},
      {"partial_copy", check_partial_copy},
      {"boxes", check_boxes},
      {"cluster", check_cluster},
      {"wgmma_n8", check_wgmma<bf16, 8, kK, k128, kK, k128>},
      {"wgmma_n16", check_wgmma<fp16, 16, kK, k128, kK, k128>},
      {"wgmma_n32", check_wgmma<bf16, 32, kK, k128, kK, k128>},
      {"wgmma_n64", check_wgmma<bf16, 64, kK, k128, kK, k128>},
      {"wgmma_n128", check_wgmma<fp16, 128, kK, k128, kK, k128>},
      {"wgmma_n256", check_wgmma<bf16, 256, kK, k128, kK, k128>},
      {"wgmma_registers", check_wgmma<bf16, 128, kK, k128, kK, k128, true>},
      {"wgmma_registers_columns", check_wgmma<fp16, 64, kK, k128, kMN, k128, true>},
      {"wgmma_registers_columns_n96", check_wgmma<bf16, 96, kK, k128, kMN, k64, true>},
      {"wgmma_columns_b", check_wgmma<bf16, 128, kK, k128, kMN, k128>},
      {"wgmma_columns_both", check_wgmma<bf16, 256, kMN, k128, kMN, k128>},
      {"wgmma_swizzle_64", check_wgmma<bf16, 64, kK, k64, kMN, k64>},
      {"wgmma_swizzle_32", check_wgmma<bf16, 64, kK, k32, kMN, k32>},
      {"wgmma_no_swizzle", check_wgmma<bf16, 64, kK, k0, kMN, k0>},
  };
  return table;
}

}  // namespace

#ifdef FLEXTRON_EMULATE
namespace emulator {

std::string word_names() {
  std::string json = "[";
  for (const Word& word : words()) json += std::string(json.size() > 1 ? ", " : "") + "\"" + word.name + "\"";
  return json + "]";
}

void check_word(const std::string& name) {
  for (const Word& word : words())
    if (name == word.name) return word.check();
  throw std::runtime_error("emulator: there is no word named " + name);
}

}  // namespace emulator
#endif

}  // namespace flextron

#ifndef FLEXTRON_EMULATE
// On a GPU: a line for each; fails where one does.
int main() {
  int wrong = 0;
  for (const auto& word : flextron::words()) {
    std::string verdict = "equal bit for bit";
    try {
      word.check();
    } catch (const std::exception& error) {
      verdict = error.what();
      ++wrong;
    }
    std::printf("%-28s %s\n", word.name, verdict.c_str());
  }
  return wrong != 0;
}
#endif
