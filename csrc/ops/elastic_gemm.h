// The GEMMs of the ops on a CPU: from tensors and extents to csrc/kernels/elastic_gemm.h, on torch's threads.
#pragma once

#include <algorithm>
#include <memory>
#include <new>
#include <string>
#include <utility>
#include <vector>

#include "core/staircase.h"
#include "kernels/elastic_gemm.h"
#include "ops/device.h"
#include "ops/extents.h"
#include "ops/gemm.h"
#include "ops/isa.h"

namespace flextron {

// A plain operand's; panels have a format.
inline GemmDtype gemm_dtype(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return GemmDtype::kFloat;
    case ScalarType::BFloat16:
      return GemmDtype::kBf16;
    case ScalarType::Half:
      return GemmDtype::kFp16;
    default:
      fail("flextron: a GEMM's operand must be float32, bfloat16 or float16, got ",
           toString(t.scalar_type()));
  }
}

inline int64_t gemm_group_rows() {
  return gemm_group_rows(isa() == Isa::kGeneric || isa() >= Isa::kArmDot ? 16
                         : isa() == Isa::kAvx2                           ? 32
                                                                         : 64);
}

// Whether a GEMM of the dtype of x is made of pairs: what is rounded to bfloat16 was so before, or torch's
// own layers would round it too. ARM's kernel of pairs takes panels alone.
inline bool in_pairs(const Tensor& x, GemmLayout layout) {
  const bool has_pairs = isa() == Isa::kArmBf16 ? layout == GemmLayout::kPanels
                                                : isa() == Isa::kAvx512Bf16 || isa() == Isa::kAmx;
  return has_pairs && x.scalar_type() == ScalarType::BFloat16;
}

// Whether a GEMM of so many rows is made of dot products.
inline bool are_dots(const ElasticGemmParams& p, int64_t rows) {
  const bool wide = p.pairs && isa() == Isa::kAvx512Bf16;
  return p.layout == GemmLayout::kRows && p.a_input == 1 && rows <= (wide ? kPairsDotRows : kDotRows);
}

// Elements between the rows of a matrix that kernels walk down: whole lines, and an odd number of them, so
// that a column does not fall into one set of a cache.
inline int64_t padded_row(int64_t columns, int64_t element_size = sizeof(float)) {
  const int64_t line = 64 / element_size;
  return ((columns + line - 1) / line | 1) * line;
}

// The first columns of x, whose elements in a row are adjacent, in `to`, as floats.
inline void widen_rows(const Tensor& x, const std::optional<Tensor>& order, const Tensor& to,
                       int64_t columns) {
  const GemmRowsParams p{.x = x.const_data_ptr(),
                         .dtype = gemm_dtype(x),
                         .order = order ? static_cast<const int64_t*>(order->const_data_ptr()) : nullptr,
                         .to = static_cast<float*>(to.mutable_data_ptr()),
                         .columns = columns,
                         .x_stride = x.stride(0),
                         .to_stride = to.stride(0)};
  parallel_for(x.size(0), columns,
               [&](int64_t begin, int64_t end) { FLEXTRON_FOR_PLAIN_ISA(elastic_gemm_rows)(p, begin, end); });
}

// Whether rows share sets of a cache: those of multiples of 2 KiB do.
inline bool rows_clash(const Tensor& x) {
  return x.size(0) > kDotRows && x.stride(0) * x.element_size() % 2048 == 0;
}
// Rows of x in some order, as floats; x itself where it is that already. There may be more columns.
inline Tensor float_rows(const Tensor& x, const std::optional<Tensor>& order) {
  const Tensor x_ = adjacent(x);
  if (x.scalar_type() == ScalarType::Float && !order && !rows_clash(x_)) return x_;
  const Tensor wide = empty(x, {x.size(0), padded_row(x.size(1))}, ScalarType::Float);
  widen_rows(x_, order, wide, x.size(1));
  return wide;
}
// The same as GEMMs of gradients read them, along and across: as floats, or as the bfloat16 numbers that they
// are where these GEMMs are made of pairs.
inline Tensor gradient_rows(const Tensor& x, const std::optional<Tensor>& order) {
  if (!in_pairs(x, GemmLayout::kColumns)) return float_rows(x, order);
  const Tensor rows = gather_rows(adjacent(x), order);
  if (!rows_clash(rows)) return rows;
  const Tensor apart = empty(x, {x.size(0), padded_row(x.size(1), x.element_size())});
  Tensor part = columns(apart, 0, x.size(1));
  torch::stable::copy_(part, rows);
  return apart;
}

// Rows of floats or, in pairs, of bfloat16 numbers as a GEMM's activations: along, from a column on.
inline void read_along(ElasticGemmParams& p, const Tensor& rows, int64_t column = 0) {
  const char* const data = static_cast<const char*>(rows.const_data_ptr()) + column * rows.element_size();
  if (rows.scalar_type() == ScalarType::Float)
    p.a = reinterpret_cast<const float*>(data);
  else
    p.x = data;
  p.a_row = rows.stride(0);
}
// And across: a column is a row.
inline void read_across(ElasticGemmParams& p, const Tensor& rows, int64_t column = 0) {
  read_along(p, rows, column);
  p.a_input = p.a_row;
  p.a_row = 1;
}

// Rows in groups that share an extent, and blocks of groups.
struct GemmSchedule {
  std::vector<GemmGroup> groups;
  std::vector<int64_t> row_blocks{0};
};

// Rows of a step's blocks: more than fit one are shared out evenly, since a panel is widened for every block.
inline int64_t block_rows_of(int64_t rows, int64_t inputs) {
  const int64_t most = gemm_block_rows(inputs), blocks = (rows + most - 1) / most;
  return blocks > 1 ? (rows + blocks - 1) / blocks : most;
}

// Tiles of rows of a block of pairs. A thread takes whole panels of whole blocks: there are as many blocks,
// of at least kLeast tiles where there are several, as leave the thread with the most to do the least. A
// panel that is turned into pairs counts as much as a tile of rows.
inline int64_t pairs_block_tiles(const ElasticGemmParams& p, int64_t rows, int64_t inputs) {
  constexpr int64_t kLeast = 8;
  const int64_t tiles = std::max<int64_t>(1, (rows + 15) / 16), fit = pairs_block_tiles(inputs);
  const int64_t panels = p.strips() * p.out_blocks, threads = torch::stable::get_num_threads();
  int64_t best = fit, least = INT64_MAX;
  for (int64_t blocks = (tiles + fit - 1) / fit;; ++blocks) {
    const int64_t each = ((tiles + blocks - 1) / blocks + 1) / 2 * 2;  // a group has two
    if (each < kLeast && least < INT64_MAX) return best;
    const int64_t most = (panels * blocks + threads - 1) / threads * (each + 1);
    if (most < least) least = most, best = each;
    if (each <= kLeast) return best;
  }
}

// The groups of a GEMM: inputs_of and features_of a step, both of which descend with the steps.
template <class Inputs, class Features>
GemmSchedule gemm_schedule(const ElasticGemmParams& p, const std::vector<Step>& steps,
                           const Inputs& inputs_of, const Features& features_of) {
  GemmSchedule schedule;
  if (steps.empty()) return schedule;
  const int64_t tiles =
      p.pairs ? pairs_block_tiles(p, steps.back().end - steps.front().begin, inputs_of(steps.front())) : 0;
  const auto end_block = [&] { schedule.row_blocks.push_back(static_cast<int64_t>(schedule.groups.size())); };
  int64_t block_begin = 0;
  for (const Step& step : steps) {
    const int64_t inputs = inputs_of(step), features = features_of(step), rows = step.end - step.begin;
    const bool filled = p.pairs || p.quantised;
    const int64_t most = p.pairs ? kPairsGroupRows : p.quantised ? kQuantisedGroupRows : gemm_group_rows();
    const int64_t count = (rows + most - 1) / most, block_rows = block_rows_of(rows, inputs);
    for (int64_t i = 0; i < count; ++i) {
      // As equal as can be, 8 rows are 4 and 4, not 6 and 2; tiles are filled.
      const int64_t begin = step.begin + (filled ? most * i : rows * i / count);
      const int64_t end = filled ? std::min(begin + most, step.end) : step.begin + rows * (i + 1) / count;
      GemmGroup group{begin, end - begin, inputs, features, 0, 0};
      if (p.pairs && !schedule.groups.empty()) {
        const GemmGroup& before = schedule.groups.back();
        group.tile = before.tile + row_tiles(before) * input_tiles(before.inputs) * p.in_blocks;
        group.row_tile = before.row_tile + row_tiles(before);
      }
      if (p.quantised && !schedule.groups.empty()) {
        const GemmGroup& before = schedule.groups.back();
        group.tile = before.tile + before.rows * input_groups(before.inputs) * p.in_blocks;
      }
      const bool full = p.pairs ? group.row_tile + row_tiles(group) > tiles : end - block_begin > block_rows;
      if (full) {
        end_block();
        block_begin = begin;
        group.row_tile = 0;
      }
      schedule.groups.push_back(group);
    }
  }
  if (!schedule.groups.empty()) end_block();
  return schedule;
}

// A GEMM whose parameters but groups and row blocks are set.
struct GemmJob {
  ElasticGemmParams p;
  GemmSchedule schedule;
};

// Multiplications of an item, of each of the panel's features.
inline int64_t item_weight(const ElasticGemmParams& p, int64_t row_block, int64_t strip) {
  int64_t products = 0;
  for (int64_t g = p.row_blocks[row_block]; g < p.row_blocks[row_block + 1]; ++g) {
    if (p.groups[g].features <= strip * kPanel) break;
    products += p.groups[g].rows * (p.groups[g].inputs + 1);
  }
  return products * (p.gated ? 2 : 1) * p.in_blocks;
}

// Tiles of its activations, of kTileBytes each.
constexpr int64_t kTileBytes = 1024;
inline int64_t tiles_of(const GemmJob& job) {
  const GemmGroup& last = job.schedule.groups.back();
  return last.tile + row_tiles(last) * input_tiles(last.inputs) * job.p.in_blocks;
}

// Bytes of a GEMM's activations, where it reads them in a layout of its own.
inline int64_t prepared_bytes(const GemmJob& job) {
  if (job.p.tiles) return 0;
  if (job.p.pairs) return tiles_of(job) * kTileBytes;
  if (!job.p.quantised) return 0;
  const GemmGroup& last = job.schedule.groups.back();
  const int64_t groups = last.tile + last.rows * input_groups(last.inputs) * job.p.in_blocks;
  return (groups + kQuantisedGroupRows - 1) * static_cast<int64_t>(sizeof(QuantisedInputs));
}

// Whether two GEMMs read the same activations in the same layout, as projections of queries, keys and values
// do.
inline bool reads_alike(const GemmJob& one, const GemmJob& other) {
  const ElasticGemmParams &p = one.p, &q = other.p;
  const auto alike = [](const GemmGroup& a, const GemmGroup& b) {
    return a.row == b.row && a.rows == b.rows && a.inputs == b.inputs;
  };
  const bool same = p.a == q.a && p.x == q.x && p.x_order == q.x_order && p.a_row == q.a_row &&
                    p.a_block == q.a_block && p.a_input == q.a_input && p.in_blocks == q.in_blocks;
  return same && p.pairs == q.pairs && p.quantised == q.quantised &&
         (p.pairs || p.weight_dtype == q.weight_dtype) &&
         std::equal(one.schedule.groups.begin(), one.schedule.groups.end(), other.schedule.groups.begin(),
                    other.schedule.groups.end(), alike);
}

// Memory of the calling thread that grows with its largest call.
inline void* tile_memory(int64_t bytes) {
  struct Free {
    void operator()(void* memory) const { ::operator delete(memory, std::align_val_t{64}); }
  };
  thread_local std::unique_ptr<void, Free> memory;
  thread_local int64_t size = 0;
  if (bytes > size) {
    memory.reset();
    memory.reset(::operator new(static_cast<size_t>(bytes), std::align_val_t{64}));
    size = bytes;
  }
  return memory.get();
}

// The activations of GEMMs of pairs in tiles, and those of others as integers.
inline void prepare_activations(std::vector<GemmJob>& jobs) {
  constexpr int64_t kLine = 64;
  int64_t bytes = 0;
  std::vector<int64_t> first(jobs.size()), sizes(jobs.size());
  for (size_t j = 0; j < jobs.size(); ++j) {
    first[j] = bytes;
    sizes[j] = j > 0 && reads_alike(jobs[j - 1], jobs[j]) ? 0 : prepared_bytes(jobs[j]);
    bytes += (sizes[j] + kLine - 1) / kLine * kLine;
  }
  if (bytes == 0) return;
  char* const memory = static_cast<char*>(tile_memory(bytes));
  for (size_t j = 0; j < jobs.size(); ++j) {
    ElasticGemmParams& p = jobs[j].p;
    if (!p.tiles && j > 0 && reads_alike(jobs[j - 1], jobs[j])) p.tiles = jobs[j - 1].p.tiles;
    if (sizes[j] == 0) continue;
    p.tiles = memory + first[j];
    const int64_t rows = p.pairs ? kPairsGroupRows : kQuantisedGroupRows;
    parallel_for(static_cast<int64_t>(jobs[j].schedule.groups.size()), rows * p.in_blocks * p.groups->inputs,
                 [&](int64_t begin, int64_t end) {
                   (p.pairs ? FLEXTRON_FOR_PAIRS_ISA(elastic_gemm_tiles)
                            : FLEXTRON_FOR_QUANTISED_ISA(elastic_gemm_quantise))(p, begin, end);
                 });
  }
}

// Rows of x, in some order, as a GEMM reads them. Keep what is returned until it has run.
inline Tensor read_rows(ElasticGemmParams& p, const Tensor& x, const std::optional<Tensor>& order) {
  if (!p.pairs) {
    const Tensor wide = float_rows(x, order);
    read_along(p, wide);
    return wide;
  }
  const Tensor rows = adjacent(x);
  read_along(p, rows);
  p.x_order = order ? static_cast<const int64_t*>(order->const_data_ptr()) : nullptr;
  return rows;
}

// Multiplications of GEMMs whose parameters are set.
inline int64_t products_of(const std::vector<GemmJob>& jobs) {
  int64_t products = 0;
  for (const auto& [p, schedule] : jobs)
    for (const GemmGroup& g : schedule.groups)
      products += g.rows * g.inputs * g.features * p.in_blocks * p.out_blocks * (p.gated ? 2 : 1);
  return products;
}

// Multiplies; a thread's items are adjacent and weigh what another's do.
inline void multiply(std::vector<GemmJob>& jobs) {
  std::vector<int64_t> first{0};  // item of each job
  int64_t weight = 0;             // of every item; 0 where they differ
  for (GemmJob& job : jobs) {
    ElasticGemmParams& p = job.p;
    p.groups = job.schedule.groups.data();
    p.row_blocks = job.schedule.row_blocks.data();
    p.row_block_count = static_cast<int64_t>(job.schedule.row_blocks.size()) - 1;
    const GemmGroup &widest = job.schedule.groups.front(), &narrowest = job.schedule.groups.back();
    p.dots = are_dots(p, narrowest.row + narrowest.rows - widest.row);
    const bool even =
        p.row_block_count == 1 && narrowest.features == p.features && narrowest.inputs == widest.inputs;
    const int64_t each = even ? item_weight(p, 0, 0) : 0;
    weight = &job == &jobs.front() || each == weight ? each : 0;
    first.push_back(first.back() + p.items());
  }
  prepare_activations(jobs);
  const auto kernel = FLEXTRON_FOR_PLAIN_ISA(elastic_gemm);
  const auto run = [&](int64_t begin, int64_t end) {
    for (size_t j = 0; j < jobs.size(); ++j) {
      const int64_t from = std::max(begin, first[j]), to = std::min(end, first[j + 1]);
      if (from >= to) continue;
      const auto chosen = jobs[j].p.pairs       ? FLEXTRON_FOR_PAIRS_ISA(elastic_gemm)
                          : jobs[j].p.quantised ? FLEXTRON_FOR_QUANTISED_ISA(elastic_gemm_quantised)
                                                : kernel;
      chosen(jobs[j].p, from - first[j], to - first[j]);
    }
  };
  if (weight > 0) return parallel_for(first.back(), kPanel * weight, run);

  std::vector<int64_t> before{0};  // of all items, the weight of those before
  before.reserve(first.back() + 1);
  for (const GemmJob& job : jobs)
    for (int64_t row_block = 0; row_block < job.p.row_block_count; ++row_block)
      for (int64_t out_block = 0; out_block < job.p.out_blocks; ++out_block)
        for (int64_t strip = 0; strip < job.p.strips(); ++strip)
          before.push_back(before.back() + item_weight(job.p, row_block, strip));
  const auto item_at = [&](int64_t weight_before) {
    return std::lower_bound(before.begin(), before.end() - 1, weight_before) - before.begin();
  };
  parallel_for(before.back(), kPanel, [&](int64_t begin, int64_t end) { run(item_at(begin), item_at(end)); });
}

// Runs GEMMs that do not read one another's results side by side: one call of the threads instead of one
// each, which the loop that puts activations into tiles shares.
inline void run_gemms(std::vector<GemmJob> jobs) {
  std::erase_if(jobs, [](const GemmJob& job) { return job.schedule.groups.empty(); });
  if (jobs.empty()) return;
  const bool tiled =
      std::any_of(jobs.begin(), jobs.end(), [](const GemmJob& job) { return job.p.pairs && !job.p.tiles; });
  if (!tiled) return multiply(jobs);
  Team::lead(products_of(jobs), [&] { multiply(jobs); });
}

inline void run_gemm(GemmJob job) {
  std::vector<GemmJob> jobs;
  jobs.push_back(std::move(job));
  run_gemms(std::move(jobs));
}

// Parameters of nothing yet.
inline ElasticGemmParams no_gemm() {
  ElasticGemmParams p{};
  p.a_input = 1;
  p.in_blocks = p.out_blocks = 1;
  return p;
}

// The fields that follow from a plain weight [out_blocks * nw, in_blocks * kw] whose rows' elements are
// adjacent.
inline ElasticGemmParams on_rows(const Tensor& weight, int64_t in_blocks = 1, int64_t out_blocks = 1) {
  ElasticGemmParams p = no_gemm();
  p.layout = GemmLayout::kRows;
  p.weight_dtype = gemm_dtype(weight);
  p.weight[0] = weight.const_data_ptr();
  p.weight_stride = weight.stride(0);
  p.in_blocks = in_blocks;
  p.in_stride = weight.size(1) / in_blocks;
  p.out_blocks = out_blocks;
  p.out_stride = weight.size(0) / out_blocks;
  return p;
}

// Those of y = a b, b the columns of a plain matrix [in_blocks * in_stride, ..] from `column` on, whose rows'
// elements are adjacent: a gradient. y is [.., out_blocks * y_block] of the dtype of b's result.
inline ElasticGemmParams on_columns(const Tensor& b, int64_t column, const Tensor& y, int64_t y_block) {
  ElasticGemmParams p = no_gemm();
  p.layout = GemmLayout::kColumns;
  p.weight_dtype = gemm_dtype(b);
  p.weight[0] = static_cast<const char*>(b.const_data_ptr()) + column * b.element_size();
  p.weight_stride = b.stride(0);
  p.io = gemm_dtype(y);
  p.y = y.mutable_data_ptr();
  p.y_row = y.stride(0);
  p.y_block = y_block;
  return p;
}

// Rows [begin, end) of a weight's gradient are sums over the first `extent` rows of the activations.
inline std::vector<Step> steps_of(const std::vector<ColumnBlock>& blocks) {
  std::vector<Step> steps;
  for (const ColumnBlock& b : blocks) steps.push_back({b.rows, b.begin, b.end});
  return steps;
}

template <class T = void>
const T* data_or_null(const std::optional<Tensor>& t) {
  return t ? static_cast<const T*>(t->const_data_ptr()) : nullptr;
}

// One vector's elements in a row.
inline std::optional<Tensor> dense(const std::optional<Tensor>& t) {
  return t ? std::optional<Tensor>(torch::stable::contiguous(*t)) : std::nullopt;
}

}  // namespace flextron
