// head_attention_decode: a few queries a sequence against a cache. Two launches: every chunk of every
// sequence's keys attends by itself and leaves maximum, sum and output in float; then the chunks of a query
// are added in their order.
//
// A unit of work is (sequence, group, block of rows, chunk of keys). Its rows are the active heads of the
// group for each of the sequence's queries, so that keys and values are read once for all of them, and a head
// that is not active is no row. The grid is as large as the machine; blocks walk over the units, whose number
// they find out from the lengths and extents themselves.
#include "kernels/arch.h"
#include "kernels/device/copy.cuh"
#include "kernels/device/launch.cuh"
#include "kernels/device/math.cuh"
#include "kernels/device/mma.cuh"
#include "kernels/device/sync.cuh"
#include "kernels/head_attention_cuda.h"

namespace flextron {
namespace {

constexpr int kWarps = 4, kThreads = 32 * kWarps;
constexpr int kStep = 64;  // keys of a step of a block: 16 of each warp

// ---- chunks ----

// Keys of a chunk: a function of the sequence alone, so that its result is the same bit for bit in any batch.
//
// Powers of two times kStep such that there are at most 32 chunks, from 16 K keys on at most 64. One sequence
// of 8 groups and 4 K keys is then 256 units for 132 multiprocessors. A chunk's row is D + 4 floats, written
// and read once: with 4 rows a group and D = 128, 3 % of the bytes of 128 keys, at 512 keys 1 %; and the room
// that the host must reserve without knowing a length is 64 of them a row at most.
//
// Many queries are work enough for all multiprocessors without splitting.
constexpr int64_t kSplitQueries = 32;
FLEXTRON_HD int64_t keys_of_chunk(int64_t keys, int64_t queries) {
  int64_t chunk = kStep;
  while (keys > chunk * (queries > kSplitQueries ? 1 : chunk < 512 ? 32 : 64)) chunk *= 2;
  return chunk;
}
int64_t most_chunks(int64_t keys, int64_t queries) {
  if (queries > kSplitQueries) return 1;
  const int64_t steps = (keys + kStep - 1) / kStep, most = keys <= 512 * 32 ? 32 : 64;
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

struct Unit {
  Work work;
  int64_t group, row;  // first of its rows: head row % heads of query row / heads
  int64_t chunk, key;  // number, and its first key
  int rows, keys;      // keys that the last of its rows sees, the most of all
  int part;            // of the columns

  __device__ __forceinline__ int64_t query(int r) const { return (row + r) / work.heads; }
  __device__ __forceinline__ int64_t t(int r) const { return work.s.query + query(r); }
  __device__ __forceinline__ int64_t head(int64_t M, int r) const {
    return group * M + (row + r) % work.heads;
  }
  // Keys of the chunk that row r sees.
  __device__ __forceinline__ int seen(bool causal, int r) const {
    return static_cast<int>(within(work.s.keys_end(causal, query(r)) - key, 0, work.chunk));
  }
};

struct Strip {
  int64_t end[kThreads];  // units of this strip's sequences up to and with each
  int64_t of_warp[kWarps];
  Unit unit;  // at work; not in every thread's registers
};

// Calls body(unit) for this block's units of at most kRows rows, `parts` for each part of the columns;
// a barrier after each.
template <int kRows, class Body>
__device__ __forceinline__ void for_each_unit(const AttentionCall& call, int parts, Strip& strip,
                                              const Body& body) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int64_t at = blockIdx.x, before = 0;
  for (int64_t first = 0; first < call.B; first += kThreads) {
    int64_t sum = 0;
    if (const int64_t b = first + threadIdx.x; b < call.B) {
      const Work work = work_of(call, b);
      sum = work.groups * ((work.s.T * work.heads + kRows - 1) / kRows) * work.chunks * parts;
    }
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const int64_t other = __shfl_up_sync(~0u, sum, distance);
      if (lane >= distance) sum += other;
    }
    if (lane == 31) strip.of_warp[warp] = sum;
    __syncthreads();
    for (int w = 0; w < warp; ++w) sum += strip.of_warp[w];
    strip.end[threadIdx.x] = sum;
    __syncthreads();
    for (; at < before + strip.end[kThreads - 1]; at += gridDim.x) {
      if (threadIdx.x == 0) {
        int b = 0;  // the first whose end is behind the unit
        for (int half = kThreads / 2; half > 0; half /= 2)
          if (strip.end[b + half - 1] <= at - before) b += half;
        int64_t number = at - before - (b > 0 ? strip.end[b - 1] : 0);
        Unit unit;
        unit.work = work_of(call, first + b);
        const int64_t rows = unit.work.s.T * unit.work.heads, blocks = (rows + kRows - 1) / kRows;
        unit.part = static_cast<int>(number % parts), number /= parts;
        unit.row = number % blocks * kRows, number /= blocks;
        unit.group = number % unit.work.groups;
        unit.chunk = number / unit.work.groups;
        unit.key = unit.work.s.k_start + unit.chunk * unit.work.chunk;
        unit.rows = static_cast<int>(min(int64_t{kRows}, rows - unit.row));
        unit.keys = unit.seen(call.causal, unit.rows - 1);
        strip.unit = unit;
      }
      __syncthreads();
      if (strip.unit.keys > 0 || strip.unit.work.chunks == 1) body(strip.unit);
      __syncthreads();
    }
    before += strip.end[kThreads - 1];
    __syncthreads();
  }
}

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

// kHead: D and zeros behind it. A warp has 16 keys of each step and a ring of its own: it waits for no other
// until the chunk ends. Three blocks of 64 KiB share a multiprocessor of 227 KiB; each has three quarters of
// its ring in flight.
template <int kHead, int kTiles>
struct Shared {
  static constexpr int kPieces = kHead / 8, kRows = 16 * kTiles;
  static constexpr int kStages = kHead <= 64 ? 4 : kHead <= 80 ? 3 : 2;
  struct Stage {
    uint4 k[16 * kPieces], v[16 * kPieces];
  };
  union {
    Stage ring[kStages];
    float out[kRows][kHead + 8];  // rows begin 8 banks apart
  } warp[kWarps];
  uint4 q[kRows * kPieces];
  int64_t at[kWarps][2][16];  // where the keys and the values of a warp's step lie
  float maximum[kWarps][kRows], sum[kWarps][kRows];
  Strip strip;
};

// A warp's part of a unit: 16 keys of every step.
template <class scalar_t, int kHead, int kTiles, bool kAligned>
struct Attend {
  using Memory = Shared<kHead, kTiles>;
  static constexpr int kPieces = Memory::kPieces, kStages = Memory::kStages;
  // Else there are no registers for q.
  static constexpr bool kKeepQ = kTiles == 1 && kHead < 128;

  const HeadAttentionCall<scalar_t>& call;
  Memory& shared;
  const Unit& unit;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int steps;
  int64_t next;  // where this lane's key (lanes 0 .. 15) or value of the next step lies
  Registers<Registers<int, 2>, kTiles> seen;
  Registers<Registers<float, 2>, kTiles> maximum, sum;
  Registers<Registers<Registers<float, 4>, kHead / 8>, kTiles> out;
  Registers<Registers<uint32_t, 4>, kKeepQ ? kHead / 16 : 1> q;

  __device__ __forceinline__ Attend(const HeadAttentionCall<scalar_t>& call_, Memory& shared_,
                                    const Unit& unit_)
      : call(call_), shared(shared_), unit(unit_) {
    steps = (max(unit.keys - 16 * warp, 0) + kStep - 1) / kStep;
    next = offset(0);
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = 16 * tile + 8 * half + lane / 4;
        seen[tile][half] = row < unit.rows ? unit.seen(call.causal, row) : 0;
        maximum[tile][half] = lowest<float>();
        sum[tile][half] = 0;
      }
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
      for (int n = 0; n < kHead / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) out[tile][n][i] = 0;
  }

  __device__ __forceinline__ int key_of(int step) const { return kStep * step + 16 * warp; }

  __device__ __forceinline__ int64_t offset(int step) const {
    const int key = key_of(step) + lane % 16;
    if (key >= unit.keys) return 0;
    const auto& view = lane < 16 ? call.k : call.v;
    return key_offset(call, unit.work.s, unit.key + key, view.page_stride, view.key_stride);
  }

  __device__ __forceinline__ void fetch(uint4* to, const KeyView<const scalar_t>& view, const int64_t* at,
                                        int step) const {
    const int keys = unit.keys - key_of(step), D = static_cast<int>(call.D);
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
  __device__ __forceinline__ void fetch_keys(int step) {
    if (step < steps) {
      store_shared(&shared.at[warp][lane / 16][lane % 16], next);
      __syncwarp();
      next = offset(step + 1);
      fetch(shared.warp[warp].ring[step % kStages].k, call.k, shared.at[warp][0], step);
    }
    cp_async_commit();
  }
  __device__ __forceinline__ void fetch_values(int step) {
    if (step < steps) fetch(shared.warp[warp].ring[step % kStages].v, call.v, shared.at[warp][1], step);
    cp_async_commit();
  }

  __device__ __forceinline__ void begin() {
    for (int step = 0; step < kStages; ++step) {
      fetch_keys(step);
      fetch_values(step);
      __syncwarp();
    }
  }

  __device__ __forceinline__ void load_q(Registers<uint32_t, 4>& a, int tile, int sixteen) const {
    ldmatrix_x4(a, &shared.q[place<kPieces>(16 * tile + lane % 16, 2 * sixteen + lane / 16)]);
  }

  // After q is there.
  __device__ __forceinline__ void run() {
    if constexpr (kKeepQ)
#pragma unroll
      for (int d = 0; d < kHead / 16; ++d) load_q(q[d], 0, d);
    const float scale = scale_of(call);
    for (int step = 0; step < steps; ++step) {
      const auto& stage = shared.warp[warp].ring[step % kStages];
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
        ldmatrix_x4(b, &stage.k[place<kPieces>(lane / 16 * 8 + lane % 8, 2 * d + lane / 8 % 2)]);
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
      fetch_keys(step + kStages);

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
        ldmatrix_x4_trans(b, &stage.v[place<kPieces>(lane / 8 % 2 * 8 + lane % 8, 2 * d + lane / 16)]);
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          mma_m16n8k16<scalar_t>(out[tile][2 * d], weight[tile], b[0], b[1]);
          mma_m16n8k16<scalar_t>(out[tile][2 * d + 1], weight[tile], b[2], b[3]);
        }
      }
      __syncwarp();
      fetch_values(step + kStages);
    }
  }

  // Into the warp's own ring, which it is done with.
  __device__ __forceinline__ void put() {
    cp_async_wait<0>();
    __syncwarp();
    auto& to = shared.warp[warp].out;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = 16 * tile + 8 * half + lane / 4;
        float total = sum[tile][half];
        total += __shfl_xor_sync(~0u, total, 1);
        total += __shfl_xor_sync(~0u, total, 2);
        if (lane % 4 == 0) {
          store_shared(&shared.maximum[warp][row], maximum[tile][half]);
          store_shared(&shared.sum[warp][row], total);
        }
#pragma unroll
        for (int n = 0; n < kHead / 8; ++n)
          store_shared(reinterpret_cast<float2*>(&to[row][8 * n + lane % 4 * 2]),
                       make_float2(out[tile][n][2 * half], out[tile][n][2 * half + 1]));
      }
  }
};

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

template <class scalar_t, int kHead, int kTiles, bool kAligned>
__global__ __launch_bounds__(kThreads, kTiles == 1 ? 3 : 2) void head_attention_decode_kernel(
    const HeadAttentionCall<scalar_t> call, float* const partial, const Partials partials, bool q_aligned) {
  using Memory = Shared<kHead, kTiles>;
  auto& shared = dynamic_shared<Memory>();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for_each_unit<Memory::kRows>(call, 1, shared.strip, [&](const Unit& unit) {
    Attend<scalar_t, kHead, kTiles, kAligned> attend(call, shared, unit);
    attend.begin();
    for (int i = threadIdx.x; i < Memory::kRows * Memory::kPieces; i += kThreads) {
      const int row = i / Memory::kPieces, piece = i % Memory::kPieces;
      uint4 value = make_uint4(0, 0, 0, 0);
      if (row < unit.rows) {
        const scalar_t* const from =
            call.q + unit.t(row) * call.q_stride_t + unit.head(call.M, row) * call.q_stride_h + 8 * piece;
        const int count = static_cast<int>(call.D) - 8 * piece;
        value = q_aligned && count >= 8 ? load_global(reinterpret_cast<const uint4*>(from))
                                        : gathered(from, count);
      }
      store_shared(&shared.q[place<Memory::kPieces>(row, piece)], value);
    }
    __syncthreads();
    attend.run();
    attend.put();
    __syncthreads();

    // A warp adds up a row, a lane four of its columns.
    for (int row = warp; row < unit.rows; row += kWarps) {
      Registers<float, kWarps> share;
      float maximum = lowest<float>(), sum = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        share[w] = load_shared(&shared.maximum[w][row]);
        maximum = fmaxf(maximum, share[w]);
      }
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        share[w] = exp2_approx(share[w] - base_of(maximum));
        sum += share[w] * load_shared(&shared.sum[w][row]);
      }
      float4 out = make_float4(0, 0, 0, 0);
      if (const int column = 4 * lane; column < call.D) {
#pragma unroll
        for (int w = 0; w < kWarps; ++w) {
          const float4 x = load_shared(reinterpret_cast<const float4*>(&shared.warp[w].out[row][column]));
          out.x += share[w] * x.x, out.y += share[w] * x.y;
          out.z += share[w] * x.z, out.w += share[w] * x.w;
        }
      }
      const int64_t at = unit.t(row) * call.H + unit.head(call.M, row);
      const int count = static_cast<int>(call.D) - 4 * lane;
      if (unit.work.chunks == 1) {
        const float divisor = sum == 0 ? 1 : sum;
        out = make_float4(out.x / divisor, out.y / divisor, out.z / divisor, out.w / divisor);
        if (count > 0) store_four(call.out + at * call.D + 4 * lane, out, count);
      } else {
        float* const to = partial + partials.at(at, unit.chunk);
        if (count > 0) store_global(reinterpret_cast<float4*>(to + 4) + lane, out);
        if (lane == 0) store_global(reinterpret_cast<float2*>(to), make_float2(maximum, sum));
      }
    }
  });
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
  Strip strip;
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

  for_each_unit<kPlainRows>(call, parts, shared.strip, [&](const Unit& unit) {
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
            key_offset(call, unit.work.s, unit.key + key + j, view.page_stride, view.key_stride);
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

    const bool only = unit.work.chunks == 1;
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
    if (column >= call.D) return;
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
  });
}

// ---- chunks, added ----

// 16 bytes of sums.
template <class acc_t>
struct alignas(16) Wide {
  static constexpr int kCount = 16 / sizeof(acc_t);
  acc_t x[kCount];
};

// A warp owns a row, in turns: a lane up to two chunks' shares, then neighbouring columns.
template <class scalar_t>
__global__ __launch_bounds__(kThreads) void head_attention_decode_combine_kernel(
    const HeadAttentionCall<scalar_t> call, const accumulate_t<scalar_t>* const partial,
    const Partials partials) {
  using acc_t = accumulate_t<scalar_t>;
  using Sums = Wide<acc_t>;
  constexpr int kAhead = 64 / sizeof(acc_t);  // chunks asked for before the first is used
  const int lane = threadIdx.x % 32;
  bool waited = false;
  for (int64_t row = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32; row < call.T * call.H;
       row += int64_t{gridDim.x} * kWarps) {
    const int64_t t = row / call.H, head = row % call.H, b = t / call.queries_each;
    if (!head_active(call, units_of(call, b, 0), head)) continue;
    const Work work = work_of(call, b);
    if (work.chunks == 1) continue;
    const int64_t keys = work.s.keys_end(call.causal, t - work.s.query) - work.s.k_start;
    const int chunks = static_cast<int>((max(keys, int64_t{0}) + work.chunk - 1) / work.chunk);
    if (!waited) grid_dependency_wait();  // the lengths were there before
    waited = true;

    const acc_t* const from = partial + partials.at(row, 0);
    Registers<acc_t, 2> share, sums;
    acc_t maximum = lowest<acc_t>(), sum = 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int chunk = 32 * half + lane;
      share[half] = chunk < chunks ? load_global(from + chunk * partials.pitch) : lowest<acc_t>();
      sums[half] = chunk < chunks ? load_global(from + chunk * partials.pitch + 1) : acc_t(0);
      maximum = fmax(maximum, share[half]);
    }
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2)
      maximum = fmax(maximum, __shfl_xor_sync(~0u, maximum, distance));
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      share[half] = exp2_of(share[half] - base_of(maximum));
      sum += share[half] * sums[half];
    }
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) sum += __shfl_xor_sync(~0u, sum, distance);
    const acc_t divisor = sum == acc_t(0) ? acc_t(1) : sum;

    for (int64_t begin = 0; begin < call.D; begin += 32 * Sums::kCount) {
      const int64_t column = begin + lane * Sums::kCount;
      Sums out{};
      for (int chunk = 0; chunk < chunks; chunk += kAhead) {
        Registers<Sums, kAhead> x;
#pragma unroll
        for (int a = 0; a < kAhead; ++a)
          x[a] = chunk + a < chunks && column < call.D
                     ? load_global(
                           reinterpret_cast<const Sums*>(from + (chunk + a) * partials.pitch + 4 + column))
                     : Sums{};
#pragma unroll
        for (int a = 0; a < kAhead; ++a) {
          const acc_t factor = __shfl_sync(~0u, chunk < 32 ? share[0] : share[1], (chunk + a) % 32);
#pragma unroll
          for (int n = 0; n < Sums::kCount; ++n)
            if (chunk + a < chunks) out.x[n] += factor * x[a].x[n];
        }
      }
#pragma unroll
      for (int n = 0; n < Sums::kCount; ++n)
        if (column + n < call.D)
          store_global(call.out + row * call.D + column + n, scalar_t(out.x[n] / divisor));
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
  const bool q_aligned =
      reinterpret_cast<uintptr_t>(call.q) % 16 == 0 && call.q_stride_t % 8 == 0 && call.q_stride_h % 8 == 0;
  const int blocks_each = kTiles == 1 && cuda_arch() >= 90 ? 3 : 2;
  launch<head_attention_decode_kernel<scalar_t, kHead, kTiles, kAligned>>(
      {.grid = grid_of(call, Memory::kRows, 1, partials.chunks, blocks_each),
       .block = dim3(kThreads),
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
  const int64_t blocks = (call.T * call.H + kWarps - 1) / kWarps;
  launch<head_attention_decode_combine_kernel<scalar_t>>(
      {.grid = dim3(static_cast<unsigned>(within(blocks, 1, int64_t{multiprocessors()} * 8))),
       .block = dim3(kThreads),
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
