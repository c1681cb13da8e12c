// head_attention by the tensor cores: bf16 and fp16, D up to 128. A warp has 16 or 32 of the 128 queries, in
// registers with their results; keys and values come through shared memory, 64 at a time, the next while
// these are computed with. A warp leaves out keys that none of its queries sees.
#pragma once

#include <cmath>

#include "kernels/head_attention_items.cuh"

namespace flextron {
namespace {

using namespace attention;

constexpr int kRows = kAttentionTileRows, kKeys = 64;

template <int kHead>
struct Shape {
  static constexpr int kSixteens = kHead == 64 ? 2 : 1;  // of queries, a warp
  static constexpr int kThreads = kRows / kSixteens / 16 * 32;
  static constexpr int kBlocks = kHead == 64 ? 2 : 1;  // of a multiprocessor
  using Tile = attention::Tile<kKeys, kHead>;
  struct Shared {
    Queries<kRows> queries;
    alignas(16) Tile k[2], v[2];
  };
};

// A warp's 16 queries.
template <int kHead>
struct Warp16 {
  Registers<Registers<uint32_t, 4>, kHead / 16> q;
  Registers<Registers<float, 4>, kHead / 8> out;
  attention::Softmax softmax;
};

template <class scalar_t, int kHead, bool kAligned>
__device__ void attend(const HeadAttentionCall<scalar_t>& call, const Item& item,
                       typename Shape<kHead>::Shared& shared) {
  using S = Shape<kHead>;
  constexpr int kSixteens = S::kSixteens, kEights = kKeys / 8;
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 * kSixteens;
  const int D = static_cast<int>(call.D);
  const CallSequence& s = item.sequence;
  const int64_t group = item.head / call.M;
  const scalar_t* const q = call.q + item.head * call.q_stride_h;

  shared.queries.find(call, item);
  __syncthreads();
  const int all_keys = shared.queries.most_keys(0, kRows);
  const int warp_keys = shared.queries.most_keys(row, 16 * kSixteens);
  const int least_keys = shared.queries.least_keys(row, 16 * kSixteens);

  Registers<Warp16<kHead>, kSixteens> mine;
#pragma unroll
  for (int m = 0; m < kSixteens; ++m) {
    Registers<const scalar_t*, 2> from;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int place = row + 16 * m + 8 * half + lane / 4;
      const int64_t t = shared.queries.t[place];
      from[half] = t < 0 ? nullptr : q + t * call.q_stride_t;
    }
#pragma unroll
    for (int step = 0; step < kHead / 16; ++step)
      attention::load_a<kAligned>(mine[m].q[step], from[0], from[1], step, D, lane);
    attention::clear(mine[m].out);
    mine[m].softmax.clear();
  }

  const auto load = [&](auto& tile, const KeyView<const scalar_t>& view, int begin) {
    attention::load_rows<kAligned, S::kThreads>(tile, D, [&](int r) -> const scalar_t* {
      if (begin + r >= all_keys) return nullptr;
      return view.data + key_offset(call, s, s.k_start + begin + r, view.page_stride, view.key_stride) +
             group * view.group_stride;
    });
  };
  const auto fetch = [&](int begin) {
    if (begin < all_keys) {
      const int stage = begin / kKeys % 2;
      load(shared.k[stage], call.k, begin);
      load(shared.v[stage], call.v, begin);
    }
    cp_async_commit();
  };

  constexpr float kLog2E = 1.4426950408889634f;
  const float scale = call.scale * kLog2E;
  const int first_key = shared.queries.first_key(call.window) / kKeys * kKeys;
  fetch(first_key);
  for (int begin = first_key; begin < all_keys; begin += kKeys) {
    cp_async_wait<0>();
    __syncthreads();  // these keys are there for all, and all have left those that are fetched over
    fetch(begin + kKeys);
    if (begin >= warp_keys) continue;
    const auto& k = shared.k[begin / kKeys % 2];
    const auto& v = shared.v[begin / kKeys % 2];

    Registers<Registers<Registers<float, 4>, kEights>, kSixteens> scores;
#pragma unroll
    for (int m = 0; m < kSixteens; ++m) attention::clear(scores[m]);
#pragma unroll
    for (int step = 0; step < kHead / 16; ++step)
#pragma unroll
      for (int n = 0; n < kEights; n += 2) {
        Registers<uint32_t, 4> b;
        attention::fragment_b(b, k, 8 * n, step, lane);
#pragma unroll
        for (int m = 0; m < kSixteens; ++m) {
          mma_m16n8k16<scalar_t>(scores[m][n], mine[m].q[step], b[0], b[1]);
          mma_m16n8k16<scalar_t>(scores[m][n + 1], mine[m].q[step], b[2], b[3]);
        }
      }

#pragma unroll
    for (int m = 0; m < kSixteens; ++m) {
      if (call.softcap != 0) {
        const float cap = call.softcap * kLog2E;
#pragma unroll
        for (int n = 0; n < kEights; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) scores[m][n][i] = cap * tanh_approx(scores[m][n][i] * call.cap_scale);
      } else {
#pragma unroll
        for (int n = 0; n < kEights; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) scores[m][n][i] *= scale;
      }
      if (begin + kKeys > least_keys || begin < warp_keys - call.window) {
        const int* const seen = &shared.queries.keys[row + 16 * m + lane / 4];
        const int from = begin + lane % 4 * 2, first = seen[0] - from, second = seen[8] - from;
#pragma unroll
        for (int n = 0; n < kEights; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i)
            if (!sees(i < 2 ? first : second, 8 * n + i % 2, call.window)) scores[m][n][i] = -INFINITY;
      }
      mine[m].softmax.step(scores[m], mine[m].out);
    }

#pragma unroll
    for (int step = 0; step < kKeys / 16; ++step) {
      Registers<Registers<uint32_t, 4>, kSixteens> p;
#pragma unroll
      for (int m = 0; m < kSixteens; ++m)
        p[m] = attention::as_a<scalar_t>(scores[m][2 * step], scores[m][2 * step + 1]);
#pragma unroll
      for (int n = 0; n < kHead / 8; n += 2) {
        Registers<uint32_t, 4> b;
        attention::fragment_b_transposed(b, v, 16 * step, n / 2, lane);
#pragma unroll
        for (int m = 0; m < kSixteens; ++m) {
          mma_m16n8k16<scalar_t>(mine[m].out[n], p[m], b[0], b[1]);
          mma_m16n8k16<scalar_t>(mine[m].out[n + 1], p[m], b[2], b[3]);
        }
      }
    }
  }

  const bool pairs = D % 2 == 0;
#pragma unroll
  for (int m = 0; m < kSixteens; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = attention::sum_of_row(mine[m].softmax.sum[half]), most = mine[m].softmax.max[half],
            share = 1;
      const int64_t t = shared.queries.t[row + 16 * m + 8 * half + lane / 4];
      if (t < 0) continue;
      if (call.sinks)
        share = add_sink(load_global(call.sinks + item.head) * kLog2E, most, sum,
                         [](float x) { return exp2_approx(x); });
      if (lane % 4 == 0) write_lse(call, t, item.head, most * 0.6931471805599453f + std::log(sum));
      const float inverse = sum == 0 ? 0 : share / sum;
      scalar_t* const out = call.out + (t * call.H + item.head) * D;
#pragma unroll
      for (int n = 0; n < kHead / 8; ++n) {
        const int column = 8 * n + lane % 4 * 2;
        const uint32_t both =
            pack<scalar_t>(mine[m].out[n][2 * half] * inverse, mine[m].out[n][2 * half + 1] * inverse);
        if (pairs && column < D) {
          store_global(reinterpret_cast<uint32_t*>(out + column), both);
        } else {
          auto* const to = reinterpret_cast<uint16_t*>(out + column);
          if (column < D) store_global(to, static_cast<uint16_t>(both));
          if (column + 1 < D) store_global(to + 1, static_cast<uint16_t>(both >> 16));
        }
      }
    }
}

// kAligned: every head of every row of q, k and v begins at a multiple of 16 bytes.
template <class scalar_t, int kHead, bool kAligned>
__global__ __launch_bounds__(Shape<kHead>::kThreads, Shape<kHead>::kBlocks) void head_attention_kernel(
    const HeadAttentionCall<scalar_t> call, const AttentionSchedule schedule) {
  auto& shared = dynamic_shared<typename Shape<kHead>::Shared>();
  const int64_t items = schedule.first[*schedule.count];
  for (int64_t i = blockIdx.x; i < items; i += gridDim.x) {
    attend<scalar_t, kHead, kAligned>(call, item_of(call, schedule, i, kRows), shared);
    __syncthreads();
  }
}

template <class scalar_t>
bool aligned(const HeadAttentionCall<scalar_t>& call) {
  const auto whole = [](const void* data, std::initializer_list<int64_t> strides) {
    return reinterpret_cast<uintptr_t>(data) % 16 == 0 &&
           std::all_of(strides.begin(), strides.end(), [](int64_t stride) { return stride % 8 == 0; });
  };
  const auto view = [&](const auto& keys) {
    return whole(keys.data, {keys.page_stride, keys.key_stride, keys.group_stride});
  };
  return whole(call.q, {call.q_stride_t, call.q_stride_h}) && view(call.k) && view(call.v);
}

template <class scalar_t, int kHead, bool kAligned>
void run(const HeadAttentionCall<scalar_t>& call, const AttentionSchedule& schedule, CUstream_st* stream) {
  using S = Shape<kHead>;
  launch<head_attention_kernel<scalar_t, kHead, kAligned>>({.grid = grid_of(call, kRows, 1),
                                                            .block = dim3(S::kThreads),
                                                            .stream = stream,
                                                            .dynamic_shared = sizeof(typename S::Shared)},
                                                           call, schedule);
}

}  // namespace

template <class scalar_t>
void head_attention_tiles(const HeadAttentionCall<scalar_t>& call, const AttentionSchedule& queries,
                          CUstream_st* stream) {
  dispatch_int(HeadSizes{}, "head_attention", "head size", tile_head(call.D), [&](auto head) {
    aligned(call) ? run<scalar_t, head, true>(call, queries, stream)
                  : run<scalar_t, head, false>(call, queries, stream);
  });
}

#define FLEXTRON_HEAD_ATTENTION_TILES(scalar_t)                                                    \
  template void head_attention_tiles(const HeadAttentionCall<scalar_t>&, const AttentionSchedule&, \
                                     CUstream_st*);

}  // namespace flextron
