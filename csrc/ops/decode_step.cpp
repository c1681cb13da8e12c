// decode_step: a few new tokens through every layer of a Llama-family model on a CPU, in one call.
//
// Formula in csrc/kernels/decode_step.h. The weights come as one list, `parts` naming what each layer has, in
// order. The new keys and values are written into the caches; nothing else that is given is changed.
#include "kernels/decode_step.h"

#include <array>
#include <cmath>

#include "ops/activation.h"
#include "ops/attention_decode.h"
#include "ops/elastic_gemm.h"
#include "ops/packed.h"

namespace flextron {
namespace {

constexpr auto kOp = "decode_step";
constexpr int64_t kLongestHead = 1024;  // of csrc/kernels/decode_step_block.h

enum Part {
  kInNorm,
  kQ,
  kK,
  kV,
  kO,
  kMlpNorm,
  kGate,
  kUp,
  kDown,
  kQBias,
  kKBias,
  kVBias,
  kOBias,
  kGateBias,
  kUpBias,
  kDownBias,
  kQNorm,
  kKNorm,
  kQScales,
  kKScales,
  kVScales,
  kOScales,
  kUpScales,
  kDownScales,
  kPartCount
};
constexpr const char* kPartNames[kPartCount] = {
    "in_norm", "q",      "k",        "v",        "o",        "mlp_norm",  "gate",      "up",
    "down",    "q_bias", "k_bias",   "v_bias",   "o_bias",   "gate_bias", "up_bias",   "down_bias",
    "q_norm",  "k_norm", "q_scales", "k_scales", "v_scales", "o_scales",  "up_scales", "down_scales"};

// Where each part is among a layer's weights; -1 where it is not.
struct Layout {
  std::array<int, kPartCount> at;
  int count = 0;

  explicit Layout(const std::string& parts) {
    at.fill(-1);
    std::istringstream words(parts);
    for (std::string word; words >> word; ++count) {
      const auto* const found = std::find(std::begin(kPartNames), std::end(kPartNames), word);
      if (found == std::end(kPartNames) || at[found - kPartNames] >= 0)
        fail(kOp, ": parts must name each part of a layer once, got ", word);
      at[found - kPartNames] = count;
    }
    for (const Part part : {kInNorm, kQ, kK, kV, kO, kMlpNorm, kUp, kDown})
      if (at[part] < 0) fail(kOp, ": parts must have ", kPartNames[part], ", got ", parts);
  }
};

struct Layer {
  const Tensor* weights;
  const Layout& layout;

  const Tensor* find(Part part) const { return layout.at[part] < 0 ? nullptr : weights + layout.at[part]; }
  const Tensor& get(Part part) const { return weights[layout.at[part]]; }
};

struct Shape {
  int64_t B, T, R, K, H, G, M, D;
  bool by_group;
};

void check_vector(const char* name, const Tensor& t, int64_t size, const Tensor& x) {
  check_like(kOp, name, t, {size}, x.scalar_type(), x.device());
  if (size > 1 && t.stride(0) != 1) fail(kOp, ": ", name, " must be contiguous, got strides");
}

// A layer of N = out_blocks * nw outputs and in_blocks * kw inputs: plain [N, inputs], or panels of it.
ElasticGemmParams linear(const char* name, const Tensor& weight, const Tensor* scales, int64_t out_blocks,
                         int64_t nw, int64_t in_blocks, int64_t kw, const Tensor& x) {
  if (weight.dim() == 4) {
    const OptionalTensor given = scales ? OptionalTensor(*scales) : std::nullopt;
    check_panels(kOp, name, weight, "scales", given, x);
    check_shape(kOp, name, weight, {out_blocks, (nw + kPanel - 1) / kPanel, in_blocks * kw, kPanel});
    return on_panels(weight, given, in_blocks);
  }
  if (scales) fail(kOp, ": ", name, "_scales must not be given for a plain weight, got a tensor");
  check_like(kOp, name, weight, {out_blocks * nw, in_blocks * kw}, x.scalar_type(), x.device());
  if (weight.size(1) > 1 && weight.stride(1) != 1)
    fail(kOp, ": ", name, " must have contiguous rows, got strides");
  ElasticGemmParams p{};
  p.a_input = 1;
  p.layout = GemmLayout::kRows;
  p.weight_dtype = gemm_dtype(weight);
  p.weight[0] = weight.const_data_ptr();
  p.weight_stride = weight.stride(0);
  p.in_blocks = in_blocks, p.in_stride = kw;
  p.out_blocks = out_blocks, p.out_stride = nw;
  p.activation = Activation::kSilu;
  p.io = GemmDtype::kFloat;
  return p;
}

// What a layer's weights are to the kernels, every one of them checked.
struct Prepared {
  ElasticGemmParams q, k, v, o, up, down;
};

void check_bias(const Layer& layer, Part part, int64_t size, const Tensor& x) {
  if (const Tensor* const t = layer.find(part)) check_vector(kPartNames[part], *t, size, x);
}

ElasticGemmParams prepare_up(const Layer& layer, int64_t neurons, int64_t K, const Tensor& x) {
  const Tensor &up = layer.get(kUp), *const gate = layer.find(kGate), *const scales = layer.find(kUpScales);
  const bool packed = up.dim() == 4;
  if (packed == (gate != nullptr))
    fail(kOp, ": gate must be given with a plain up, and be among the panels of a packed one, got ",
         gate ? "both" : "neither");
  if (!packed) {
    ElasticGemmParams p = linear("gate", *gate, nullptr, 1, neurons, 1, K, x);
    const ElasticGemmParams second = linear("up", up, scales, 1, neurons, 1, K, x);
    if (second.weight_stride != p.weight_stride) fail(kOp, ": up must have the strides of gate, got others");
    p.weight[1] = second.weight[0];
    return p;
  }
  const OptionalTensor given = scales ? OptionalTensor(*scales) : std::nullopt;
  check_panels(kOp, "up", up, "scales", given, x);
  check_shape(kOp, "up", up, {1, 2 * ((neurons + kPanel - 1) / kPanel), K, kPanel});
  return on_panels(up, given, 1);
}

Prepared prepare(const Layer& layer, const Shape& s, int64_t neurons, Activation activation,
                 const Tensor& x) {
  const int64_t blocks = s.by_group ? 1 : s.G, queries = s.H * s.D, groups = s.G * s.D;
  check_vector("in_norm", layer.get(kInNorm), s.K, x);
  check_vector("mlp_norm", layer.get(kMlpNorm), s.K, x);
  check_bias(layer, kQBias, queries, x), check_bias(layer, kKBias, groups, x);
  check_bias(layer, kVBias, groups, x), check_bias(layer, kOBias, s.K, x);
  check_bias(layer, kGateBias, neurons, x), check_bias(layer, kUpBias, neurons, x);
  check_bias(layer, kDownBias, s.K, x);
  check_bias(layer, kQNorm, s.D, x), check_bias(layer, kKNorm, s.D, x);
  Prepared p{.q = linear("q", layer.get(kQ), layer.find(kQScales), blocks, queries / blocks, 1, s.K, x),
             .k = linear("k", layer.get(kK), layer.find(kKScales), 1, groups, 1, s.K, x),
             .v = linear("v", layer.get(kV), layer.find(kVScales), 1, groups, 1, s.K, x),
             .o = linear("o", layer.get(kO), layer.find(kOScales), 1, s.K, blocks, queries / blocks, x),
             .up = prepare_up(layer, neurons, s.K, x),
             .down = linear("down", layer.get(kDown), layer.find(kDownScales), 1, s.K, 1, neurons, x)};
  p.up.hidden = p.up.gated = true;
  p.up.activation = activation;
  return p;
}

struct Job {
  ElasticGemmParams p;
  GemmSchedule schedule;
};

// Several GEMMs of equal inputs side by side: one call of the threads instead of one each.
void run_jobs(std::vector<Job>& jobs) {
  std::vector<int64_t> before{0};
  int64_t cost = 0;
  for (Job& job : jobs) {
    job.p.groups = job.schedule.groups.data();
    job.p.row_blocks = job.schedule.row_blocks.data();
    job.p.row_block_count = static_cast<int64_t>(job.schedule.row_blocks.size()) - 1;
    before.push_back(before.back() + job.p.items());
    const GemmGroup& first = job.schedule.groups.front();
    cost = std::max(cost, kPanel * job.p.in_blocks * (first.inputs + 1) * (job.p.gated ? 2 : 1));
  }
  const auto kernel = FLEXTRON_FOR_EACH_ISA(elastic_gemm);
  parallel_for(before.back(), cost, [&](int64_t begin, int64_t end) {
    for (size_t i = 0; i < jobs.size(); ++i) {
      const int64_t from = std::max(begin, before[i]), to = std::min(end, before[i + 1]);
      if (from < to) kernel(jobs[i].p, from - before[i], to - before[i]);
    }
  });
}

// Scratch floats of one call.
struct Buffers {
  Tensor memory;
  float* next;

  Buffers(const Tensor& x, int64_t count)
      : memory(empty(x, {count}, ScalarType::Float)), next(static_cast<float*>(memory.mutable_data_ptr())) {}
  float* take(int64_t count) {
    float* const at = next;
    next += count;
    return at;
  }
};

template <class scalar_t>
class Pass {
 public:
  Pass(const Shape& shape, const Tensor& x, int64_t neurons, int64_t logits, int64_t keep)
      : s(shape),
        x_(x),
        row_(padded_row(shape.K)),
        hidden_row_(padded_row(neurons)),
        heads_(shape.H * shape.D),
        out_(zeros(x, {shape.R, heads_})),
        q_(empty(x, {shape.R, heads_})),
        buffers_(x, shape.R * (2 * row_ + shape.K + hidden_row_ + 2 * heads_ + 2 * shape.G * shape.D) +
                        shape.B * keep * (logits + row_) + 4 * std::max({neurons, heads_, shape.K}) + 64) {
    residual = buffers_.take(s.R * row_), normed = buffers_.take(s.R * row_);
    added = buffers_.take(s.R * s.K), hidden = buffers_.take(s.R * hidden_row_);
    q = buffers_.take(s.R * heads_), attended = buffers_.take(s.R * heads_);
    k = buffers_.take(s.R * s.G * s.D), v = buffers_.take(s.R * s.G * s.D);
    for (float*& b : bias_) b = buffers_.take(std::max({neurons, heads_, s.K}));
    widen(x, s.R, s.K, residual, row_);
  }

  void widen(const Tensor& from, int64_t rows, int64_t columns, float* to, int64_t to_stride) const {
    widen(from.const_data_ptr(), rows, columns, columns, to, to_stride);
  }
  void widen(const void* from, int64_t rows, int64_t columns, int64_t stride, float* to,
             int64_t to_stride) const {
    const GemmRowsParams p{from, gemm_dtype(x_), nullptr, to, columns, stride, to_stride};
    FLEXTRON_FOR_EACH_ISA(elastic_gemm_rows)(p, 0, rows);
  }

  // A bias as floats, in one of the four places there are for one.
  const float* bias(const Tensor* t, int64_t size, int place) const {
    if (!t) return nullptr;
    widen(*t, 1, size, bias_[place], size);
    return bias_[place];
  }

  void norm(const Tensor& weight, const float* add, float eps) const {
    const DecodeStepNormParams<scalar_t> p{residual, add, data_of<scalar_t>(weight), normed, s.K, row_, eps};
    const auto kernel = FLEXTRON_FOR_ISA(decode_step_norm, scalar_t);
    parallel_for(s.R, s.K, [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
  }

  Job job(ElasticGemmParams p, const float* a, int64_t a_row, int64_t a_block, int64_t inputs,
          int64_t features, float* y, int64_t y_row) const {
    p.a = a, p.a_row = a_row, p.a_block = a_block;
    p.features = features, p.y = y, p.y_row = y_row, p.y_block = features;
    return {p,
            gemm_schedule(
                {{0, 0, s.R}}, [&](const Step&) { return inputs; }, [&](const Step&) { return features; })};
  }

  // The projections, and the new keys and values into the cache.
  void project(const Layer& layer, const Prepared& of, int64_t heads, int64_t stored, const Tensor& cos,
               const Tensor& sin, const Tensor& keys, const Tensor& values, int64_t cached, float eps) {
    const int64_t blocks = s.by_group ? 1 : s.G, per_block = s.by_group ? heads * s.M : heads;
    std::vector<Job> jobs;
    const auto add = [&](ElasticGemmParams p, Part bias_part, int place, int64_t outputs, int64_t features,
                         float* y) {
      p.bias[0] = bias(layer.find(bias_part), outputs, place);
      p.bias_block = outputs / p.out_blocks;
      if (features > 0) jobs.push_back(job(p, normed, row_, 0, s.K, features, y, p.out_blocks * features));
    };
    add(of.q, kQBias, 0, s.H * s.D, per_block * s.D, q);
    add(of.k, kKBias, 1, s.G * s.D, stored * s.D, k);
    add(of.v, kVBias, 2, s.G * s.D, stored * s.D, v);
    if (!jobs.empty()) run_jobs(jobs);
    const int64_t q_row = blocks * per_block * s.D;
    turn(q, layer.find(kQNorm), &cos, &sin, mutable_data_of<scalar_t>(q_), blocks * per_block, s.T * q_row,
         q_row, s.D, eps);
    const auto row_of = [&](const Tensor& cache) {
      return mutable_data_of<scalar_t>(cache) + cached * cache.stride(1);
    };
    turn(k, layer.find(kKNorm), &cos, &sin, row_of(keys), stored, keys.stride(0), keys.stride(1),
         keys.stride(2), eps);
    turn(v, nullptr, nullptr, nullptr, row_of(values), stored, values.stride(0), values.stride(1),
         values.stride(2), eps);
  }

  void attend(int64_t heads, const Tensor& keys, const Tensor& values, int64_t cached,
              const std::vector<int64_t>& starts, double scale) {
    AttentionPlan plan{};
    plan.G = s.by_group ? heads : s.G, plan.M = s.by_group ? s.M : heads;
    plan.H = plan.G * plan.M, plan.D = s.D;
    if (plan.H == 0) return;
    plan.heads = plan.G, plan.by_group = true, plan.causal = true, plan.scale = scale;
    plan.page = keys.size(1);
    for (int64_t b = 0; b < s.B; ++b) plan.pages.push_back(b);
    for (int64_t b = 0; b < s.B; ++b)
      plan.sequences.push_back({.query = b * s.T,
                                .T = s.T,
                                .S = cached + s.T,
                                .k_start = starts.empty() ? 0 : starts[b],
                                .position = 0,
                                .pages = plan.pages.data() + b});
    plan.measure();
    auto p = attention_params<scalar_t>(plan);
    p.q = data_of<scalar_t>(q_), p.q_stride_t = plan.H * s.D, p.q_stride_h = s.D;
    p.k = {data_of<scalar_t>(keys), keys.stride(0), keys.stride(1), keys.stride(2)};
    p.v = {data_of<scalar_t>(values), values.stride(0), values.stride(1), values.stride(2)};
    p.out = mutable_data_of<scalar_t>(out_);
    run_decode(plan, p, q_);
    const int64_t row = plan.H * s.D;
    widen(out_.const_data_ptr(), s.R, row, row, attended, row);
  }

  void project_out(const Layer& layer, const Prepared& of, int64_t heads) {
    const int64_t blocks = s.by_group ? 1 : s.G, inputs = (s.by_group ? heads * s.M : heads) * s.D;
    ElasticGemmParams p = of.o;
    p.bias[0] = bias(layer.find(kOBias), s.K, 3);
    std::vector<Job> jobs{job(p, attended, blocks * inputs, inputs, inputs, s.K, added, s.K)};
    run_jobs(jobs);
  }

  void mlp(const Layer& layer, const Prepared& of, int64_t width, int64_t neurons) {
    if (width > 0) {
      ElasticGemmParams up = of.up;
      up.bias[0] = bias(layer.find(kGateBias), neurons, 0);
      up.bias[1] = bias(layer.find(kUpBias), neurons, 1);
      std::vector<Job> jobs{job(up, normed, row_, 0, s.K, width, hidden, hidden_row_)};
      run_jobs(jobs);
    }
    ElasticGemmParams down = of.down;
    down.bias[0] = bias(layer.find(kDownBias), s.K, 2);
    std::vector<Job> jobs{job(down, hidden, hidden_row_, 0, width, s.K, added, s.K)};
    run_jobs(jobs);
  }

  // The logits of the last `keep` tokens of each sequence.
  Tensor logits(const ElasticGemmParams& head, int64_t vocabulary, int64_t keep) {
    const Tensor y = empty(x_, {s.B, keep, vocabulary});
    if (y.numel() == 0) return y;
    float* const rows = buffers_.take(s.B * keep * row_);
    for (int64_t i = 0; i < s.B * keep; ++i) {
      const float* const from = normed + (i / keep * s.T + s.T - keep + i % keep) * row_;
      std::copy(from, from + s.K, rows + i * row_);
    }
    std::vector<Job> jobs{job(head, rows, row_, 0, s.K, vocabulary, nullptr, vocabulary)};
    jobs[0].schedule = gemm_schedule(
        {{0, 0, s.B * keep}}, [&](const Step&) { return s.K; }, [&](const Step&) { return vocabulary; });
    jobs[0].p.io = gemm_dtype(x_);
    jobs[0].p.y = y.mutable_data_ptr();
    run_jobs(jobs);
    return y;
  }

  const float* sums() const { return added; }

 private:
  void turn(const float* from, const Tensor* norm, const Tensor* cos, const Tensor* sin, scalar_t* to,
            int64_t heads, int64_t stride_b, int64_t stride_t, int64_t stride_h, float eps) const {
    const DecodeStepHeadsParams<scalar_t> p{.from = from,
                                            .norm = norm ? data_of<scalar_t>(*norm) : nullptr,
                                            .cos = cos ? data_of<scalar_t>(*cos) : nullptr,
                                            .sin = sin ? data_of<scalar_t>(*sin) : nullptr,
                                            .to = to,
                                            .to_stride_b = stride_b,
                                            .to_stride_t = stride_t,
                                            .to_stride_h = stride_h,
                                            .T = s.T,
                                            .heads = heads,
                                            .D = s.D,
                                            .R = cos ? cos->size(2) : 0,
                                            .one_table = !cos || cos->size(0) == 1,
                                            .eps = eps};
    const auto kernel = FLEXTRON_FOR_ISA(decode_step_heads, scalar_t);
    parallel_for(s.R, heads * s.D, [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
  }

  Shape s;
  const Tensor& x_;
  int64_t row_, hidden_row_, heads_;
  Tensor out_, q_;
  Buffers buffers_;
  float *residual, *normed, *added, *hidden, *q, *attended, *k, *v;
  float* bias_[4];
};

void check_cache(const char* name, const Tensor& t, const Shape& s, int64_t stored, int64_t end,
                 const Tensor& x) {
  check_dim(kOp, name, t, 4);
  check_dtype(kOp, name, t, x.scalar_type());
  check_device(kOp, name, t, x.device());
  if (t.size(0) != s.B || t.size(1) < end || t.size(2) < stored || t.size(3) != s.D)
    fail(kOp, ": ", name, " must have shape [", s.B, ", at least ", end, ", at least ", stored, ", ", s.D,
         "], got ", shape_text(t.sizes()));
  if (s.D > 1 && t.stride(3) != 1)
    fail(kOp, ": ", name, " must have a contiguous last dimension, got strides");
}

}  // namespace

Tensor decode_step(const Tensor& x, const Tensor& cos, const Tensor& sin, const std::vector<Tensor>& weights,
                   const Text& parts, const std::vector<Tensor>& keys, const std::vector<Tensor>& values,
                   int64_t cached, const std::vector<int64_t>& widths, const std::vector<int64_t>& heads,
                   const std::vector<int64_t>& kv_heads, int64_t neurons, int64_t query_heads, int64_t groups,
                   const Tensor& norm, const Tensor& head, const OptionalTensor& head_scales,
                   int64_t vocabulary, double eps, int64_t keep, const Text& unit, const Text& activation,
                   const OptionalTensor& k_start, std::optional<double> scale) {
  const NoGrad no_grad;
  check_dim(kOp, "x", x, 3);
  if (!x.is_cpu()) fail(kOp, ": x must be on cpu, got ", device_text(x.device()));
  const Layout layout(parts.value);
  const int64_t layers = widths.size();
  const std::pair<const char*, size_t> lists[] = {{"heads", heads.size()},
                                                  {"kv_heads", kv_heads.size()},
                                                  {"keys", keys.size()},
                                                  {"values", values.size()}};
  for (const auto& [name, size] : lists)
    if (static_cast<int64_t>(size) != layers)
      fail(kOp, ": ", name, " must have ", layers, " entries, got ", size);
  if (static_cast<int64_t>(weights.size()) != layers * layout.count)
    fail(kOp, ": weights must have ", layers * layout.count, " entries, got ", weights.size());
  check_positive(kOp, "groups", groups);
  if (query_heads < groups || query_heads % groups != 0)
    fail(kOp, ": query_heads must be a multiple of the ", groups, " groups, got ", query_heads);
  if (unit.value != "kv_group" && unit.value != "query")
    fail(kOp, ": unit must be kv_group or query, got ", unit.value);
  const int64_t B = x.size(0), T = x.size(1), K = x.size(2);
  const int64_t D = keys.empty() ? 1 : keys[0].dim() == 4 ? keys[0].size(3) : 0;
  check_range(kOp, "the size of a head", D, 1, kLongestHead);
  const Shape s{B, T, B * T, K, query_heads, groups, query_heads / groups, D, unit.value == "kv_group"};
  check_range(kOp, "cached", cached, 0, std::numeric_limits<int64_t>::max() - T);
  check_range(kOp, "keep", keep, 0, T);
  check_range(kOp, "vocabulary", vocabulary, 0, std::numeric_limits<int64_t>::max());
  check_dim(kOp, "cos", cos, 3);
  const int64_t tables = cos.size(0) == 1 ? 1 : B, turned = cos.size(2);
  if (turned > D || turned % 2 != 0)
    fail(kOp, ": cos.size(2) must be even and at most ", D, ", got ", turned);
  check_like(kOp, "cos", cos, {tables, T, turned}, x.scalar_type(), x.device());
  check_like(kOp, "sin", sin, {tables, T, turned}, x.scalar_type(), x.device());
  for (int64_t l = 0; l < layers; ++l) {
    check_range(kOp, "widths", widths[l], 0, neurons);
    check_range(kOp, "heads", heads[l], 0, s.by_group ? groups : s.M);
    check_range(kOp, "kv_heads", kv_heads[l], s.by_group ? heads[l] : groups, groups);
    check_cache("keys", keys[l], s, kv_heads[l], cached + T, x);
    check_cache("values", values[l], s, kv_heads[l], cached + T, x);
  }
  const Activation act = activation_of(kOp, activation.value);
  auto starts = k_start ? check_list(kOp, "k_start", *k_start, B, std::numeric_limits<int64_t>::max(), x)
                        : std::vector<int64_t>{};
  for (int64_t& start : starts) start = std::min(start, cached + T);

  std::vector<Prepared> prepared;
  for (int64_t l = 0; l < layers; ++l)
    prepared.push_back(prepare({weights.data() + l * layout.count, layout}, s, neurons, act, x));
  check_vector("norm", norm, K, x);
  const ElasticGemmParams last =
      linear("head", head, head_scales ? &*head_scales : nullptr, 1, vocabulary, 1, K, x);

  if (s.R == 0) return empty(x, {B, keep, vocabulary});
  Tensor y = empty(x, {0});
  const Tensor x_ = torch::stable::contiguous(x), cos_ = torch::stable::contiguous(cos),
               sin_ = torch::stable::contiguous(sin);
  const double by = scale.value_or(1 / std::sqrt(static_cast<double>(D)));
  dispatch_dtype(DecodeStepTypes{}, kOp, x.scalar_type(), [&]<class scalar_t>() {
    Pass<scalar_t> pass(s, x_, neurons, 0, keep);
    const float* add = nullptr;  // what the residual stream still lacks
    for (int64_t l = 0; l < layers; ++l) {
      const Layer layer{weights.data() + l * layout.count, layout};
      pass.norm(layer.get(kInNorm), add, eps);
      pass.project(layer, prepared[l], heads[l], kv_heads[l], cos_, sin_, keys[l], values[l], cached, eps);
      pass.attend(heads[l], keys[l], values[l], cached, starts, by);
      pass.project_out(layer, prepared[l], heads[l]);
      pass.norm(layer.get(kMlpNorm), pass.sums(), eps);
      pass.mlp(layer, prepared[l], widths[l], neurons);
      add = pass.sums();
    }
    pass.norm(norm, add, eps);
    y = pass.logits(last, vocabulary, keep);
  });
  return y;
}

}  // namespace flextron
