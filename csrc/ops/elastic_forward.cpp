// elastic_forward: tokens through every layer of a Llama-family model on a CPU, in one call.
//
// Formula in csrc/kernels/elastic_forward.h. The weights come as one list, `parts` naming what each layer
// has, in order. Every layer has one width for all, one for each sequence, or one that the router chooses for
// each token. The new keys and values are written into the caches; nothing else that is given is changed.
//
// elastic_forward_hold keeps the weights for any number of calls of elastic_forward_held: to unpack and check
// those of 30 layers anew takes a tenth of a small model's step.
#include "kernels/elastic_forward.h"

#include <array>
#include <cmath>
#include <map>
#include <memory>
#include <mutex>

#include "ops/activation.h"
#include "ops/attention_decode.h"
#include "ops/elastic_gemm.h"
#include "ops/packed.h"

namespace flextron {
namespace {

constexpr auto kOp = "elastic_forward";
constexpr auto kHeldOp = "elastic_forward_held";
constexpr auto kDropOp = "elastic_forward_drop";
constexpr int64_t kLongestHead = 1024;  // of csrc/kernels/elastic_forward_block.h

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
// Of weights alone, which do not know how many tokens come.
Shape shape_of_weights(int64_t K, int64_t query_heads, int64_t groups, int64_t D, const std::string& unit) {
  check_positive(kOp, "groups", groups);
  if (query_heads < groups || query_heads % groups != 0)
    fail(kOp, ": query_heads must be a multiple of the ", groups, " groups, got ", query_heads);
  if (unit != "kv_group" && unit != "query") fail(kOp, ": unit must be kv_group or query, got ", unit);
  check_range(kOp, "the size of a head", D, 1, kLongestHead);
  return {0, 0, 0, K, query_heads, groups, query_heads / groups, D, unit == "kv_group"};
}

void check_vector(const char* name, const Tensor& t, int64_t size, const Tensor& x) {
  check_like(kOp, name, t, {size}, x.scalar_type(), x.device());
  if (size > 1 && t.stride(0) != 1) fail(kOp, ": ", name, " must be contiguous, got strides");
}

// The format of a model's panels; nothing where its weights are plain.
using Format = std::optional<PanelFormat>;
Format format_of(const std::string& name) {
  return name == "plain" ? std::nullopt : Format(panel_format(kOp, name));
}

// A layer of N = out_blocks * nw outputs and in_blocks * kw inputs: plain [N, inputs], or panels of it.
ElasticGemmParams linear(const Format& format, const char* name, const Tensor& weight, const Tensor* scales,
                         int64_t out_blocks, int64_t nw, int64_t in_blocks, int64_t kw, const Tensor& x) {
  if (format) {
    const OptionalTensor given = scales ? OptionalTensor(*scales) : std::nullopt;
    const PackedWeight packed{*format, name, weight, "scales", given};
    check_panels(kOp, packed, x);
    check_shape(kOp, name, weight, {out_blocks, (nw + kPanel - 1) / kPanel, in_blocks * kw, kPanel});
    return on_panels(packed, in_blocks);
  }
  if (scales) fail(kOp, ": ", name, "_scales must not be given for a plain weight, got a tensor");
  check_like(kOp, name, weight, {out_blocks * nw, in_blocks * kw}, x.scalar_type(), x.device());
  if (weight.size(1) > 1 && weight.stride(1) != 1)
    fail(kOp, ": ", name, " must have contiguous rows, got strides");
  ElasticGemmParams p = on_rows(weight, in_blocks, out_blocks);
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

ElasticGemmParams prepare_up(const Format& format, const Layer& layer, int64_t neurons, int64_t K,
                             const Tensor& x) {
  const Tensor &up = layer.get(kUp), *const gate = layer.find(kGate), *const scales = layer.find(kUpScales);
  if (format.has_value() == (gate != nullptr))
    fail(kOp, ": gate must be given with a plain up, and be among the panels of a packed one, got ",
         gate ? "both" : "neither");
  if (!format) {
    ElasticGemmParams p = linear(format, "gate", *gate, nullptr, 1, neurons, 1, K, x);
    const ElasticGemmParams second = linear(format, "up", up, scales, 1, neurons, 1, K, x);
    if (second.weight_stride != p.weight_stride) fail(kOp, ": up must have the strides of gate, got others");
    p.weight[1] = second.weight[0];
    return p;
  }
  const OptionalTensor given = scales ? OptionalTensor(*scales) : std::nullopt;
  const PackedWeight packed{*format, "up", up, "scales", given};
  check_panels(kOp, packed, x);
  check_shape(kOp, "up", up, {1, 2 * ((neurons + kPanel - 1) / kPanel), K, kPanel});
  return on_panels(packed, 1);
}

Prepared prepare(const Format& format, const Layer& layer, const Shape& s, int64_t neurons,
                 Activation activation, const Tensor& x) {
  const int64_t blocks = s.by_group ? 1 : s.G, queries = s.H * s.D, groups = s.G * s.D;
  check_vector("in_norm", layer.get(kInNorm), s.K, x);
  check_vector("mlp_norm", layer.get(kMlpNorm), s.K, x);
  check_bias(layer, kQBias, queries, x), check_bias(layer, kKBias, groups, x);
  check_bias(layer, kVBias, groups, x), check_bias(layer, kOBias, s.K, x);
  check_bias(layer, kGateBias, neurons, x), check_bias(layer, kUpBias, neurons, x);
  check_bias(layer, kDownBias, s.K, x);
  check_bias(layer, kQNorm, s.D, x), check_bias(layer, kKNorm, s.D, x);
  Prepared p{
      .q = linear(format, "q", layer.get(kQ), layer.find(kQScales), blocks, queries / blocks, 1, s.K, x),
      .k = linear(format, "k", layer.get(kK), layer.find(kKScales), 1, groups, 1, s.K, x),
      .v = linear(format, "v", layer.get(kV), layer.find(kVScales), 1, groups, 1, s.K, x),
      .o = linear(format, "o", layer.get(kO), layer.find(kOScales), 1, s.K, blocks, queries / blocks, x),
      .up = prepare_up(format, layer, neurons, s.K, x),
      .down = linear(format, "down", layer.get(kDown), layer.find(kDownScales), 1, s.K, 1, neurons, x)};
  p.up.hidden = p.up.gated = true;
  p.up.activation = activation;
  return p;
}

// All weights, checked, with what the kernels are to know of them.
struct Model {
  Layout layout;
  std::vector<Tensor> weights;
  Tensor norm, head;
  OptionalTensor head_scales;
  Shape shape;  // of weights alone
  int64_t layers, neurons, vocabulary;
  float eps;
  double scale;
  std::vector<Prepared> prepared;
  ElasticGemmParams last;

  // `like` has the dtype and the device.
  Model(const Tensor& like, const Shape& s, int64_t layer_count, std::vector<Tensor> given,
        const Layout& parts, const Tensor& last_norm, const Tensor& logits, const OptionalTensor& scales,
        int64_t neuron_count, int64_t words, double epsilon, const std::string& activation,
        std::optional<double> score_scale, const Format& format)
      : layout(parts),
        weights(std::move(given)),
        norm(last_norm),
        head(logits),
        head_scales(scales),
        shape(s),
        layers(layer_count),
        neurons(neuron_count),
        vocabulary(words),
        eps(static_cast<float>(epsilon)),
        scale(score_scale.value_or(1 / std::sqrt(static_cast<double>(s.D)))) {
    if (static_cast<int64_t>(weights.size()) != layers * layout.count)
      fail(kOp, ": weights must have ", layers * layout.count, " entries, got ", weights.size());
    check_range(kOp, "vocabulary", vocabulary, 0, std::numeric_limits<int64_t>::max());
    check_finite(kOp, "eps", epsilon);
    if (epsilon < 0) fail(kOp, ": eps must not be negative, got ", epsilon);
    check_finite(kOp, "scale", scale);
    const Activation curve = activation_of(kOp, activation);
    for (int64_t l = 0; l < layers; ++l)
      prepared.push_back(prepare(format, layer(l), s, neurons, curve, like));
    check_vector("norm", norm, s.K, like);
    last = linear(format, "head", head, head_scales ? &*head_scales : nullptr, 1, vocabulary, 1, s.K, like);
  }

  Layer layer(int64_t l) const { return {weights.data() + l * layout.count, layout}; }
};

// The adaptive router of all layers: formula in csrc/kernels/elastic_forward.h.
struct Router {
  Tensor w1, w2, state, base;
  std::vector<int64_t> neurons, heads;  // the choices
  int64_t hidden = 0, choices = 0;
  int64_t rows_each = 0;  // of a request

  explicit operator bool() const { return hidden > 0; }
  ElasticGemmParams first(int64_t l) const { return layer(w1, l); }
  ElasticGemmParams second(int64_t l) const { return layer(w2, l); }
  // A row's part of state or base.
  const float* of_row(const Tensor& t, int64_t l, int64_t row) const {
    return data_of<float>(t) + l * t.stride(0) + row / rows_each * t.stride(1);
  }
  int64_t most_neurons() const { return *std::max_element(neurons.begin(), neurons.end()); }
  int64_t most_heads() const { return *std::max_element(heads.begin(), heads.end()); }

 private:
  static ElasticGemmParams layer(const Tensor& t, int64_t l) {
    ElasticGemmParams p = no_gemm();
    p.layout = GemmLayout::kRows;
    p.weight_dtype = p.io = GemmDtype::kFloat;
    p.weight[0] = data_of<float>(t) + l * t.stride(0);
    p.weight_stride = p.in_stride = t.size(2);
    p.out_stride = t.size(1);
    return p;
  }
};

Router check_router(const std::optional<std::vector<Tensor>>& given,
                    const std::optional<std::vector<int64_t>>& mlp_choices,
                    const std::optional<std::vector<int64_t>>& head_choices, int64_t layers, const Shape& s,
                    int64_t neurons, const Tensor& x) {
  Router r;
  const auto menu = [&](const char* name, const std::optional<std::vector<int64_t>>& choices, int64_t most) {
    if (choices.has_value() != given.has_value())
      fail(kOp, ": ", name, " must be given with a router and with none else, got ",
           given ? "a router alone" : "no router");
    if (!given) return std::vector<int64_t>{};
    if (choices->empty()) fail(kOp, ": ", name, " must have an entry, got none");
    for (const int64_t choice : *choices) check_range(kOp, name, choice, 0, most);
    return *choices;
  };
  r.neurons = menu("mlp_choices", mlp_choices, neurons);
  r.heads = menu("head_choices", head_choices, s.by_group ? s.G : s.M);
  if (!given) return r;
  if (given->size() != 4) fail(kOp, ": router must have 4 tensors, got ", given->size());
  r.choices = static_cast<int64_t>(r.neurons.size() + r.heads.size());
  check_dim(kOp, "router[0]", (*given)[0], 3);
  check_dim(kOp, "router[3]", (*given)[3], 3);
  r.hidden = (*given)[0].size(1);
  const int64_t requests = (*given)[3].size(1);
  check_positive(kOp, "router[0].size(1)", r.hidden);
  if (requests < 1 || s.B % requests != 0)
    fail(kOp, ": x.size(0) must be a multiple of the ", requests, " requests of the router, got ", s.B);
  r.rows_each = s.B / requests * s.T;
  check_like(kOp, "router[0]", (*given)[0], {layers, r.hidden, s.K}, ScalarType::Float, x.device());
  check_like(kOp, "router[1]", (*given)[1], {layers, r.choices, r.hidden}, ScalarType::Float, x.device());
  check_like(kOp, "router[2]", (*given)[2], {layers, requests, r.hidden}, ScalarType::Float, x.device());
  check_like(kOp, "router[3]", (*given)[3], {layers, requests, r.choices}, ScalarType::Float, x.device());
  r.w1 = torch::stable::contiguous((*given)[0]), r.w2 = torch::stable::contiguous((*given)[1]);
  r.state = torch::stable::contiguous((*given)[2]), r.base = torch::stable::contiguous((*given)[3]);
  return r;
}

// What each row keeps of one axis of a layer, in its unit; sorted rows where they differ.
struct Used {
  Staircase stairs;
  std::vector<int64_t> extents;  // of each row; not where all have one

  int64_t widest() const { return stairs.steps.front().extent; }
  bool flat() const { return stairs.steps.size() == 1; }
  const int64_t* order() const { return flat() ? nullptr : stairs.order.data(); }
};

Used used_by_rows(std::vector<int64_t> extents, int64_t most) {
  Staircase stairs = make_staircase(extents.data(), extents.size(), most);
  return {std::move(stairs), std::move(extents)};
}

// The extents of an axis in each layer, one for all sequences or one for each; what a router will choose is
// empty.
std::vector<Used> check_used(const char* name, const std::vector<int64_t>& given, int64_t layers,
                             const Router& router, const Shape& s, int64_t most) {
  const int64_t each = layers == 0 ? 0 : static_cast<int64_t>(given.size()) / layers;
  if (router && !given.empty())
    fail(kOp, ": ", name, " must have no entries with a router, got ", given.size());
  if (!router && static_cast<int64_t>(given.size()) != layers * (each == s.B ? s.B : 1))
    fail(kOp, ": ", name, " must have ", layers, " entries", s.B > 1 ? ", or as many for each sequence" : "",
         ", got ", given.size());
  for (const int64_t extent : given) check_range(kOp, name, extent, 0, most);
  std::vector<Used> used(layers);
  if (router) return used;
  for (int64_t l = 0; l < layers; ++l) {
    if (each == 1) {
      used[l].stairs = flat_staircase(s.R, given[l]);
      continue;
    }
    std::vector<int64_t> rows(s.R);
    for (int64_t r = 0; r < s.R; ++r) rows[r] = given[l * each + r / s.T];
    used[l] = used_by_rows(std::move(rows), most);
  }
  return used;
}

// Inputs or features of a row.
struct Count {
  int64_t all, each;  // `each` for every unit of its extent

  int64_t of(const Step& step) const { return all + each * step.extent; }
};

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
  // x's rows are the tokens', or those that `order` names.
  Pass(const Shape& shape, const Tensor& x, const int64_t* order, int64_t neurons, const Router& router,
       int64_t keep)
      : s(shape),
        x_(x),
        row_(padded_row(shape.K)),
        hidden_row_(padded_row(neurons)),
        heads_(shape.H * shape.D),
        out_(empty(x, {shape.R, heads_})),  // what is not active is moved along, never used
        q_(empty(x, {shape.R, heads_})),
        every_(flat_staircase(shape.R, 0)),
        router_(router),
        buffers_(x, shape.R * (3 * row_ + shape.K + hidden_row_ + 2 * heads_ + 2 * shape.G * shape.D +
                               router.hidden + router.choices) +
                        shape.B * keep * row_ + 4 * std::max({neurons, heads_, shape.K})) {
    residual = buffers_.take(s.R * row_), normed = buffers_.take(s.R * row_);
    sorted_ = buffers_.take(s.R * row_);
    routed_ = buffers_.take(s.R * router.hidden), choices_ = buffers_.take(s.R * router.choices);
    added = buffers_.take(s.R * s.K), hidden = buffers_.take(s.R * hidden_row_);
    q = buffers_.take(s.R * heads_), attended = buffers_.take(s.R * heads_);
    k = buffers_.take(s.R * s.G * s.D), v = buffers_.take(s.R * s.G * s.D);
    for (float*& b : bias_) b = buffers_.take(std::max({neurons, heads_, s.K}));
    widen(x.const_data_ptr(), s.R, s.K, s.K, residual, row_, order);
  }

  void widen(const void* from, int64_t rows, int64_t columns, int64_t stride, float* to, int64_t to_stride,
             const int64_t* order = nullptr) const {
    const GemmRowsParams p{from, gemm_dtype(x_), order, to, columns, stride, to_stride};
    copy_rows(p, rows);
  }
  static void copy_rows(const GemmRowsParams& p, int64_t rows) {
    const auto kernel = FLEXTRON_FOR_PLAIN_ISA(elastic_gemm_rows);
    parallel_for(rows, p.columns, [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
  }

  // A bias as floats, in one of the four places there are for one.
  const float* bias(const Tensor* t, int64_t size, int place) const {
    if (!t) return nullptr;
    widen(t->const_data_ptr(), 1, size, size, bias_[place], size);
    return bias_[place];
  }

  void norm(const Tensor& weight, const float* add, float eps) const {
    const ElasticForwardNormParams<scalar_t> p{residual, add, data_of<scalar_t>(weight), normed, s.K,
                                               row_,     eps};
    const auto kernel = FLEXTRON_FOR_ISA(elastic_forward_norm, scalar_t);
    parallel_for(s.R, s.K, [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
  }

  // The normed rows in the order of an axis.
  const float* sorted(const Used& used) const {
    if (used.flat()) return normed;
    copy_rows({normed, GemmDtype::kFloat, used.order(), sorted_, s.K, row_, row_}, s.R);
    return sorted_;
  }

  // y's rows are a's, or where `order` sends them.
  static GemmJob job(ElasticGemmParams p, const float* a, int64_t a_row, int64_t a_block,
                     const Staircase& stairs, Count inputs, Count features, float* y, int64_t y_row,
                     const int64_t* order = nullptr) {
    p.a = a, p.a_row = a_row, p.a_block = a_block;
    p.features = features.of(stairs.steps.front());
    p.y = y, p.y_row = y_row, p.y_block = p.features, p.order = order;
    return {p, gemm_schedule(
                   stairs.steps, [&](const Step& step) { return inputs.of(step); },
                   [&](const Step& step) { return features.of(step); })};
  }

  // The projections, and the new keys and values into the cache. The router reads what they read: it chooses
  // `heads` and `neurons` beside the keys and values, of which every token stores the same.
  void project(int64_t l, const Layer& layer, const Prepared& of, Used& heads, Used& neurons, int64_t stored,
               const Tensor& cos, const Tensor& sin, const Tensor& keys, const Tensor& values, int64_t cached,
               float eps) {
    std::vector<GemmJob> jobs;
    const auto add = [&](const ElasticGemmParams& p, const float* a, const Staircase& stairs, Count features,
                         float* y, const int64_t* order = nullptr) {
      const int64_t most = features.of(stairs.steps.front());
      if (most > 0)
        jobs.push_back(job(p, a, row_, 0, stairs, {s.K, 0}, features, y, p.out_blocks * most, order));
    };
    ElasticGemmParams q_weight = of.q, k_weight = of.k, v_weight = of.v;
    set_bias(q_weight, layer.find(kQBias), s.H * s.D, 0);
    set_bias(k_weight, layer.find(kKBias), s.G * s.D, 1);
    set_bias(v_weight, layer.find(kVBias), s.G * s.D, 2);
    add(k_weight, normed, every_, {stored * s.D, 0}, k);
    add(v_weight, normed, every_, {stored * s.D, 0}, v);
    if (router_) {
      add(router_.first(l), normed, every_, {router_.hidden, 0}, routed_);
      run_gemms(std::move(jobs));
      jobs.clear();
      choose(l, heads, neurons);
    }
    add(q_weight, sorted(heads), heads.stairs, {0, each_head() * s.D}, q, heads.order());
    run_gemms(std::move(jobs));
    const int64_t q_heads = blocks() * each_head() * heads.widest(), q_row = q_heads * s.D;
    turn(q, layer.find(kQNorm), &cos, &sin, mutable_data_of<scalar_t>(q_), q_heads, s.T * q_row, q_row, s.D,
         eps);
    const auto row_of = [&](const Tensor& cache) {
      return mutable_data_of<scalar_t>(cache) + cached * cache.stride(1);
    };
    turn(k, layer.find(kKNorm), &cos, &sin, row_of(keys), stored, keys.stride(0), keys.stride(1),
         keys.stride(2), eps);
    turn(v, nullptr, nullptr, nullptr, row_of(values), stored, values.stride(0), values.stride(1),
         values.stride(2), eps);
  }

  // What the heads saw, in their order: rows of `heads`' widest.
  const float* attend(const Used& heads, const Tensor& keys, const Tensor& values, int64_t cached,
                      const std::vector<int64_t>& starts, double scale) const {
    const int64_t most = heads.widest();
    AttentionPlan plan{};
    plan.G = s.by_group ? most : s.G, plan.M = s.by_group ? s.M : most;
    plan.H = plan.G * plan.M, plan.D = s.D;
    if (plan.H == 0) return attended;
    plan.heads = most, plan.by_group = s.by_group, plan.causal = true, plan.scale = scale;
    if (!heads.flat()) plan.extent = heads.extents, plan.extent_stride_t = 1;
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
    // A sequence without a key may have no work, and so nobody who writes its rows.
    const auto is_blind = [&](int64_t start) { return start == cached + s.T; };
    if (std::any_of(starts.begin(), starts.end(), is_blind)) {
      Tensor out = out_;
      torch::stable::zero_(out);
    }
    run_decode(plan, p, q_);
    const int64_t row = plan.H * s.D;
    if (std::is_same_v<scalar_t, float> && heads.flat()) return data_of<float>(out_);
    widen(out_.const_data_ptr(), s.R, row, row, attended, row, heads.order());
    return attended;
  }

  void project_out(const Layer& layer, const Prepared& of, const Used& heads, const float* seen) {
    const int64_t block = each_head() * heads.widest() * s.D;
    ElasticGemmParams p = of.o;
    p.bias[0] = bias(layer.find(kOBias), s.K, 3);
    run_gemm(job(p, seen, blocks() * block, block, heads.stairs, {0, each_head() * s.D}, {s.K, 0}, added, s.K,
                 heads.order()));
  }

  void mlp(const Layer& layer, const Prepared& of, const Used& width, int64_t neurons) {
    if (width.widest() > 0) {
      ElasticGemmParams up = of.up;
      up.bias[0] = bias(layer.find(kGateBias), neurons, 0);
      up.bias[1] = bias(layer.find(kUpBias), neurons, 1);
      run_gemm(job(up, sorted(width), row_, 0, width.stairs, {s.K, 0}, {0, 1}, hidden, hidden_row_));
    }
    ElasticGemmParams down = of.down;
    down.bias[0] = bias(layer.find(kDownBias), s.K, 2);
    run_gemm(job(down, hidden, hidden_row_, 0, width.stairs, {0, 1}, {s.K, 0}, added, s.K, width.order()));
  }

  // The logits of the last `keep` tokens of each sequence.
  void logits(const ElasticGemmParams& head, int64_t keep, const Tensor& y) {
    if (y.numel() == 0) return;
    float* const rows = buffers_.take(s.B * keep * row_);
    parallel_for(s.B * keep, s.K, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const float* const from = normed + (i / keep * s.T + s.T - keep + i % keep) * row_;
        std::copy(from, from + s.K, rows + i * row_);
      }
    });
    const int64_t vocabulary = y.size(2);
    GemmJob last = job(head, rows, row_, 0, flat_staircase(s.B * keep, 0), {s.K, 0}, {vocabulary, 0}, nullptr,
                       vocabulary);
    last.p.io = gemm_dtype(x_);
    last.p.y = y.mutable_data_ptr();
    run_gemm(std::move(last));
  }

  void best(const Tensor& logits, const Tensor& to) const {
    const int64_t keep = logits.size(1), vocabulary = logits.size(2);
    const ElasticForwardBestParams<scalar_t> p{data_of<scalar_t>(logits) + (keep - 1) * vocabulary,
                                               mutable_data_of<int64_t>(to), vocabulary, keep * vocabulary};
    const auto kernel = FLEXTRON_FOR_ISA(elastic_forward_best, scalar_t);
    parallel_for(s.B, vocabulary, [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
  }

  const float* sums() const { return added; }

 private:
  // A row's query heads are `blocks` times `each_head` for every unit of its extent.
  int64_t blocks() const { return s.by_group ? 1 : s.G; }
  int64_t each_head() const { return s.by_group ? s.M : 1; }

  void set_bias(ElasticGemmParams& p, const Tensor* t, int64_t outputs, int place) const {
    p.bias[0] = bias(t, outputs, place);
    p.bias_block = outputs / p.out_blocks;
  }

  // Every row's choices in layer l, of the sums W1 n that are in routed_.
  void choose(int64_t l, Used& heads, Used& neurons) const {
    const ElasticForwardRouterParams p{.normed = normed,
                                       .state = router_.of_row(router_.state, l, 0),
                                       .h = routed_,
                                       .K = s.K,
                                       .row_stride = row_,
                                       .hidden = router_.hidden,
                                       .state_stride = router_.state.stride(1),
                                       .rows_each = router_.rows_each};
    const auto kernel = FLEXTRON_FOR_PLAIN_ISA(elastic_forward_router);
    parallel_for(s.R, s.K + router_.hidden, [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
    run_gemm(job(router_.second(l), routed_, router_.hidden, 0, every_, {router_.hidden, 0},
                 {router_.choices, 0}, choices_, router_.choices));
    std::vector<int64_t> chosen_neurons(s.R), chosen_heads(s.R);
    parallel_for(s.R, 4 * router_.choices, [&](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; ++r) {
        const float* const base = router_.of_row(router_.base, l, r);
        float* const logits = choices_ + r * router_.choices;
        for (int64_t i = 0; i < router_.choices; ++i) logits[i] += base[i];
        float *const middle = logits + router_.neurons.size(), *const end = logits + router_.choices;
        chosen_neurons[r] = router_.neurons[std::max_element(logits, middle) - logits];
        chosen_heads[r] = router_.heads[std::max_element(middle, end) - middle];
      }
    });
    neurons = used_by_rows(std::move(chosen_neurons), router_.most_neurons());
    heads = used_by_rows(std::move(chosen_heads), router_.most_heads());
  }

  void turn(const float* from, const Tensor* norm, const Tensor* cos, const Tensor* sin, scalar_t* to,
            int64_t heads, int64_t stride_b, int64_t stride_t, int64_t stride_h, float eps) const {
    const ElasticForwardHeadsParams<scalar_t> p{.from = from,
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
    const auto kernel = FLEXTRON_FOR_ISA(elastic_forward_heads, scalar_t);
    parallel_for(s.R, heads * s.D, [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
  }

  Shape s;
  const Tensor& x_;
  int64_t row_, hidden_row_, heads_;
  Tensor out_, q_;
  Staircase every_;  // all rows, as they are
  const Router& router_;
  Buffers buffers_;
  float *residual, *normed, *added, *hidden, *q, *attended, *k, *v, *sorted_, *routed_, *choices_;
  float* bias_[4];
};

// Whether elements of a cache may share memory, as an expanded one's do: each is written.
template <class Integers>
bool overlaps(const Integers& all_sizes, const Integers& all_strides) {
  int64_t strides[4], sizes[4], count = 0;  // of what has more than one entry, by ascending strides
  for (int64_t d = 0; d < 4; ++d) {
    if (all_sizes[d] <= 1) continue;
    int64_t at = count++;
    for (; at > 0 && strides[at - 1] > all_strides[d]; --at)
      strides[at] = strides[at - 1], sizes[at] = sizes[at - 1];
    strides[at] = all_strides[d], sizes[at] = all_sizes[d];
  }
  for (int64_t i = 0, reach = 1; i < count; reach += (sizes[i] - 1) * strides[i], ++i)
    if (strides[i] < reach) return true;
  return false;
}

void check_cache(const char* name, const Tensor& t, const Shape& s, int64_t stored, int64_t end,
                 const Tensor& x) {
  check_dim(kOp, name, t, 4);
  check_dtype(kOp, name, t, x.scalar_type());
  check_device(kOp, name, t, x.device());
  const auto sizes = t.sizes(), strides = t.strides();
  if (sizes[0] != s.B || sizes[1] < end || sizes[2] < stored || sizes[3] != s.D)
    fail(kOp, ": ", name, " must have shape [", s.B, ", at least ", end, ", at least ", stored, ", ", s.D,
         "], got ", shape_text(t.sizes()));
  if (s.D > 1 && strides[3] != 1)
    fail(kOp, ": ", name, " must have a contiguous last dimension, got strides");
  if (overlaps(sizes, strides))
    fail(kOp, ": ", name, " must have memory of its own for every element, got strides");
}

struct Answer {
  Tensor logits;  // [B, keep, vocabulary]
  Tensor best;    // [B]: where each sequence's last logits are greatest; or empty
};

// Tokens [B, T] through the model: rows of x [.., K], adjacent, in order or as `order` names them.
Answer forward(const Model& model, int64_t B, int64_t T, const Tensor& x, const int64_t* order,
               const Tensor& cos, const Tensor& sin, const std::vector<Tensor>& keys,
               const std::vector<Tensor>& values, int64_t cached, const std::vector<int64_t>& widths,
               const std::vector<int64_t>& heads, const std::vector<int64_t>& kv_heads, int64_t keep,
               const OptionalTensor& k_start, const std::optional<std::vector<Tensor>>& router,
               const std::optional<std::vector<int64_t>>& mlp_choices,
               const std::optional<std::vector<int64_t>>& head_choices, bool wants_best) {
  const int64_t layers = model.layers, neurons = model.neurons;
  Shape s = model.shape;
  s.B = B, s.T = T, s.R = B * T;
  const std::pair<const char*, size_t> lists[] = {
      {"keys", keys.size()}, {"values", values.size()}, {"kv_heads", kv_heads.size()}};
  for (const auto& [name, size] : lists)
    if (static_cast<int64_t>(size) != layers)
      fail(kOp, ": ", name, " must have ", layers, " entries, got ", size);
  check_range(kOp, "cached", cached, 0, std::numeric_limits<int64_t>::max() - T);
  check_range(kOp, "keep", keep, 0, T);
  check_dim(kOp, "cos", cos, 3);
  const int64_t tables = cos.size(0) == 1 ? 1 : B, turned = cos.size(2);
  if (turned > s.D || turned % 2 != 0)
    fail(kOp, ": cos.size(2) must be even and at most ", s.D, ", got ", turned);
  check_like(kOp, "cos", cos, {tables, T, turned}, x.scalar_type(), x.device());
  check_like(kOp, "sin", sin, {tables, T, turned}, x.scalar_type(), x.device());
  const Router routing = check_router(router, mlp_choices, head_choices, layers, s, neurons, x);
  std::vector<Used> width = check_used("widths", widths, layers, routing, s, neurons);
  std::vector<Used> head_count = check_used("heads", heads, layers, routing, s, s.by_group ? s.G : s.M);
  for (int64_t l = 0; l < layers; ++l) {
    const int64_t most = routing ? routing.most_heads() : s.R > 0 ? head_count[l].widest() : 0;
    check_range(kOp, "kv_heads", kv_heads[l], s.by_group ? most : s.G, s.G);
    check_cache("keys", keys[l], s, kv_heads[l], cached + T, x);
    check_cache("values", values[l], s, kv_heads[l], cached + T, x);
    if (keys[l].numel() > 0 && keys[l].const_data_ptr() == values[l].const_data_ptr())
      fail(kOp, ": values must have other memory than keys, got the same in layer ", l);
  }
  auto starts = k_start ? check_list(kOp, "k_start", *k_start, B, std::numeric_limits<int64_t>::max(), x)
                        : std::vector<int64_t>{};
  for (int64_t& start : starts) start = std::min(start, cached + T);

  wants_best = wants_best && keep > 0 && model.vocabulary > 0;
  Answer answer{empty(x, {B, keep, model.vocabulary}), empty(x, {wants_best ? B : 0}, ScalarType::Long)};
  if (s.R == 0) return answer;
  const Tensor cos_ = torch::stable::contiguous(cos), sin_ = torch::stable::contiguous(sin);
  const auto run = [&]<class scalar_t>() {
    Pass<scalar_t> pass(s, x, order, neurons, routing, keep);
    const float* add = nullptr;  // what the residual stream still lacks
    for (int64_t l = 0; l < layers; ++l) {
      const Layer layer = model.layer(l);
      const Prepared& of = model.prepared[l];
      pass.norm(layer.get(kInNorm), add, model.eps);
      pass.project(l, layer, of, head_count[l], width[l], kv_heads[l], cos_, sin_, keys[l], values[l], cached,
                   model.eps);
      const float* const seen = pass.attend(head_count[l], keys[l], values[l], cached, starts, model.scale);
      pass.project_out(layer, of, head_count[l], seen);
      pass.norm(layer.get(kMlpNorm), pass.sums(), model.eps);
      pass.mlp(layer, of, width[l], neurons);
      add = pass.sums();
    }
    pass.norm(model.norm, add, model.eps);
    pass.logits(model.last, keep, answer.logits);
    if (wants_best) pass.best(answer.logits, answer.best);
  };
  // Operations of a row in a layer: its projections, and the keys that it meets.
  const int64_t each =
      layers == 0 ? 0 : s.K * (3 * neurons + 2 * (s.H + s.G) * s.D) + s.H * s.D * (cached + T);
  Team::lead(s.R * (layers * each + model.vocabulary * s.K),
             [&] { dispatch_dtype(ElasticForwardTypes{}, kOp, x.scalar_type(), run); });
  return answer;
}

// Weights that calls share, and the tokens' embeddings. Where a tensor lies is written down: one that was
// given other memory since, or another size, must not be read by what was checked then.
struct Held {
  struct Place {
    const void* data;
    int64_t count;
  };
  Model model;
  Tensor embedding;  // [tokens, K]
  std::vector<Place> places;

  Held(Model checked, const Tensor& embeddings) : model(std::move(checked)), embedding(embeddings) {
    each([&](const Tensor& t) { places.push_back({t.const_data_ptr(), t.numel()}); });
  }
  // As they were when they were checked.
  void check() const {
    const Place* place = places.data();
    each([&](const Tensor& t) {
      if (t.const_data_ptr() != place->data || t.numel() != place->count)
        fail(kHeldOp, ": held must have weights that stayed where they were, got a moved one");
      ++place;
    });
  }

 private:
  template <class F>
  void each(const F& f) const {
    for (const Tensor& t : model.weights) f(t);
    f(model.norm), f(model.head), f(embedding);
    if (model.head_scales) f(*model.head_scales);
  }
};

// All that is held, by number.
class HeldOnes {
 public:
  // Never torn down: a call may outlive the library's statics.
  static HeldOnes& get() {
    static auto* const ones = new HeldOnes;
    return *ones;
  }

  int64_t add(std::shared_ptr<const Held> held) {
    const std::lock_guard lock(mutex_);
    all_.emplace(++last_, std::move(held));
    return last_;
  }
  std::shared_ptr<const Held> find(const char* op, int64_t number) {
    const std::lock_guard lock(mutex_);
    return at(op, number)->second;
  }
  std::shared_ptr<const Held> take(const char* op, int64_t number) {
    const std::lock_guard lock(mutex_);
    const auto place = at(op, number);
    auto held = std::move(place->second);
    all_.erase(place);
    return held;  // let go of behind the lock
  }

 private:
  using Map = std::map<int64_t, std::shared_ptr<const Held>>;

  Map::iterator at(const char* op, int64_t number) {
    const auto found = all_.find(number);
    if (found == all_.end())
      fail(op, ": held must come from elastic_forward_hold and not be dropped, got ", number);
    return found;
  }

  std::mutex mutex_;
  Map all_;
  int64_t last_ = 0;
};

}  // namespace

Tensor elastic_forward(const Tensor& x, const Tensor& cos, const Tensor& sin,
                       const std::vector<Tensor>& weights, const Text& parts, const std::vector<Tensor>& keys,
                       const std::vector<Tensor>& values, int64_t cached, const std::vector<int64_t>& widths,
                       const std::vector<int64_t>& heads, const std::vector<int64_t>& kv_heads,
                       int64_t neurons, int64_t query_heads, int64_t groups, const Tensor& norm,
                       const Tensor& head, const OptionalTensor& head_scales, int64_t vocabulary, double eps,
                       int64_t keep, const Text& unit, const Text& activation, const OptionalTensor& k_start,
                       std::optional<double> scale, const std::optional<std::vector<Tensor>>& router,
                       const std::optional<std::vector<int64_t>>& mlp_choices,
                       const std::optional<std::vector<int64_t>>& head_choices, const Text& format) {
  const NoGrad no_grad;
  check_dim(kOp, "x", x, 3);
  if (!x.is_cpu()) fail(kOp, ": x must be on cpu, got ", device_text(x.device()));
  const int64_t D = keys.empty() ? 1 : keys[0].dim() == 4 ? keys[0].size(3) : 0;
  const Shape shape = shape_of_weights(x.size(2), query_heads, groups, D, unit.value);
  const Model model(x, shape, kv_heads.size(), weights, Layout(parts.value), norm, head, head_scales, neurons,
                    vocabulary, eps, activation.value, scale, format_of(format.value));
  return forward(model, x.size(0), x.size(1), torch::stable::contiguous(x), nullptr, cos, sin, keys, values,
                 cached, widths, heads, kv_heads, keep, k_start, router, mlp_choices, head_choices, false)
      .logits;
}

int64_t elastic_forward_hold(const Tensor& embedding, const std::vector<Tensor>& weights, const Text& parts,
                             int64_t neurons, int64_t query_heads, int64_t groups, int64_t head_size,
                             const Tensor& norm, const Tensor& head, const OptionalTensor& head_scales,
                             double eps, const Text& unit, const Text& activation,
                             std::optional<double> scale, const Text& format) {
  check_dim(kOp, "embedding", embedding, 2);
  if (!embedding.is_cpu()) fail(kOp, ": embedding must be on cpu, got ", device_text(embedding.device()));
  if (!embedding.is_contiguous()) fail(kOp, ": embedding must be contiguous, got strides");
  const Layout layout(parts.value);
  const int64_t layers = (static_cast<int64_t>(weights.size()) + layout.count - 1) / layout.count;
  const Shape shape = shape_of_weights(embedding.size(1), query_heads, groups, head_size, unit.value);
  auto held = std::make_shared<const Held>(
      Model(embedding, shape, layers, weights, layout, norm, head, head_scales, neurons, embedding.size(0),
            eps, activation.value, scale, format_of(format.value)),
      embedding);
  return HeldOnes::get().add(std::move(held));
}

std::tuple<Tensor, Tensor> elastic_forward_held(
    const Tensor& ids, const Tensor& cos, const Tensor& sin, int64_t held, const std::vector<Tensor>& keys,
    const std::vector<Tensor>& values, int64_t cached, const std::vector<int64_t>& widths,
    const std::vector<int64_t>& heads, const std::vector<int64_t>& kv_heads, int64_t keep,
    const OptionalTensor& k_start, const std::optional<std::vector<Tensor>>& router,
    const std::optional<std::vector<int64_t>>& mlp_choices,
    const std::optional<std::vector<int64_t>>& head_choices) {
  const NoGrad no_grad;
  check_dim(kHeldOp, "ids", ids, 2);
  check_dtype(kHeldOp, "ids", ids, ScalarType::Long);
  const std::shared_ptr<const Held> mine = HeldOnes::get().find(kHeldOp, held);
  mine->check();
  const Tensor ids_ = torch::stable::contiguous(ids);
  const auto* const order = data_of<int64_t>(ids_);
  for (int64_t i = 0; i < ids_.numel(); ++i)
    check_range(kHeldOp, "ids", order[i], 0, mine->embedding.size(0) - 1);
  Answer answer =
      forward(mine->model, ids.size(0), ids.size(1), mine->embedding, order, cos, sin, keys, values, cached,
              widths, heads, kv_heads, keep, k_start, router, mlp_choices, head_choices, true);
  return {std::move(answer.logits), std::move(answer.best)};
}

void elastic_forward_drop(int64_t held) { HeldOnes::get().take(kDropOp, held); }

}  // namespace flextron
