// head_attention_decode: a few queries a sequence against a cache. Two launches: every chunk of every
// sequence's keys attends by itself and leaves maximum, sum and output in float; then the chunks of a query
// are added in their order.
//
// A unit of work is (sequence, group, block of rows, chunk of keys). Its rows are the active heads of the
// group for each of the sequence's queries, so that keys and values are read once for all of them, and a head
// that is not active is no row. The grid is as large as the machine; blocks walk over the units, whose number
// they find out from the lengths and extents themselves. Neighbouring blocks have neighbouring groups of the
// same keys at the same time: what they read lies side by side.
#include <climits>

#include "kernels/arch.h"
#include "kernels/device/copy.cuh"
#include "kernels/device/launch.cuh"
#include "kernels/device/math.cuh"
#include "kernels/device/mma.cuh"
#include "kernels/device/sync.cuh"
#include "kernels/head_attention_cuda.h"

namespace flextron {
namespace {

constexpr int kWarps = 4, kThreads = 32 * kWarps;  // those that compute
constexpr int kStep = 64;                          // keys of a step of a block: 16 of each warp

// ---- chunks ----

// Keys of a chunk: a function of the sequence alone, so that its result is the same bit for bit in any batch.
//
// Powers of two times kStep: at most 16 chunks of 64 keys, then 32, from 16 K keys on 64. One sequence of 8
// groups and 4 K keys is then 256 units for 132 multiprocessors. A chunk's row is D + 4 floats, written and
// read once: with 4 rows a group and D = 128, 3 % of the bytes of 128 keys, at 512 keys 1 %; and the room
// that the host must reserve without knowing a length is 64 of them a row at most.
//
// Many queries are work enough for all multiprocessors without splitting.
constexpr int64_t kSplitQueries = 32;
FLEXTRON_HD int64_t keys_of_chunk(int64_t keys, int64_t queries) {
  int64_t chunk = kStep;
  while (keys > chunk * (queries > kSplitQueries ? 1 : chunk < 128 ? 16 : chunk < 512 ? 32 : 64)) chunk *= 2;
  return chunk;
}
int64_t most_chunks(int64_t keys, int64_t queries) {
  if (queries > kSplitQueries) return 1;
  const int64_t steps = (keys + kStep - 1) / kStep;
  const int64_t most = keys <= kStep * 16 ? 16 : keys <= 512 * 32 ? 32 : 64;
  return steps < 1 ? 1 : steps < most ? steps : most;
}

template <class scalar_t>
int64_t most_chunks(const HeadAttentionCall<scalar_t>& call) {
  return most_chunks(call.block_table ? call.columns * call.S : call.S, call.queries_each);
}

// What a chunk leaves of a row of [T, H]: maximum (of scores in base 2), sum, two that are not used, output.
struct Partials {
  int64_t chunks, pitch;

  template <class scalar_t>
  FLEXTRON_HD static Partials of(const HeadAttentionCall<scalar_t>& call, int64_t chunks) {
    return {chunks, 4 + (call.D + 3) / 4 * 4};
  }
  FLEXTRON_HD int64_t at(int64_t row, int64_t chunk) const { return (row * chunks + chunk) * pitch; }
};

// ---- units of work ----

struct Work {
  CallSequence s;
  int64_t groups, heads;  // that are active, and heads of each
  int64_t chunk, chunks;  // keys of a chunk; there is one where there are no keys, which writes zeros
};

__device__ __forceinline__ Work work_of(const AttentionCall& call, int64_t b) {
  Work work;
  work.s = sequence_of(call, b);
  const int64_t units = units_of(call, b, 0), keys = work.s.S - work.s.k_start;
  work.groups = call.by_group ? units : units > 0 ? call.G : 0;
  work.heads = call.by_group ? call.M : units;
  work.chunk = keys_of_chunk(keys, work.s.T);
  work.chunks = max((keys + work.chunk - 1) / work.chunk, int64_t{1});
  return work;
}

// Its rows are pairs of a query and one of `heads` heads, the heads of a query side by side.
struct Unit {
  CallSequence s;
  int64_t query, chunk, key;  // query of the first row; number of the chunk, and its first key
  int64_t chunk_keys;
  int chunks;       // of the sequence
  int heads, lead;  // of the group that are active; which of them the first row is
  int group, part;  // part: of the columns
  int rows, keys;   // keys that the last of its rows sees, the most of all; no rows: there are no more units

  __device__ __forceinline__ int64_t query_of(int r) const {
    return query + static_cast<unsigned>(lead + r) / static_cast<unsigned>(heads);
  }
  __device__ __forceinline__ int64_t t(int r) const { return s.query + query_of(r); }
  __device__ __forceinline__ int64_t head(int64_t M, int r) const {
    return group * M + static_cast<unsigned>(lead + r) % static_cast<unsigned>(heads);
  }
  // Keys of the chunk that row r sees.
  __device__ __forceinline__ int seen(bool causal, int r) const {
    return static_cast<int>(within(s.keys_end(causal, query_of(r)) - key, 0, chunk_keys));
  }
};

// This block's units of at most kRows rows, `parts` for each part of the columns. One warp walks over them,
// with a sequence a lane.
template <int kRows>
class Units {
 public:
  __device__ __forceinline__ Units(const AttentionCall& call, int parts) : call_(call), parts_(parts) {}

  // To the next unit with something to do, or to one without rows.
  __device__ __forceinline__ Unit next() {
    for (;;) {
      while (at_ >= end_of(31)) {
        at_ -= end_of(31);
        first_ += 32;
        if (first_ >= call_.B) return Unit{};
        count();
      }
      const Unit unit = find(at_);
      at_ += gridDim.x;
      if (unit.keys > 0 || unit.chunks == 1) return unit;
    }
  }

 private:
  __device__ __forceinline__ int64_t end_of(int lane) const { return __shfl_sync(~0u, end_, lane); }

  __device__ __forceinline__ void count() {
    const int lane = threadIdx.x % 32;
    end_ = 0;
    if (const int64_t b = int64_t{first_} + lane; b < call_.B) {
      const Work work = work_of(call_, b);
      end_ = work.groups * ((work.s.T * work.heads + kRows - 1) / kRows) * work.chunks * parts_;
    }
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const int64_t other = __shfl_up_sync(~0u, end_, distance);
      if (lane >= distance) end_ += other;
    }
  }

  __device__ __forceinline__ Unit find(int64_t number) const {
    const int b = __popc(__ballot_sync(~0u, end_ <= number));  // the first whose end is behind the unit
    number -= b > 0 ? end_of(b - 1) : 0;
    const Work work = work_of(call_, first_ + b);
    const int64_t rows = work.s.T * work.heads, blocks = (rows + kRows - 1) / kRows;
    Unit unit;
    unit.s = work.s;
    unit.chunks = static_cast<int>(work.chunks), unit.chunk_keys = work.chunk;
    unit.heads = static_cast<int>(work.heads);
    unit.part = static_cast<int>(number % parts_), number /= parts_;
    const int64_t row = number % blocks * kRows;
    number /= blocks;
    unit.query = row / work.heads, unit.lead = static_cast<int>(row % work.heads);
    unit.rows = static_cast<int>(min(int64_t{kRows}, rows - row));
    unit.group = static_cast<int>(number % work.groups);
    unit.chunk = number / work.groups;
    unit.key = work.s.k_start + unit.chunk * work.chunk;
    unit.keys = unit.seen(call_.causal, unit.rows - 1);
    return unit;
  }

  const AttentionCall& call_;
  const int parts_;
  int first_ = -32;                    // the first lane's sequence
  int64_t at_ = blockIdx.x, end_ = 0;  // counted from there: the unit; the units up to and with the lane's
};

// ---- what both kinds of arithmetic share ----

__device__ __forceinline__ float exp2_of(float x) { return exp2_approx(x); }
__device__ __forceinline__ double exp2_of(double x) { return exp2(x); }

template <class acc_t>
__device__ __forceinline__ acc_t lowest() {
  return -static_cast<acc_t>(INFINITY);
}

// What exponents are taken from: the maximum, where there is one.
template <class acc_t>
__device__ __forceinline__ acc_t base_of(acc_t maximum) {
  return maximum == lowest<acc_t>() ? acc_t(0) : maximum;
}

template <class scalar_t>
__device__ __forceinline__ accumulate_t<scalar_t> scale_of(const HeadAttentionCall<scalar_t>& call) {
  return call.scale * accumulate_t<scalar_t>(1.44269504088896340736);
}

// ---- 16-bit, D <= 128: tensor cores ----

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
              x = 8 * n + lane % 4 * 2 + i < keys ? x * scale : lowest<float>();
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
      const float divisor = total == 0 ? 1 : total;
      result = make_float4(result.x / divisor, result.y / divisor, result.z / divisor, result.w / divisor);
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

// ---- any type and head size ----

constexpr int kPlainRows = 16, kPlainKeys = 32, kPlainDepth = 32, kPlainColumns = kThreads;

template <class acc_t>
struct PlainShared {
  // One more: a column's elements are in different banks.
  acc_t q[kPlainRows][kPlainDepth + 1], k[kPlainKeys][kPlainDepth + 1], weight[kPlainKeys][kPlainRows + 1];
  acc_t shrink[kPlainRows], factor[kPlainRows];
  int64_t q_at[kPlainRows], row_at[kPlainRows];  // in q; in [T, H]
  int64_t k_at[kPlainKeys], v_at[kPlainKeys];
  Unit unit;  // at work; not in every thread's registers
};

// A unit has 128 columns of the output; a warp 4 rows of the scores, a lane one key; a thread one column.
template <class scalar_t>
__global__ __launch_bounds__(kThreads) void head_attention_decode_plain_kernel(
    const HeadAttentionCall<scalar_t> call, accumulate_t<scalar_t>* const partial, const Partials partials) {
  using acc_t = accumulate_t<scalar_t>;
  constexpr int kRowsOfWarp = kPlainRows / kWarps;
  auto& shared = static_shared<PlainShared<acc_t>>();
  const int lane = threadIdx.x % 32, first = threadIdx.x / 32 * kRowsOfWarp;
  const int parts = static_cast<int>((call.D + kPlainColumns - 1) / kPlainColumns);
  const acc_t scale = scale_of(call);

  grid_launch_dependents();
  Units<kPlainRows> units(call, parts);
  for (;; __syncthreads()) {
    if (threadIdx.x < 32) {
      const Unit next = units.next();
      if (lane == 0) shared.unit = next;
    }
    __syncthreads();
    const Unit& unit = shared.unit;
    if (unit.rows == 0) break;
    const int64_t column = int64_t{unit.part} * kPlainColumns + threadIdx.x;
    Registers<int, kRowsOfWarp> seen;
    Registers<acc_t, kRowsOfWarp> maximum, sum;
#pragma unroll
    for (int r = 0; r < kRowsOfWarp; ++r) {
      seen[r] = first + r < unit.rows ? unit.seen(call.causal, first + r) : 0;
      maximum[r] = lowest<acc_t>();
      sum[r] = 0;
    }
    Registers<acc_t, kPlainRows> out;
#pragma unroll
    for (int r = 0; r < kPlainRows; ++r) out[r] = 0;
    if (const int row = threadIdx.x; row < unit.rows) {
      const int64_t t = unit.t(row), head = unit.head(call.M, row);
      shared.q_at[row] = t * call.q_stride_t + head * call.q_stride_h;
      shared.row_at[row] = t * call.H + head;
    }

    for (int key = 0; key < unit.keys; key += kPlainKeys) {
      const int keys = min(unit.keys - key, kPlainKeys);
      if (const int j = threadIdx.x % kPlainKeys; threadIdx.x < 2 * kPlainKeys && j < keys) {
        const bool of_k = threadIdx.x < kPlainKeys;
        const auto& view = of_k ? call.k : call.v;
        (of_k ? shared.k_at : shared.v_at)[j] =
            unit.group * view.group_stride +
            key_offset(call, unit.s, unit.key + key + j, view.page_stride, view.key_stride);
      }
      Registers<acc_t, kRowsOfWarp> score;
#pragma unroll
      for (int r = 0; r < kRowsOfWarp; ++r) score[r] = 0;
      for (int64_t depth = 0; depth < call.D; depth += kPlainDepth) {
        __syncthreads();
        const bool there = depth + lane < call.D;
        for (int j = threadIdx.x / 32; j < kPlainKeys; j += kWarps)
          shared.k[j][lane] =
              j < keys && there ? acc_t(load_global(call.k.data + shared.k_at[j] + depth + lane)) : acc_t(0);
        for (int row = threadIdx.x / 32; row < kPlainRows; row += kWarps)
          shared.q[row][lane] = row < unit.rows && there
                                    ? acc_t(load_global(call.q + shared.q_at[row] + depth + lane))
                                    : acc_t(0);
        __syncthreads();
        Registers<acc_t, kRowsOfWarp> part;
#pragma unroll
        for (int r = 0; r < kRowsOfWarp; ++r) part[r] = 0;
#pragma unroll 4
        for (int d = 0; d < kPlainDepth; ++d) {
          const acc_t k = shared.k[lane][d];
#pragma unroll
          for (int r = 0; r < kRowsOfWarp; ++r) part[r] = std::fma(shared.q[first + r][d], k, part[r]);
        }
#pragma unroll
        for (int r = 0; r < kRowsOfWarp; ++r) score[r] += part[r];
      }
#pragma unroll
      for (int r = 0; r < kRowsOfWarp; ++r) {
        const acc_t x = key + lane < seen[r] ? score[r] * scale : lowest<acc_t>();
        acc_t top = x;
#pragma unroll
        for (int distance = 1; distance < 32; distance *= 2)
          top = fmax(top, __shfl_xor_sync(~0u, top, distance));
        top = fmax(top, maximum[r]);
        const acc_t base = base_of(top), shrink = exp2_of(maximum[r] - base), weight = exp2_of(x - base);
        maximum[r] = top;
        sum[r] = sum[r] * shrink + weight;
        shared.weight[lane][first + r] = weight;
        if (lane == 0) shared.shrink[first + r] = shrink;
      }
      __syncthreads();
      if (column < call.D) {
        Registers<acc_t, kPlainRows> part;
#pragma unroll
        for (int r = 0; r < kPlainRows; ++r) part[r] = 0;
#pragma unroll 1
        for (int j = 0; j < keys; ++j) {
          const acc_t v = acc_t(load_global(call.v.data + shared.v_at[j] + column));
#pragma unroll
          for (int r = 0; r < kPlainRows; ++r) part[r] = std::fma(shared.weight[j][r], v, part[r]);
        }
#pragma unroll
        for (int r = 0; r < kPlainRows; ++r) out[r] = std::fma(out[r], shared.shrink[r], part[r]);
      }
      __syncthreads();
    }

    const bool only = unit.chunks == 1;
#pragma unroll
    for (int r = 0; r < kRowsOfWarp; ++r) {
#pragma unroll
      for (int distance = 1; distance < 32; distance *= 2) sum[r] += __shfl_xor_sync(~0u, sum[r], distance);
      if (lane > 0 || first + r >= unit.rows) continue;
      shared.factor[first + r] = only && sum[r] != acc_t(0) ? acc_t(1) / sum[r] : acc_t(1);
      if (only || unit.part > 0) continue;
      acc_t* const to = partial + partials.at(shared.row_at[first + r], unit.chunk);
      store_global(to, maximum[r]);
      store_global(to + 1, sum[r]);
    }
    __syncthreads();
    if (column >= call.D) continue;
#pragma unroll
    for (int r = 0; r < kPlainRows; ++r) {
      if (r >= unit.rows) continue;
      const acc_t result = out[r] * shared.factor[r];
      const int64_t at = shared.row_at[r];
      if (only)
        store_global(call.out + at * call.D + column, scalar_t(result));
      else
        store_global(partial + partials.at(at, unit.chunk) + 4 + column, result);
    }
  }
}

// ---- chunks, added ----

// 16 bytes of sums.
template <class acc_t>
struct alignas(16) Wide {
  static constexpr int kCount = 16 / sizeof(acc_t);
  acc_t x[kCount];
};

constexpr int kCombineWarps = 8, kCombineThreads = 32 * kCombineWarps;

template <class acc_t>
struct CombineShared {
  Wide<acc_t> out[kCombineWarps][32];
  acc_t maximum[kCombineWarps], sum[kCombineWarps];
};

// A block owns a row; a warp an eighth of its chunks, all of which it asks for at once; a lane one of these
// chunks' shares, then neighbouring columns.
template <class scalar_t>
__global__ __launch_bounds__(kCombineThreads) void head_attention_decode_combine_kernel(
    const HeadAttentionCall<scalar_t> call, const accumulate_t<scalar_t>* const partial,
    const Partials partials) {
  using acc_t = accumulate_t<scalar_t>;
  using Sums = Wide<acc_t>;
  constexpr int kMost = 64 / kCombineWarps;  // chunks of a warp
  auto& shared = static_shared<CombineShared<acc_t>>();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  bool waited = false;
  for (int64_t row = blockIdx.x; row < call.T * call.H; row += gridDim.x) {
    const int64_t t = row / call.H, head = row % call.H, b = t / call.queries_each;
    if (!head_active(call, units_of(call, b, 0), head)) continue;
    const Work work = work_of(call, b);
    if (work.chunks == 1) continue;
    const int64_t keys = work.s.keys_end(call.causal, t - work.s.query) - work.s.k_start;
    const int chunks = static_cast<int>((max(keys, int64_t{0}) + work.chunk - 1) / work.chunk);
    const int each = (chunks + kCombineWarps - 1) / kCombineWarps, first = warp * each;
    const int mine = min(chunks - first, each);  // none: not above zero
    if (!waited) grid_dependency_wait();         // the lengths were there before
    waited = true;

    const acc_t* const from = partial + partials.at(row, first);
    acc_t share = lane < mine ? load_global(from + lane * partials.pitch) : lowest<acc_t>();
    acc_t sum = lane < mine ? load_global(from + lane * partials.pitch + 1) : acc_t(0);
    for (int64_t begin = 0; begin < call.D; begin += 32 * Sums::kCount) {
      const int64_t column = begin + lane * Sums::kCount;
      Registers<Sums, kMost> x;
#pragma unroll
      for (int chunk = 0; chunk < kMost; ++chunk)
        x[chunk] =
            chunk < mine && column < call.D
                ? load_global(reinterpret_cast<const Sums*>(from + chunk * partials.pitch + 4 + column))
                : Sums{};
      if (begin == 0) {
        acc_t maximum = share;
#pragma unroll
        for (int distance = 1; distance < 32; distance *= 2)
          maximum = fmax(maximum, __shfl_xor_sync(~0u, maximum, distance));
        share = exp2_of(share - base_of(maximum));
        sum *= share;
#pragma unroll
        for (int distance = 1; distance < 32; distance *= 2) sum += __shfl_xor_sync(~0u, sum, distance);
        if (lane == 0) shared.maximum[warp] = maximum, shared.sum[warp] = sum;
      }
      Sums out{};
#pragma unroll
      for (int chunk = 0; chunk < kMost; ++chunk) {
        const acc_t factor = __shfl_sync(~0u, share, chunk);
#pragma unroll
        for (int n = 0; n < Sums::kCount; ++n)
          if (chunk < mine) out.x[n] += factor * x[chunk].x[n];
      }
      store_shared(&shared.out[warp][lane], out);
      __syncthreads();

      // The warps' sums in their order, a column a thread.
      acc_t maximum = lowest<acc_t>(), total = 0, result = 0;
#pragma unroll
      for (int w = 0; w < kCombineWarps; ++w) maximum = fmax(maximum, shared.maximum[w]);
      const int place = threadIdx.x;
      if (place < 32 * Sums::kCount && begin + place < call.D) {
#pragma unroll
        for (int w = 0; w < kCombineWarps; ++w) {
          const acc_t factor = exp2_of(shared.maximum[w] - base_of(maximum));
          total += factor * shared.sum[w];
          result += factor * load_shared(&shared.out[w][0].x[0] + place);
        }
        const acc_t divisor = total == acc_t(0) ? acc_t(1) : total;
        store_global(call.out + row * call.D + begin + place, scalar_t(result / divisor));
      }
      __syncthreads();
    }
  }
  if (!waited) grid_dependency_wait();
}

// ---- launches ----

template <class scalar_t>
bool aligned(const KeyView<const scalar_t>& view) {
  return reinterpret_cast<uintptr_t>(view.data) % 16 == 0 && view.page_stride % 8 == 0 &&
         view.key_stride % 8 == 0 && view.group_stride % 8 == 0;
}

// As many blocks as share the multiprocessors, or fewer where there cannot be that many units.
template <class scalar_t>
dim3 grid_of(const HeadAttentionCall<scalar_t>& call, int64_t rows, int64_t parts, int64_t chunks,
             int blocks_each) {
  const int64_t heads = call.by_group ? call.M : call.heads, groups = call.by_group ? call.heads : call.G;
  const int64_t units = call.B * groups * ((call.queries_each * heads + rows - 1) / rows) * chunks * parts;
  return dim3(static_cast<unsigned>(within(units, 1, int64_t{multiprocessors()} * blocks_each)));
}

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

template <class scalar_t>
void run_tiles(const HeadAttentionCall<scalar_t>& call, float* partial, const Partials& partials,
               CUstream_st* stream) {
  if (!aligned(call.k) || !aligned(call.v))
    return run<scalar_t, 128, 2, false>(call, partial, partials, stream);
  const bool few = call.queries_each * (call.by_group ? call.M : call.heads) <= 16;
#define FLEXTRON_HEAD(size)                                            \
  if (call.D <= size)                                                  \
  return few ? run<scalar_t, size, 1>(call, partial, partials, stream) \
             : run<scalar_t, size, 2>(call, partial, partials, stream)
  FLEXTRON_HEAD(64);
  FLEXTRON_HEAD(80);
  FLEXTRON_HEAD(96);
  FLEXTRON_HEAD(128);
#undef FLEXTRON_HEAD
}

template <class scalar_t>
void run_plain(const HeadAttentionCall<scalar_t>& call, accumulate_t<scalar_t>* partial,
               const Partials& partials, CUstream_st* stream) {
  const int64_t parts = (call.D + kPlainColumns - 1) / kPlainColumns;
  launch<head_attention_decode_plain_kernel<scalar_t>>(
      {.grid = grid_of(call, kPlainRows, parts, partials.chunks, 8),
       .block = dim3(kThreads),
       .stream = stream},
      call, partial, partials);
}

}  // namespace

template <class scalar_t>
int64_t head_attention_decode_partial(const HeadAttentionCall<scalar_t>& call) {
  const int64_t chunks = most_chunks(call);
  return chunks == 1 ? 0 : call.T * call.H * chunks * Partials::of(call, chunks).pitch;
}

template <class scalar_t>
void head_attention_decode_cuda(const HeadAttentionCall<scalar_t>& call,
                                typename HeadAttentionCall<scalar_t>::acc_t* partial, CUstream_st* stream) {
  if (call.T == 0 || call.heads == 0) return;
  const auto partials = Partials::of(call, most_chunks(call));
  if constexpr (sizeof(scalar_t) == 2) {
    if (call.D <= 128)
      run_tiles(call, partial, partials, stream);
    else
      run_plain(call, partial, partials, stream);
  } else {
    run_plain(call, partial, partials, stream);
  }
  if (partials.chunks == 1) return;
  launch<head_attention_decode_combine_kernel<scalar_t>>(
      {.grid = dim3(static_cast<unsigned>(within(call.T * call.H, 1, int64_t{multiprocessors()} * 8))),
       .block = dim3(kCombineThreads),
       .stream = stream,
       .programmatic = cuda_arch() >= 90},
      call, partial, partials);
}

#define FLEXTRON_INSTANCES(scalar_t)                                                  \
  template int64_t head_attention_decode_partial(const HeadAttentionCall<scalar_t>&); \
  template void head_attention_decode_cuda(const HeadAttentionCall<scalar_t>&,        \
                                           HeadAttentionCall<scalar_t>::acc_t*, CUstream_st*)
FLEXTRON_INSTANCES(float);
FLEXTRON_INSTANCES(double);
FLEXTRON_INSTANCES(bf16);
FLEXTRON_INSTANCES(fp16);
#undef FLEXTRON_INSTANCES

}  // namespace flextron
