// Few tokens against many weights on Hopper: a GEMM that is bound by reading the weights, without its
// operands and its epilogue. elastic_linear and the hidden layer of elastic_mlp share it.
//
// Rows of the weights are the 64 rows of wgmma's A, and tokens are the 8 to 64 columns of its B. The rows
// that any token needs are cut into atoms of 8. The grid has as many clusters as run at once, and each owns
// nearly the same number of neighbouring atoms: its rows. A cluster passes over the features with as many
// rows at a time as its registers hold sums for, mostly all.
//
// The blocks of a cluster share the features: chunk c of 64 belongs to block c % kSplit. So every cluster,
// not every block, reads the tokens, and few rows still occupy all SMs. At the end of a pass each block
// leaves its sums in its shared memory; each block then adds up a part of them, in the order of the blocks,
// and finishes it. Neither the owner of a chunk nor this order depends on the data: a row and a token give
// the same bits whatever extents and tokens are beside them.
//
// One warp of a block is the producer: it keeps a ring of slots filled through TMA, also across the ends of
// passes. One warpgroup consumes them. A slot holds one chunk of a pass's rows (of both weights, if there are
// two) and of all tokens. The number of the cluster's rows decides how large a slot is, and so how many fit.
#pragma once

#include "kernels/device/pipeline_sm90.cuh"
#include "kernels/elastic_linear_tiles.h"

namespace flextron::decode {

using pipeline::kDepth, pipeline::kLine, pipeline::kWarpgroup;

constexpr int kSplit = 4;                  // blocks of a cluster
constexpr int kThreads = kWarpgroup + 32;  // the consumers, and the producer's warp
constexpr int kAtom = 8;                   // rows: the least that a swizzled box may hold
constexpr int kTileAtoms = 8;              // of wgmma's A
constexpr int kTileBytes = kTileAtoms * kAtom * kLine;
constexpr int kBoxes = 4;        // of 1, 2, 4 and 8 atoms
constexpr int kTilesAtOnce = 4;  // 128 sums of a thread for 64 tokens
constexpr int kMaxStages = 24;
constexpr int kConsumerWarps = kWarpgroup / 32;
constexpr int kBarrier = 1;               // of the consumers
constexpr int kSharedBytes = 227 * 1024;  // what a block may have

// `tokens` at most, and how many weights have the same rows: each has its own sums.
template <class scalar, int tokens, int weights>
struct Shape {
  static_assert((tokens == 8 || tokens == 16 || tokens == 32 || tokens == 64) && kTilesAtOnce % weights == 0);
  using scalar_t = scalar;
  static constexpr int kTokens = tokens, kWeights = weights;
  static constexpr int kTiles = kTilesAtOnce / weights;  // of each weight, at most
  static constexpr int kFours = tokens / 8;              // sums of a thread and tile, in fours
  static constexpr int kTokenBytes = tokens * kLine;
};

template <class S>
struct Sums {
  float4 fours[S::kTiles * S::kFours][S::kWeights][kWarpgroup];
};

// Slots come first: they are multiples of 1024 bytes, and so are their addresses.
template <class S>
struct Shared {
  static constexpr int kRing = (kSharedBytes - static_cast<int>(sizeof(Sums<S>)) - 2048) / 1024 * 1024;
  unsigned char ring[kRing];
  Sums<S> sums;
  float bias[kTilesAtOnce * kTileAtoms * kAtom];  // of a pass's rows, tile after tile of each weight
  Mbarrier full[kMaxStages], empty[kMaxStages];
  Mbarrier written, read;  // by all consumers of the cluster: its sums
};

// What TMA is told: all tokens at once; rows of each weight by boxes of 1, 2, 4 and 8 atoms.
template <class S>
struct Maps {
  TensorMap x;
  TensorMap weight[S::kWeights][kBoxes];
};

// What of a launch the widest token needs.
struct Need {
  int rows, row_blocks, row_stride;  // of each block of the weights' rows, from one's first to the next's
  int inputs, input_blocks;          // features of each block
  int clean;     // the first features of x that every token uses, or that are zeros where it does not
  bool to_edge;  // behind `inputs` the weights end, and are zeros by their tensor maps
};

// What of the atoms a cluster owns, and how it passes over the features with them.
struct Share {
  int first, atoms;  // of those of all blocks of rows, one after the other
  int at_once;       // in a pass; fewer in the last
  int tiles;         // that they fill
  int slot, stages;  // bytes; how many
};

template <class S>
__device__ __forceinline__ Share share_of(const Need& need) {
  const int64_t total = int64_t{tiles_over(need.rows, kAtom)} * need.row_blocks;
  const int cluster = static_cast<int>(blockIdx.x / kSplit), clusters = static_cast<int>(gridDim.x / kSplit);
  Share share;
  share.first = static_cast<int>(total * cluster / clusters);
  share.atoms = static_cast<int>(total * (cluster + 1) / clusters) - share.first;
  const int passes = tiles_over(share.atoms, S::kTiles * kTileAtoms);
  share.at_once = passes > 0 ? tiles_over(share.atoms, passes) : 0;
  share.tiles = tiles_over(share.at_once, kTileAtoms);
  share.slot = S::kWeights * share.tiles * kTileBytes + S::kTokenBytes;
  share.stages = min(kMaxStages, Shared<S>::kRing / share.slot);
  return share;
}

// The features of a block's first chunk of a block of inputs: these are dealt out one further each time, so
// that short ones occupy all blocks too.
__device__ __forceinline__ int first_input(int rank, int input_block) {
  return (rank + input_block) % kSplit * kDepth;
}

// The stage a role has come to, and the parity of that stage's phase.
struct Ring {
  int stages, stage = 0;
  unsigned parity = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == stages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// The producer's way: all chunks of a pass, pass after pass.
struct Chunks {
  const Need& need;
  const Share& share;
  int rank;
  int atom, left;  // the pass's first, and how many are left from there on
  int block = 0, i;

  __device__ __forceinline__ Chunks(const Need& need, const Share& share, int rank)
      : need(need),
        share(share),
        rank(rank),
        atom(share.first),
        left(share.atoms),
        i(first_input(rank, 0) - kSplit * kDepth) {}

  __device__ __forceinline__ bool next() {
    if (left <= 0) return false;
    for (i += kSplit * kDepth; i >= need.inputs; i = first_input(rank, block)) {
      if (++block < need.input_blocks) continue;
      block = 0;
      atom += share.at_once;
      left -= share.at_once;
      if (left <= 0) return false;
    }
    return true;
  }
  __device__ __forceinline__ int atoms() const { return min(left, share.at_once); }
};

// A box that a lane of the producer's warp asks for, in every slot of a pass: of which weight, 1 << size
// atoms from a row of it on, and where in the slot they go. None where `weight` is negative.
struct Box {
  int weight = -1, size = 0, row = 0, offset = 0;
};

// The lane's box of the pass that begins at the chunk: of each weight, runs of atoms that neither end a block
// nor a tile. There are at most as many as atoms, 32.
template <class S>
__device__ __forceinline__ Box box_of(const Need& need, const Chunks& at, int lane) {
  static_assert(S::kWeights * S::kTiles * kTileAtoms <= 32);
  const int of_block = tiles_over(need.rows, kAtom);
  Box box;
  int block = at.atom / of_block, atom = at.atom % of_block, index = 0, done = 0;
  for (int left = at.atoms(); left > 0; ++index) {
    const int size = 31 - __clz(min(min(left, of_block - atom), kTileAtoms));
    for (int w = 0; w < S::kWeights; ++w)
      if (S::kWeights * index + w == lane)
        box = {w, size, block * need.row_stride + atom * kAtom,
               w * at.share.tiles * kTileBytes + done * kAtom * kLine};
    done += 1 << size;
    left -= 1 << size;
    atom += 1 << size;
    if (atom == of_block) {
      atom = 0;
      ++block;
    }
  }
  return box;
}

// The lane's box of zeros for the rest of the tiles: outside the tensor, which reads nothing.
template <class S>
__device__ __forceinline__ Box zeros_of(const Chunks& at, int lane) {
  constexpr int kOutside = INT32_MAX / 2;
  Box box;
  int done = at.atoms();
  for (int left = at.share.tiles * kTileAtoms - done, index = 0; left > 0; ++index) {
    const int size = 31 - __clz(min(left, kTileAtoms));
    for (int w = 0; w < S::kWeights; ++w)
      if (S::kWeights * index + w == lane)
        box = {w, size, kOutside, w * at.share.tiles * kTileBytes + done * kAtom * kLine};
    done += 1 << size;
    left -= 1 << size;
  }
  return box;
}

// The producer's warp. A lane asks for one box of each slot: one after the other by a single lane they would
// take longer than their bytes. Only x may come from the launch ahead: the ring's first round of weights is
// asked for before that has ended. wgmma reads whole tiles: what a slot holds behind its atoms is written in
// that round, and stays.
template <class S>
__device__ __forceinline__ void produce(const Maps<S>& maps, Shared<S>& shared, const Need& need,
                                        const Share& share, int rank, int lane) {
  const auto ask = [&](const Box& box, unsigned char* slot, Mbarrier& full, int block, int i) {
    if (box.weight >= 0)
      tma_load_3d(slot + box.offset, maps.weight[box.weight][box.size], full, i, block, box.row);
  };
  Box own;
  int atom = -1;  // the first of the pass that it is of
  const auto load_weights = [&](const Chunks& at, int stage, bool is_first_round) {
    unsigned char* const slot = shared.ring + stage * share.slot;
    Mbarrier& full = shared.full[stage];
    if (at.atom != atom) {
      atom = at.atom;
      own = box_of<S>(need, at, lane);
    }
    const int atoms = is_first_round ? share.tiles * kTileAtoms : at.atoms();
    if (lane == 0) mbarrier_arrive_expect(full, S::kWeights * atoms * kAtom * kLine + S::kTokenBytes);
    __syncwarp();
    ask(own, slot, full, at.block, at.i);
    if (is_first_round) ask(zeros_of<S>(at, lane), slot, full, 0, 0);
  };

  Chunks early(need, share, rank);
  for (int stage = 0; stage < share.stages && early.next(); ++stage) load_weights(early, stage, true);
  grid_dependency_wait();
  Chunks chunks(need, share, rank);
  Ring ring{share.stages};
  for (bool is_first_round = true; chunks.next();) {
    Mbarrier& full = shared.full[ring.stage];
    if (!is_first_round) {
      mbarrier_wait(shared.empty[ring.stage], ring.parity ^ 1);
      load_weights(chunks, ring.stage, false);
    }
    if (lane == 0)
      tma_load_3d(shared.ring + (ring.stage + 1) * share.slot - S::kTokenBytes, maps.x, full, chunks.i,
                  chunks.block, 0);
    ring.advance();
    is_first_round &= ring.parity == 0;
  }
  grid_launch_dependents();
}

// A row of the weights: of which block, and which of its rows; -1 where a pass has none there.
struct Place {
  int block, row;
};

// The consumers. inputs(t) are the features that token t uses; bias(place, w) is what finish wants to know of
// a row of weight w, read before the products. finish(places, token, sums, biases) gets the sums of each
// weight for four places of the result: [2 half + k] is of places[half] and of token + k.
template <class S, int tiles, class Inputs, class Bias, class Finish>
__device__ __forceinline__ void consume(Shared<S>& shared, const Need& need, const Share& share, int rank,
                                        const Inputs& inputs, const Bias& bias, const Finish& finish) {
  using scalar_t = typename S::scalar_t;
  constexpr int kWeightRows = tiles * kTileAtoms * kAtom, kRows = S::kWeights * kWeightRows;
  constexpr int kBiases = (kRows + kWarpgroup - 1) / kWarpgroup;  // that a thread brings
  // A thread's sums in fours. It finishes fours rank, rank + kSplit, ..., a few at a time.
  constexpr int kFours = tiles * S::kFours;
  constexpr int kBatch = std::min((kFours + kSplit - 1) / kSplit, 4 / S::kWeights);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int of_block = tiles_over(need.rows, kAtom);
  Ring ring{share.stages};
  unsigned pass = 0;
  for (int done = 0; done < share.atoms; done += share.at_once, ++pass) {
    const int atoms = min(share.atoms - done, share.at_once);
    const auto place_of = [&](int row) -> Place {
      const int of_pass = row / kAtom, atom = share.first + done + of_pass;
      return {atom / of_block, of_pass < atoms ? atom % of_block * kAtom + row % kAtom : -1};
    };
    Registers<float, kBiases> biases;
#pragma unroll
    for (int i = 0; i < kBiases; ++i) {
      const int line = thread + i * kWarpgroup;
      const Place place = place_of(line % kWeightRows);
      biases[i] =
          line < kRows && place.row >= 0 && place.row < need.rows ? bias(place, line / kWeightRows) : 0.0f;
    }

    Registers<Registers<Registers<float, S::kTokens / 2>, tiles>, S::kWeights> sum;
#pragma unroll
    for (int w = 0; w < S::kWeights; ++w)
#pragma unroll
      for (int m = 0; m < tiles; ++m) {
#pragma unroll
        for (int i = 0; i < S::kTokens / 2; ++i) sum[w][m][i] = 0;
        hold(sum[w][m]);
      }
    int previous = -1;
    for (int block = 0; block < need.input_blocks; ++block)
      for (int i = first_input(rank, block); i < need.inputs; i += kSplit * kDepth) {
        auto* const rows = reinterpret_cast<scalar_t(*)[kDepth]>(shared.ring + ring.stage * share.slot);
        auto* const tokens = rows + kRows;
        mbarrier_wait(shared.full[ring.stage], ring.parity);
        const bool has_ragged_tokens = i + kDepth > need.clean,
                   has_ragged_rows = i + kDepth > need.inputs && !need.to_edge;
        if (has_ragged_tokens)
          pipeline::clear_behind<kWarpgroup>(tokens, S::kTokens, thread,
                                             [&](int t) { return inputs(t) - i; });
        if (has_ragged_rows)
          pipeline::clear_behind<kWarpgroup>(rows, kRows, thread, [&](int) { return need.inputs - i; });
        if (has_ragged_tokens || has_ragged_rows) {
          fence_proxy_async();
          named_barrier_sync(kBarrier, kWarpgroup);
        }
        const uint64_t b = pipeline::operand<Major::kK>(tokens);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < kDepth / 16; ++k)
#pragma unroll
          for (int w = 0; w < S::kWeights; ++w)
#pragma unroll
            for (int m = 0; m < tiles; ++m) {
              const uint64_t a = pipeline::operand<Major::kK>(rows + (w * tiles + m) * kTileAtoms * kAtom);
              wgmma<scalar_t, S::kTokens>(sum[w][m], wgmma_advance(a, k * pipeline::kSixteenDeep<Major::kK>),
                                          wgmma_advance(b, k * pipeline::kSixteenDeep<Major::kK>), 1);
            }
        wgmma_commit();
        wgmma_wait<1>();
        if (previous >= 0 && lane == 0) mbarrier_arrive(shared.empty[previous]);
        previous = ring.stage;
        ring.advance();
      }
    wgmma_wait<0>();
#pragma unroll
    for (int w = 0; w < S::kWeights; ++w)
#pragma unroll
      for (int m = 0; m < tiles; ++m) hold(sum[w][m]);
    if (previous >= 0 && lane == 0) mbarrier_arrive(shared.empty[previous]);

    // The cluster has read the sums of the pass before, or has begun.
    if (pass > 0)
      mbarrier_wait(shared.read, (pass - 1) % 2);
    else
      cluster_wait();
#pragma unroll
    for (int w = 0; w < S::kWeights; ++w)
#pragma unroll
      for (int m = 0; m < tiles; ++m)
#pragma unroll
        for (int f = 0; f < S::kFours; ++f)
          store_shared(&shared.sums.fours[m * S::kFours + f][w][thread],
                       make_float4(sum[w][m][4 * f], sum[w][m][4 * f + 1], sum[w][m][4 * f + 2],
                                   sum[w][m][4 * f + 3]));
#pragma unroll
    for (int i = 0; i < kBiases; ++i)
      if (const int line = thread + i * kWarpgroup; line < kRows) store_shared(&shared.bias[line], biases[i]);
    __syncwarp();
    if (lane < kSplit) mbarrier_arrive_cluster(shared.written, lane);
    mbarrier_wait(shared.written, pass % 2);

    // Of a batch, all parts are asked for before the first is used.
    for (int batch = rank; batch < kFours; batch += kBatch * kSplit) {
      Registers<Registers<Registers<float4, kSplit>, S::kWeights>, kBatch> parts;
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int four = min(batch + i * kSplit, kFours - 1);
#pragma unroll
        for (int w = 0; w < S::kWeights; ++w)
#pragma unroll
          for (int from = 0; from < kSplit; ++from)
            parts[i][w][from] = *cluster_shared(&shared.sums.fours[four][w][thread], from);
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int four = batch + i * kSplit;
        if (four >= kFours) break;
        Registers<Registers<float, 4>, S::kWeights> total;
#pragma unroll
        for (int w = 0; w < S::kWeights; ++w) {
          const auto& part = parts[i][w];
          total[w] = {{part[0].x, part[0].y, part[0].z, part[0].w}};
#pragma unroll
          for (int from = 1; from < kSplit; ++from) {
            total[w][0] += part[from].x;
            total[w][1] += part[from].y;
            total[w][2] += part[from].z;
            total[w][3] += part[from].w;
          }
        }
        const int row = four / S::kFours * kTileAtoms * kAtom + 16 * warp + lane / 4;
        const Registers<Place, 2> places{{place_of(row), place_of(row + 8)}};
        Registers<Registers<float, 2>, S::kWeights> own_biases;
#pragma unroll
        for (int w = 0; w < S::kWeights; ++w)
#pragma unroll
          for (int half = 0; half < 2; ++half)
            own_biases[w][half] = load_shared(&shared.bias[w * kWeightRows + row + 8 * half]);
        finish(places, four % S::kFours * 8 + lane % 4 * 2, total, own_biases);
      }
    }
    __syncwarp();
    if (lane < kSplit) mbarrier_arrive_cluster(shared.read, lane);
  }
  // A block's memory must outlast the others' reading.
  mbarrier_wait(shared.read, (pass - 1) % 2);
}

// A block of the kernel. `out` is the result, contiguous blocks of `features` in T rows: what no atom covers
// becomes zeros.
template <class S, class Inputs, class Bias, class Finish>
__device__ __forceinline__ void run_block(const Maps<S>& maps, const Need& need, int T, int features,
                                          typename S::scalar_t* out, const Inputs& inputs, const Bias& bias,
                                          const Finish& finish) {
  auto& shared = dynamic_shared<Shared<S>>();
  const int thread = static_cast<int>(threadIdx.x), helper = thread - kWarpgroup;
  if (helper == S::kWeights * kBoxes) prefetch_tensor_map(maps.x);
  if (helper >= 0 && helper < S::kWeights * kBoxes)
    prefetch_tensor_map(maps.weight[helper / kBoxes][helper % kBoxes]);
  if (thread < kMaxStages) {
    mbarrier_init(shared.full[thread], 1);
    mbarrier_init(shared.empty[thread], kConsumerWarps);
    if (thread == 0) {
      mbarrier_init(shared.written, kSplit * kConsumerWarps);
      mbarrier_init(shared.read, kSplit * kConsumerWarps);
    }
    fence_mbarrier_init();
  }
  __syncthreads();
  cluster_arrive();
  const int rank = static_cast<int>(cluster_rank());
  const Share share = share_of<S>(need);
  if (helper >= 0) {
    produce(maps, shared, need, share, rank, helper);
    __syncwarp();
    cluster_wait();
    return;
  }

  grid_dependency_wait();
  const int covered = tiles_over(need.rows, kAtom) * kAtom, bare = features - covered;
  if (bare > 0) {
    const int64_t count = int64_t{bare} * need.row_blocks * T, step = int64_t{gridDim.x} * kWarpgroup;
    for (int64_t i = int64_t{blockIdx.x} * kWarpgroup + thread; i < count; i += step)
      store_global(out + i / bare * features + covered + i % bare, typename S::scalar_t(0.0f));
  }
  switch (share.tiles) {
    case 0:
      return cluster_wait();
    case 1:
      return consume<S, 1>(shared, need, share, rank, inputs, bias, finish);
    case 2:
      return consume<S, 2>(shared, need, share, rank, inputs, bias, finish);
    case 3:
      if constexpr (S::kTiles >= 3) return consume<S, 3>(shared, need, share, rank, inputs, bias, finish);
      return;
    default:
      if constexpr (S::kTiles >= 4) return consume<S, 4>(shared, need, share, rank, inputs, bias, finish);
  }
}

// The largest and the least of value(t) for the T tokens. All lanes of a warp together.
struct Range {
  int least, most;
};
template <class Value>
__device__ __forceinline__ Range range_of(int T, const Value& value) {
  constexpr int kLanes = 32;
  Range range{INT32_MAX, 0};
  for (int t = static_cast<int>(threadIdx.x) % kLanes; t < T; t += kLanes) {
    const int one = value(t);
    range = {min(range.least, one), max(range.most, one)};
  }
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2)
    range = {min(range.least, __shfl_xor_sync(~0u, range.least, distance)),
             max(range.most, __shfl_xor_sync(~0u, range.most, distance))};
  return range;
}

// ---- on the host ----

// Rows of a weight, by boxes of 1, 2, 4 and 8 atoms.
template <class scalar_t>
void set_weight_maps(TensorMap (&maps)[kBoxes], const scalar_t* data, int64_t features, int64_t blocks,
                     int64_t rows, int64_t block_stride, int64_t row_stride) {
  for (int box = 0; box < kBoxes; ++box)
    maps[box] = pipeline::operand_map(data, features, blocks, rows, block_stride, row_stride, kAtom << box);
}

// All clusters that run at once, or one for each of `atoms` where those are fewer. `dependent`: may start
// before the launch ahead ends.
template <class S, auto kernel, class Params>
void launch_clusters(int64_t atoms, const Params& params, CUstream_st* stream, bool dependent) {
  static_assert(sizeof(Shared<S>) <= kSharedBytes);
  LaunchConfig config{.grid = dim3(kSplit),
                      .block = dim3(kThreads),
                      .stream = stream,
                      .dynamic_shared = sizeof(Shared<S>),
                      .cluster = kSplit};
  const int64_t clusters = std::min<int64_t>(atoms, clusters_at_once<kernel>(config));
  config.grid = dim3(static_cast<unsigned>(clusters * kSplit));
  config.programmatic = dependent;
  launch<kernel>(config, params);
}

// run(Shape) of the least that holds T tokens.
template <class scalar_t, int weights, class Run>
void with_shape(int64_t T, const Run& run) {
  if (T <= 8) return run(Shape<scalar_t, 8, weights>{});
  if (T <= 16) return run(Shape<scalar_t, 16, weights>{});
  if (T <= 32) return run(Shape<scalar_t, 32, weights>{});
  run(Shape<scalar_t, 64, weights>{});
}

}  // namespace flextron::decode
