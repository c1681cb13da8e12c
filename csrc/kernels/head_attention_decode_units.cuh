// What head_attention_decode's kernels on GPUs share. Two launches: every chunk of every sequence's keys
// attends by itself and leaves maximum, sum and output in float; then the chunks of a query are added in
// their order.
//
// A unit of work is (sequence, group, block of rows, chunk of keys). Its rows are the active heads of the
// group for each of the sequence's queries, so that keys and values are read once for all of them, and a head
// that is not active is no row. The grid is as large as the machine; blocks walk over the units, whose number
// they find out from the lengths and extents themselves. Neighbouring blocks have neighbouring groups of the
// same keys at the same time: what they read lies side by side.
//
// 16-bit types of D up to 128 are head_attention_decode_tiles.cuh's, the others and the sum of the chunks
// head_attention_decode_cuda.cu's.
#pragma once

#include "kernels/arch.h"
#include "kernels/device/launch.cuh"
#include "kernels/device/math.cuh"
#include "kernels/head_attention_cuda.h"

namespace flextron {
namespace attention_decode {

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
inline int64_t most_chunks(int64_t keys, int64_t queries) {
  if (queries > kSplitQueries) return 1;
  const int64_t steps = (keys + kStep - 1) / kStep;
  const int64_t most = keys <= kStep * 16 ? 16 : keys <= 512 * 32 ? 32 : 64;
  return steps < 1 ? 1 : steps < most ? steps : most;
}

template <class scalar_t>
int64_t most_chunks(const HeadAttentionCall<scalar_t>& call) {
  const int64_t room = call.block_table ? call.columns * call.S : call.S;
  return most_chunks(within(room, 0, call.window + call.queries_each - 1), call.queries_each);
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
  // Where the keys that row r sees end, counted from the chunk's first: behind the chunk's last, perhaps.
  __device__ __forceinline__ int seen(bool causal, int r) const {
    return static_cast<int>(max(s.keys_end(causal, query_of(r)) - key, int64_t{0}));
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
    unit.keys = static_cast<int>(min(int64_t{unit.seen(call_.causal, unit.rows - 1)}, unit.chunk_keys));
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

// What products are times, or with a softcap their tanh, to be scores in powers of two.
template <class scalar_t>
__device__ __forceinline__ accumulate_t<scalar_t> scale_of(const HeadAttentionCall<scalar_t>& call) {
  using acc_t = accumulate_t<scalar_t>;
  return (call.softcap == acc_t(0) ? call.scale : call.softcap) * acc_t(1.44269504088896340736);
}

// A row's maximum and sum with its head's sink, if there is one; returns what its output is to be multiplied
// with before it is divided by the sum.
template <class scalar_t, class acc_t>
__device__ __forceinline__ acc_t with_sink(const HeadAttentionCall<scalar_t>& call, int64_t head,
                                           acc_t& maximum, acc_t& sum) {
  if (call.sinks == nullptr) return 1;
  const acc_t sink = load_global(call.sinks + head) * acc_t(1.44269504088896340736);
  return add_sink(sink, maximum, sum, [](acc_t x) { return exp2_of(x); });
}

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

// Every chunk by the tensor cores: bf16 and fp16, D up to 128; kTiles tiles of 16 rows a unit. Each type and
// number of tiles is compiled in a file of its own.
template <class scalar_t, int kTiles>
void attend_by_tiles(const HeadAttentionCall<scalar_t>& call, float* partial, const Partials& partials,
                     CUstream_st* stream);

}  // namespace attention_decode
}  // namespace flextron
