// head_attention_decode by the tensor cores: bf16 and fp16, D up to 128 (head_attention_decode_units.cuh).
#pragma once

#include <climits>

#include "kernels/device/copy.cuh"
#include "kernels/device/mma.cuh"
#include "kernels/device/sync.cuh"
#include "kernels/head_attention_decode_units.cuh"

namespace flextron {
namespace {

using namespace attention_decode;

// Piece `piece` (16 bytes) of a line of kPieces: eight that one access touches, of eight lines or of one,
// differ in their banks.
template <int kPieces>
__device__ __forceinline__ int place(int line, int piece) {
  constexpr int kTurns = kPieces % 8 == 0 ? 8 : kPieces % 4 == 0 ? 4 : 2, kLinesPerTurn = 8 / kTurns;
  return line * kPieces + (piece ^ (line / kLinesPerTurn % kTurns));
}

// Four neighbours of a row of out, of which the first `count` are there.
template <class scalar_t>
__device__ __forceinline__ void store_four(scalar_t* to, float4 x, int count) {
  const uint2 both = make_uint2(pack<scalar_t>(x.x, x.y), pack<scalar_t>(x.z, x.w));
  if (reinterpret_cast<uintptr_t>(to) % sizeof(uint2) == 0 && count >= 4) {
    store_global(reinterpret_cast<uint2*>(to), both);
    return;
  }
  auto* const each = reinterpret_cast<uint16_t*>(to);
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (i < count) store_global(each + i, static_cast<uint16_t>((i < 2 ? both.x : both.y) >> (i % 2 * 16)));
}

constexpr int kUnitsKept = 8;   // descriptions of units
constexpr int kRowsAtOnce = 8;  // that the warps add up
enum Barrier : int { kOfAll = 1, kOfWarps };

// Steps of a unit: as many for every warp, and one where there is no key.
__device__ __forceinline__ int steps_of(const Unit& unit) { return max((unit.keys + kStep - 1) / kStep, 1); }

// kHead: D and zeros behind it. A warp has 16 keys of each step and a ring of its own, which is filled across
// the ends of units: a block has 64 KiB under way, less what it computes with. Two blocks share a
// multiprocessor of 227 KiB; one fits into the 99 KiB of smaller GPUs.
template <int kHead, int kTiles>
struct Shared {
  static constexpr int kPieces = kHead / 8, kRows = 16 * kTiles;
  // With a warp that schedules two blocks are ten warps: a quarter of the multiprocessor's registers serves
  // three, and a thread has at most 168. Sums of two tiles need more: there the first warp schedules.
  static constexpr bool kOwnScheduler = kTiles == 1;
  static constexpr int kAllThreads = kThreads + (kOwnScheduler ? 32 : 0);
  static constexpr int kStages = kHead <= 64 ? 4 : kHead <= 80 ? 3 : 2;
  struct Stage {
    uint4 k[16 * kPieces], v[16 * kPieces];
  };
  Stage ring[kWarps][kStages];
  float out[kWarps][kRowsAtOnce][kHead + 8];  // rows begin 8 banks apart
  uint4 q[kRows * kPieces];
  int64_t at[kWarps][2][16];  // where the keys and the values of a warp's step lie
  float maximum[kWarps][kRowsAtOnce], sum[kWarps][kRowsAtOnce];
  Unit units[kUnitsKept];

  __device__ __forceinline__ Unit& unit(int number) { return units[number % kUnitsKept]; }
  __device__ __forceinline__ static void meet() { named_barrier_sync(kOfAll, kAllThreads); }
};

// What the warp that schedules does: it describes the block's units ahead of the copies, and brings q.
template <class scalar_t, int kHead, int kTiles>
struct Schedule {
  using Memory = Shared<kHead, kTiles>;
  static constexpr int kPieces = Memory::kPieces;
  // Copies are under way for kStages steps behind a unit at work, and the next step's place is looked up.
  static constexpr int kStepsAhead = Memory::kStages + 1;
  // While a unit is at work those that its successor needs are written.
  static_assert(kStepsAhead + 2 <= kUnitsKept);

  const HeadAttentionCall<scalar_t>& call;
  Memory& shared;
  const bool q_aligned;
  const int lane = threadIdx.x % 32;
  Units<Memory::kRows> units{call, 1};
  int described = 0, steps = 0;  // units; their steps behind the unit that comes next

  __device__ __forceinline__ void describe() {
    for (; steps < kStepsAhead; ++described) {
      const Unit unit = units.next();
      steps = unit.rows > 0 ? steps + steps_of(unit) : INT_MAX;  // nothing comes behind the last
      if (lane == 0) shared.unit(described) = unit;
    }
    __syncwarp();
  }
  // What is described reaches far enough behind this unit.
  __device__ __forceinline__ void describe_behind(const Unit& unit) {
    if (steps < INT_MAX) steps -= steps_of(unit);
    describe();
  }

  // Piece i of q, zeros behind the unit's rows.
  __device__ __forceinline__ uint4 load_q(const Unit& unit, int i) const {
    const int row = i / kPieces, piece = i % kPieces;
    if (row >= unit.rows) return make_uint4(0, 0, 0, 0);
    const scalar_t* const from =
        call.q + unit.t(row) * call.q_stride_t + unit.head(call.M, row) * call.q_stride_h + 8 * piece;
    const int count = static_cast<int>(call.D) - 8 * piece;
    return q_aligned && count >= 8 ? load_global(reinterpret_cast<const uint4*>(from))
                                   : gathered(from, count);
  }
  __device__ __forceinline__ void store_q(int i, uint4 piece) {
    store_shared(&shared.q[place<kPieces>(i / kPieces, i % kPieces)], piece);
  }

  // The whole of q by kBy threads, of which this is number `thread`.
  template <int kBy>
  struct Pieces {
    static constexpr int kAll = Memory::kRows * kPieces, kEach = (kAll + kBy - 1) / kBy;
    Registers<uint4, kEach> q;
    __device__ __forceinline__ void load(const Schedule& from, const Unit& unit, int thread) {
#pragma unroll
      for (int i = 0; i < kEach; ++i) q[i] = from.load_q(unit, thread + kBy * i);
    }
    __device__ __forceinline__ void store(Schedule& to, int thread) {
#pragma unroll
      for (int i = 0; i < kEach; ++i)
        if (kAll % kBy == 0 || thread + kBy * i < kAll) to.store_q(thread + kBy * i, q[i]);
    }
  };
};

// A warp's part of the units: 16 keys of every step.
template <class scalar_t, int kHead, int kTiles, bool kAligned>
struct Attend {
  using Memory = Shared<kHead, kTiles>;
  static constexpr int kPieces = Memory::kPieces, kStages = Memory::kStages;
  static constexpr bool kKeepQ = kTiles == 1 && kHead < 128;  // else there are no registers for q

  const HeadAttentionCall<scalar_t>& call;
  Memory& shared;
  const int warp = threadIdx.x / 32;
  int lane = threadIdx.x % 32;
  int stage = 0;                         // of the step at work
  int copied_unit = 0, copied_step = 0;  // what is asked for next
  int64_t next;                          // where this lane's key (lanes 0 .. 15) or value of it lies
  Registers<Registers<float, 2>, kTiles> maximum, sum;
  Registers<Registers<Registers<float, 4>, kHead / 8>, kTiles> out;

  __device__ __forceinline__ int key_of(int step) const { return kStep * step + 16 * warp; }

  __device__ __forceinline__ int64_t offset() const {
    const Unit& unit = shared.unit(copied_unit);
    const int key = key_of(copied_step) + lane % 16;
    if (key >= unit.keys) return 0;
    const auto& view = lane < 16 ? call.k : call.v;
    return key_offset(call, unit.s, unit.key + key, view.page_stride, view.key_stride);
  }

  __device__ __forceinline__ void fetch(uint4* to, const KeyView<const scalar_t>& view, const int64_t* at,
                                        const Unit& unit) const {
    const int keys = unit.keys - key_of(copied_step), D = static_cast<int>(call.D);
    const scalar_t* const from = view.data + unit.group * view.group_stride;
#pragma unroll
    for (int i = 0; i < kPieces / 2; ++i) {
      const int key = (lane + 32 * i) / kPieces, piece = (lane + 32 * i) % kPieces;
      const int count = key < keys ? min(max(D - 8 * piece, 0), 8) : 0;
      const scalar_t* const source = from + load_shared(at + key) + 8 * piece;
      if constexpr (kAligned)
        cp_async_16(to + place<kPieces>(key, piece), source, count * 2);
      else
        store_shared(to + place<kPieces>(key, piece), gathered(source, count));
    }
  }
  __device__ __forceinline__ void fetch_keys() {
    if (const Unit& unit = shared.unit(copied_unit); unit.rows > 0) {
      store_shared(&shared.at[warp][lane / 16][lane % 16], next);
      __syncwarp();
      fetch(shared.ring[warp][stage].k, call.k, shared.at[warp][0], unit);
    }
    cp_async_commit();
  }
  // Of the same step; then on to the next.
  __device__ __forceinline__ void fetch_values() {
    if (const Unit& unit = shared.unit(copied_unit); unit.rows > 0) {
      fetch(shared.ring[warp][stage].v, call.v, shared.at[warp][1], unit);
      if (++copied_step == steps_of(unit)) ++copied_unit, copied_step = 0;
      next = offset();
    }
    cp_async_commit();
  }
  __device__ __forceinline__ void advance() { stage = stage + 1 == kStages ? 0 : stage + 1; }

  __device__ __forceinline__ void begin() {
    next = offset();
    for (int step = 0; step < kStages; ++step) {
      fetch_keys();
      fetch_values();
      advance();
      __syncwarp();
    }
  }

  __device__ __forceinline__ void load_q(Registers<uint32_t, 4>& a, int tile, int sixteen) const {
    ldmatrix_x4(a, &shared.q[place<kPieces>(16 * tile + lane % 16, 2 * sixteen + lane / 16)]);
  }

  // After q is there.
  __device__ __forceinline__ void compute(const Unit& unit) {
    Registers<Registers<uint32_t, 4>, kKeepQ ? kHead / 16 : 1> q;
    if constexpr (kKeepQ)
#pragma unroll
      for (int d = 0; d < kHead / 16; ++d) load_q(q[d], 0, d);
    Registers<Registers<int, 2>, kTiles> seen;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = 16 * tile + 8 * half + lane / 4;
        seen[tile][half] = row < unit.rows ? unit.seen(call.causal, row) : 0;
        maximum[tile][half] = lowest<float>();
        sum[tile][half] = 0;
      }
#pragma unroll
      for (int n = 0; n < kHead / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) out[tile][n][i] = 0;
    }
    const float scale = scale_of(call);
    const int steps = steps_of(unit);
#pragma unroll 1
    for (int step = 0; step < steps; ++step, advance()) {
      if constexpr (kTiles > 1)
        forget(lane);  // places in the ring would stay in registers, of which none is left
      const auto& tiles = shared.ring[warp][stage];
      Registers<Registers<Registers<float, 4>, 2>, kTiles> score;
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
        for (int n = 0; n < 2; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) score[tile][n][i] = 0;
      cp_async_wait<2 * kStages - 1>();
      __syncwarp();
#pragma unroll
      for (int d = 0; d < kHead / 16; ++d) {
        Registers<uint32_t, 4> b;
        ldmatrix_x4(b, &tiles.k[place<kPieces>(lane / 16 * 8 + lane % 8, 2 * d + lane / 8 % 2)]);
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          Registers<uint32_t, 4> a;
          if constexpr (kKeepQ)
            a = q[d];
          else
            load_q(a, tile, d);
          mma_m16n8k16<scalar_t>(score[tile][0], a, b[0], b[1]);
          mma_m16n8k16<scalar_t>(score[tile][1], a, b[2], b[3]);
        }
      }
      __syncwarp();
      fetch_keys();

      if (call.softcap != 0) {
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
          for (int n = 0; n < 2; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) score[tile][n][i] = tanh_approx(score[tile][n][i] * call.cap_scale);
      }
      Registers<Registers<uint32_t, 4>, kTiles> weight;
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int keys = seen[tile][half] - key_of(step);
          float top = lowest<float>();
#pragma unroll
          for (int n = 0; n < 2; ++n)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              float& x = score[tile][n][2 * half + i];
              x = sees(keys, 8 * n + lane % 4 * 2 + i, call.window) ? x * scale : lowest<float>();
              top = fmaxf(top, x);
            }
          top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
          top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
          top = fmaxf(top, maximum[tile][half]);
          const float base = base_of(top), shrink = exp2_approx(maximum[tile][half] - base);
          maximum[tile][half] = top;
          sum[tile][half] *= shrink;
#pragma unroll
          for (int n = 0; n < 2; ++n) {
            const float low = exp2_approx(score[tile][n][2 * half] - base);
            const float high = exp2_approx(score[tile][n][2 * half + 1] - base);
            sum[tile][half] += low + high;
            weight[tile][2 * n + half] = pack<scalar_t>(low, high);
          }
#pragma unroll
          for (int n = 0; n < kHead / 8; ++n)
#pragma unroll
            for (int i = 0; i < 2; ++i) out[tile][n][2 * half + i] *= shrink;
        }

      cp_async_wait<2 * kStages - 1>();
      __syncwarp();
#pragma unroll
      for (int d = 0; d < kHead / 16; ++d) {
        Registers<uint32_t, 4> b;
        ldmatrix_x4_trans(b, &tiles.v[place<kPieces>(lane / 8 % 2 * 8 + lane % 8, 2 * d + lane / 16)]);
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          mma_m16n8k16<scalar_t>(out[tile][2 * d], weight[tile], b[0], b[1]);
          mma_m16n8k16<scalar_t>(out[tile][2 * d + 1], weight[tile], b[2], b[3]);
        }
      }
      __syncwarp();
      fetch_values();
    }
  }

  // Eight rows, for the other warps.
  __device__ __forceinline__ void put(int tile, int half) {
    const int row = lane / 4;
    float total = sum[tile][half];
    total += __shfl_xor_sync(~0u, total, 1);
    total += __shfl_xor_sync(~0u, total, 2);
    if (lane % 4 == 0) {
      store_shared(&shared.maximum[warp][row], maximum[tile][half]);
      store_shared(&shared.sum[warp][row], total);
    }
#pragma unroll
    for (int n = 0; n < kHead / 8; ++n)
      store_shared(reinterpret_cast<float2*>(&shared.out[warp][row][8 * n + lane % 4 * 2]),
                   make_float2(out[tile][n][2 * half], out[tile][n][2 * half + 1]));
  }

  // What the warps have put of row first + r, r < 8; a lane has four of its columns.
  __device__ __forceinline__ void add_up(const Unit& unit, int first, int r, float* partial,
                                         const Partials& partials) const {
    Registers<float, kWarps> share;
    float highest = lowest<float>(), total = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      share[w] = load_shared(&shared.maximum[w][r]);
      highest = fmaxf(highest, share[w]);
    }
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      share[w] = exp2_approx(share[w] - base_of(highest));
      total += share[w] * load_shared(&shared.sum[w][r]);
    }
    float4 result = make_float4(0, 0, 0, 0);
    if (const int column = 4 * lane; column < call.D) {
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        const float4 x = load_shared(reinterpret_cast<const float4*>(&shared.out[w][r][column]));
        result.x += share[w] * x.x, result.y += share[w] * x.y;
        result.z += share[w] * x.z, result.w += share[w] * x.w;
      }
    }
    const int64_t at = unit.t(first + r) * call.H + unit.head(call.M, first + r);
    const int count = static_cast<int>(call.D) - 4 * lane;
    if (unit.chunks == 1) {
      const float kept = with_sink(call, unit.head(call.M, first + r), highest, total);
      const float divisor = total == 0 ? 1 : total;
      result = make_float4(result.x * kept / divisor, result.y * kept / divisor, result.z * kept / divisor,
                           result.w * kept / divisor);
      if (count > 0) store_four(call.out + at * call.D + 4 * lane, result, count);
    } else {
      float* const to = partial + partials.at(at, unit.chunk);
      if (count > 0) store_global(reinterpret_cast<float4*>(to + 4) + lane, result);
      if (lane == 0) store_global(reinterpret_cast<float2*>(to), make_float2(highest, total));
    }
  }

  // From its first barrier on no warp reads q. The caller's is the last.
  __device__ __forceinline__ void finish(const Unit& unit, float* partial, const Partials& partials) {
#pragma unroll
    for (int first = 0; first < Memory::kRows; first += kRowsAtOnce) {
      if (first >= unit.rows) continue;
      if (first > 0) named_barrier_sync(kOfWarps, kThreads);
      put(first / 16, first / kRowsAtOnce % 2);
      if (first == 0)
        Memory::meet();
      else
        named_barrier_sync(kOfWarps, kThreads);
      for (int r = warp; r < min(kRowsAtOnce, unit.rows - first); r += kWarps)
        add_up(unit, first, r, partial, partials);
    }
  }
};

template <class scalar_t, int kHead, int kTiles, bool kAligned>
__global__ __launch_bounds__((Shared<kHead, kTiles>::kAllThreads),
                             2) void head_attention_decode_kernel(const HeadAttentionCall<scalar_t> call,
                                                                  float* const partial,
                                                                  const Partials partials, bool q_aligned) {
  using Memory = Shared<kHead, kTiles>;
  auto& shared = dynamic_shared<Memory>();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  grid_launch_dependents();
  using Scheduler = Schedule<scalar_t, kHead, kTiles>;
  Scheduler schedule{call, shared, q_aligned};
  if (Memory::kOwnScheduler && warp == kWarps) {  // the barriers are those below
    schedule.describe();
    Memory::meet();
    typename Scheduler::template Pieces<32> q;
    q.load(schedule, shared.unit(0), lane);
    q.store(schedule, lane);
    schedule.describe_behind(shared.unit(0));
    Memory::meet();
    for (int number = 0; shared.unit(number).rows > 0; ++number) {
      const Unit& next = shared.unit(number + 1);
      q.load(schedule, next, lane);
      schedule.describe_behind(next);
      Memory::meet();
      q.store(schedule, lane);
      Memory::meet();
    }
    return;
  }

  // Without a scheduler: q by all threads, then the first warp describes.
  const auto prepare = [&](int number) {
    if (Memory::kOwnScheduler) return;
    const Unit& next = shared.unit(number);
    typename Scheduler::template Pieces<kThreads> q;
    q.load(schedule, next, threadIdx.x);
    q.store(schedule, threadIdx.x);
    if (warp == 0) schedule.describe_behind(next);
  };
  Attend<scalar_t, kHead, kTiles, kAligned> attend{call, shared};
  if (!Memory::kOwnScheduler && warp == 0) schedule.describe();
  Memory::meet();
  attend.begin();
  prepare(0);
  Memory::meet();
  for (int number = 0; shared.unit(number).rows > 0; ++number) {
    const Unit& unit = shared.unit(number);
    attend.compute(unit);
    attend.finish(unit, partial, partials);
    prepare(number + 1);
    Memory::meet();
  }
}

// ---- launches ----

template <class scalar_t, int kHead, int kTiles, bool kAligned = true>
void run(const HeadAttentionCall<scalar_t>& call, float* partial, const Partials& partials,
         CUstream_st* stream) {
  using Memory = Shared<kHead, kTiles>;
  static_assert(sizeof(Memory) <= 99 * 1024);
  const bool q_aligned =
      reinterpret_cast<uintptr_t>(call.q) % 16 == 0 && call.q_stride_t % 8 == 0 && call.q_stride_h % 8 == 0;
  const int blocks_each = cuda_arch() >= 90 ? 2 : 1;
  launch<head_attention_decode_kernel<scalar_t, kHead, kTiles, kAligned>>(
      {.grid = grid_of(call, Memory::kRows, 1, partials.chunks, blocks_each),
       .block = dim3(Memory::kAllThreads),
       .stream = stream,
       .dynamic_shared = sizeof(Memory)},
      call, partial, partials, q_aligned);
}

}  // namespace

template <class scalar_t, int kTiles>
void attention_decode::attend_by_tiles(const HeadAttentionCall<scalar_t>& call, float* partial,
                                       const Partials& partials, CUstream_st* stream) {
  if constexpr (kTiles == 2)
    if (!aligned(call.k) || !aligned(call.v))
      return run<scalar_t, 128, 2, false>(call, partial, partials, stream);
  if (call.D <= 64) return run<scalar_t, 64, kTiles>(call, partial, partials, stream);
  if (call.D <= 80) return run<scalar_t, 80, kTiles>(call, partial, partials, stream);
  if (call.D <= 96) return run<scalar_t, 96, kTiles>(call, partial, partials, stream);
  run<scalar_t, 128, kTiles>(call, partial, partials, stream);
}

#define FLEXTRON_HEAD_ATTENTION_DECODE_TILES(scalar_t, tiles)       \
  template void attention_decode::attend_by_tiles<scalar_t, tiles>( \
      const HeadAttentionCall<scalar_t>&, float*, const attention_decode::Partials&, CUstream_st*);

}  // namespace flextron
