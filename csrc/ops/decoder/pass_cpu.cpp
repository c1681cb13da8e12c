// A decoder's steps on a CPU: the loops of csrc/kernels/decoder.h between the GEMMs of ops/elastic_gemm.h and
// the attention of ops/attention_decode.h, all on torch's threads.
#include <utility>

#include "kernels/decoder.h"
#include "ops/attention_decode.h"
#include "ops/decoder/pass.h"
#include "ops/decoder/rows_cpu.h"
#include "ops/packed.h"

namespace flextron::decoder {
namespace {

// The GEMMs of a model's weights, without the inputs and outputs of a call.
struct LayerGemms {
  ElasticGemmParams qkv, q, k, v, o, up, down;
};

ElasticGemmParams gemm_of(const Model& model, const Matrix& m) {
  if (!m.weight) return no_gemm();
  ElasticGemmParams p;
  if (model.shape.format) {
    const OptionalTensor scales = m.scales ? OptionalTensor(*m.scales) : std::nullopt;
    p = on_panels({*model.shape.format, "weight", *m.weight, "scales", scales}, m.in_blocks);
  } else {
    p = on_rows(*m.weight, m.in_blocks, m.out_blocks);
    p.io = GemmDtype::kFloat;
  }
  p.pairs = !p.quantised && in_pairs(*model.embedding, p.layout);
  return p;
}

LayerGemms gemms_of(const Model& model, const Layer& layer) {
  LayerGemms gemms{.qkv = gemm_of(model, layer.qkv),
                   .q = gemm_of(model, layer.q),
                   .k = gemm_of(model, layer.k),
                   .v = gemm_of(model, layer.v),
                   .o = gemm_of(model, layer.o),
                   .up = gemm_of(model, layer.up),
                   .down = gemm_of(model, layer.down)};
  if (layer.gate.weight) {  // a plain model's: the gate first, as in panels
    gemms.up.weight[0] = layer.gate.weight->const_data_ptr();
    gemms.up.weight[1] = layer.up.weight->const_data_ptr();
  }
  gemms.up.hidden = true;
  gemms.up.gated = model.shape.gated;
  gemms.up.activation = model.shape.activation;
  return gemms;
}

// A router's matrix of one layer, [outputs, inputs] of w [layers, outputs, inputs].
ElasticGemmParams gemm_of_router(const Tensor& w, int64_t layer) {
  ElasticGemmParams p = no_gemm();
  p.layout = GemmLayout::kRows;
  p.weight_dtype = GemmDtype::kFloat;
  p.io = GemmDtype::kFloat;
  p.weight[0] = data_of<float>(w) + layer * w.stride(0);
  p.weight_stride = w.size(2);
  p.in_stride = w.size(2);
  p.out_stride = w.size(1);
  return p;
}

// Where heads come from, in each row: groups of heads, which are adjacent in a group.
struct HeadsIn {
  const float* data;
  int64_t row, group;    // elements apart
  int64_t groups, each;  // that there are
  int64_t whole;         // heads of a group in a full layer
};

// Where heads go: D adjacent elements of each.
template <class scalar_t>
struct HeadRows {
  scalar_t* data;
  int64_t stride_b, stride_t, stride_h;
};

// One call: its rows, and the layers' kernels one after the other.
template <class scalar_t>
class Run {
 public:
  Run(const Model& model, const Call& call, std::vector<int64_t> starts)
      : model_(model),
        s_(model.shape),
        call_(call),
        tokens_(call.tokens),
        router_(call.router ? &*call.router : nullptr),
        starts_(std::move(starts)),
        rows_(tokens_.rows()),
        row_(padded_row(s_.K)),
        hidden_row_(padded_row(s_.F)),
        query_row_(s_.H * s_.D),
        longest_bias_(std::max({s_.F, query_row_ + 2 * s_.G * s_.D, s_.K})),
        out_(empty(*model.embedding,
                   {rows_, query_row_})),  // heads that a row does not use are copied, never read
        q_(empty(*model.embedding, {rows_, query_row_})),
        every_(flat_staircase(rows_, 0)),
        buffers_(*model.embedding, floats()) {
    residual_ = buffers_.take(rows_ * row_);
    normed_ = buffers_.take(rows_ * row_);
    sorted_ = buffers_.take(rows_ * row_);
    if (router_) {
      routed_ = buffers_.take(rows_ * router_->hidden);
      choices_ = buffers_.take(rows_ * router_->choices());
    }
    added_ = buffers_.take(rows_ * s_.K);
    hidden_ = buffers_.take(rows_ * hidden_row_);
    attended_ = buffers_.take(rows_ * query_row_);
    queries_ = buffers_.take(rows_ * query_row_);  // and what follows: all three of fused projections
    keys_ = buffers_.take(rows_ * s_.G * s_.D);
    values_ = buffers_.take(rows_ * s_.G * s_.D);
    last_ = buffers_.take(tokens_.B * tokens_.keep * row_);
    for (float*& bias : biases_) bias = buffers_.take(longest_bias_);
  }

  void operator()(const std::vector<LayerGemms>& gemms, const ElasticGemmParams& head, const Answer& answer) {
    embed();
    Lack lack;
    const auto normed = [&](const Norm& weights) {
      norm(weights, lack);
      lack = {};
    };
    for (int64_t l = 0; l < s_.layers; ++l) {
      const Layer& layer = model_.layers[l];
      Used heads, neurons;
      bool attends = true, feeds = true;  // or no row uses the part, and its norms are not run either
      if (!router_) {
        heads = used_in(call_.heads, l, tokens_, s_.most_heads());
        neurons = used_in(call_.neurons, l, tokens_, s_.F);
        attends = heads.widest() > 0;
        feeds = neurons.widest() > 0;
      }
      const bool projects = attends || call_.cache.stored[l] > 0, own_norm = layer.mlp_norm.weight;
      if (projects || (s_.parallel && feeds && !own_norm)) normed(layer.in_norm);
      if (projects) project(l, gemms[l], heads, neurons);
      if (attends) {
        project_out(layer, gemms[l], heads, attend(l, heads));
        if (!s_.parallel) lack = {added_, layer.attention_post, std::move(heads.extents)};
      }
      if (feeds && (own_norm || !s_.parallel)) normed(layer.mlp_norm);
      if (attends && s_.parallel) add_to_stream(heads.extents);  // which the MLP's norm does not see
      if (!feeds) continue;
      mlp(layer, gemms[l], neurons);
      lack = {added_, layer.mlp_post, std::move(neurons.extents)};
    }
    normed(model_.norm);
    logits(head, answer.logits);
    if (answer.best.numel() > 0) best(answer.logits, answer.best);
  }

 private:
  // What the residual stream still lacks: nothing, or what a part gave, through its norm, in the rows that
  // use it.
  struct Lack {
    const float* add = nullptr;
    Norm post{};
    std::vector<int64_t> used;  // of each row; empty where all do
  };

  int64_t floats() const {
    const int64_t routed = router_ ? router_->hidden + router_->choices() : 0;
    return rows_ * (3 * row_ + s_.K + hidden_row_ + 2 * query_row_ + 2 * s_.G * s_.D + routed) +
           tokens_.B * tokens_.keep * row_ + 4 * longest_bias_;
  }

  void widen(const Tensor& from, int64_t rows, int64_t columns, float* to, int64_t to_stride,
             const int64_t* order = nullptr) const {
    copy_rows({from.const_data_ptr(), gemm_dtype(from), order, to, columns, columns, to_stride}, rows);
  }

  void embed() const {
    widen(*model_.embedding, rows_, s_.K, residual_, row_, data_of<int64_t>(tokens_.ids));
    if (s_.embedding_scale == 1) return;
    each_row([&](int64_t r) {
      float* const x = residual_ + r * row_;
      for (int64_t i = 0; i < s_.K; ++i) x[i] *= s_.embedding_scale;
    });
  }

  // p with bias `which`, [size], as floats in one of the four places there are for one.
  void set_bias(ElasticGemmParams& p, int64_t which, const Tensor* bias, int64_t size, int64_t place) const {
    if (!bias) return;
    widen(*bias, 1, size, biases_[place], size);
    p.bias[which] = biases_[place];
    p.bias_block = size / p.out_blocks;
  }

  template <class F>
  void each_row(const F& f) const {
    parallel_for(rows_, s_.K, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) f(r);
    });
  }

  void add_to_stream(const std::vector<int64_t>& used) const {
    each_row([&](int64_t r) {
      if (!used.empty() && used[r] == 0) return;
      const float* const from = added_ + r * s_.K;
      float* const x = residual_ + r * row_;
      for (int64_t i = 0; i < s_.K; ++i) x[i] += s_.residual_scale * from[i];
    });
  }

  static DecoderNorm<scalar_t> data_of_norm(const Norm& norm) {
    return {norm.weight ? data_of<scalar_t>(*norm.weight) : nullptr,
            norm.bias ? data_of<scalar_t>(*norm.bias) : nullptr};
  }

  void norm(const Norm& weights, const Lack& lack) const {
    const DecoderNormParams<scalar_t> p{.kind = s_.norms,
                                        .norm = data_of_norm(weights),
                                        .post = data_of_norm(lack.post),
                                        .x = residual_,
                                        .add = lack.add,
                                        .used = lack.used.empty() ? nullptr : lack.used.data(),
                                        .to = normed_,
                                        .K = s_.K,
                                        .x_stride = row_,
                                        .scale = s_.residual_scale,
                                        .eps = s_.eps};
    const auto kernel = FLEXTRON_FOR_ISA(decoder_norm, scalar_t);
    parallel_for(rows_, s_.K, [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
  }

  // The normed rows in the order of an axis.
  From sorted(const Used& used) const {
    if (used.flat()) return {normed_, row_, 0};
    copy_rows({normed_, GemmDtype::kFloat, used.order(), sorted_, s_.K, row_, row_}, rows_);
    return {sorted_, row_, 0};
  }

  // The projections, and the new keys and values into the cache. The router reads what they read: it sets
  // `heads` and `neurons` beside the keys and values, of which every token stores the same.
  void project(int64_t l, const LayerGemms& gemms, Used& heads, Used& neurons) {
    const Layer& layer = model_.layers[l];
    const bool fused = layer.qkv.weight != nullptr;
    const int64_t stored = call_.cache.stored[l], query_size = s_.H * s_.D, group_size = s_.G * s_.D;
    std::vector<GemmJob> jobs;
    const auto add = [&](const ElasticGemmParams& p, From from, const Staircase& stairs, Count features,
                         float* y, const int64_t* order) {
      const int64_t most = features.of(stairs.steps.front());
      if (most > 0)
        jobs.push_back(job(p, from, stairs, {s_.K, 0}, features, {y, p.out_blocks * most, order}));
    };
    const From normed{normed_, row_, 0};
    if (fused) {  // of stored groups all: queries that a row does not use lie between others and the keys
      ElasticGemmParams qkv = gemms.qkv;
      set_bias(qkv, 0, layer.qkv.bias, s_.fused() * s_.G, 0);
      add(qkv, normed, every_, {stored * s_.fused(), 0}, queries_, nullptr);
    } else {
      ElasticGemmParams k = gemms.k, v = gemms.v;
      set_bias(k, 0, layer.k.bias, group_size, 1);
      set_bias(v, 0, layer.v.bias, group_size, 2);
      add(k, normed, every_, {stored * s_.D, 0}, keys_, nullptr);
      add(v, normed, every_, {stored * s_.D, 0}, values_, nullptr);
    }
    if (router_) {
      add(gemm_of_router(router_->w1, l), normed, every_, {router_->hidden, 0}, routed_, nullptr);
      run_gemms(std::move(jobs));
      jobs.clear();
      choose(l, heads, neurons);
    }
    if (!fused) {
      ElasticGemmParams q = gemms.q;
      set_bias(q, 0, layer.q.bias, query_size, 0);
      add(q, sorted(heads), heads.stairs, {0, s_.unit_heads() * s_.D}, queries_, heads.order());
    }
    run_gemms(std::move(jobs));
    const int64_t groups = s_.by_group ? heads.widest() : s_.G;
    const int64_t each = s_.by_group ? s_.queries() : heads.widest();
    const HeadsIn queries = heads_in(fused, stored, queries_, 0, groups, each);
    const HeadsIn keys = heads_in(fused, stored, keys_, s_.queries(), stored, 1);
    const HeadsIn values = heads_in(fused, stored, values_, s_.queries() + 1, stored, 1);
    Norm q_norm = layer.q_norm, k_norm = layer.k_norm;
    if (s_.norm_over == NormOver::kHeads)
      normalise_all(std::exchange(q_norm, {}), std::exchange(k_norm, {}), heads, stored);
    const int64_t used_row = groups * each * s_.D;
    if (used_row > 0)
      turn(queries, q_norm, s_.tables[l],
           {mutable_data_of<scalar_t>(q_), tokens_.T * used_row, used_row, s_.D});
    if (stored == 0) return;
    turn(keys, k_norm, s_.tables[l], new_rows(call_.cache.keys[l]));
    turn(values, {}, 0, new_rows(call_.cache.values[l]));
  }

  // Heads that lie alone in a buffer, or from the head `at` of each group in a fused projection's.
  HeadsIn heads_in(bool fused, int64_t stored, const float* alone, int64_t at, int64_t groups,
                   int64_t each) const {
    const int64_t whole = at == 0 ? s_.queries() : 1;
    if (fused) return {queries_ + at * s_.D, stored * s_.fused(), s_.fused(), groups, each, whole};
    return {alone, groups * each * s_.D, each * s_.D, groups, each, whole};
  }

  // Queries and keys, each by a norm over all the heads that a row keeps.
  void normalise_all(const Norm& q_norm, const Norm& k_norm, const Used& heads, int64_t stored) const {
    const int64_t* const extents = heads.flat() ? nullptr : heads.extents.data();
    const int64_t unit = s_.unit_heads() * s_.D, most = heads.widest();
    DecoderAllHeadsParams<scalar_t> p{.kind = s_.norms,
                                      .x = queries_,
                                      .norm = data_of_norm(q_norm),
                                      .extents = extents,
                                      .extent = most,
                                      .unit = unit,
                                      .blocks = s_.blocks(),
                                      .block = unit * most,
                                      .norm_block = s_.queries() * s_.D,
                                      .least = 0,
                                      .eps = s_.eps};
    normalise_all(p);
    p.x = keys_;
    p.norm = data_of_norm(k_norm);
    p.unit = s_.D;
    p.blocks = 1;
    p.block = p.least = stored * s_.D;
    if (!s_.by_group) {  // every token keeps all keys that are stored
      p.extents = nullptr;
      p.extent = stored;
    }
    normalise_all(p);
  }
  void normalise_all(const DecoderAllHeadsParams<scalar_t>& p) const {
    if (!p.norm.weight || p.block == 0) return;
    const auto kernel = FLEXTRON_FOR_ISA(decoder_all_heads, scalar_t);
    parallel_for(rows_, p.blocks * p.block, [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
  }

  // Where the new tokens' keys or values lie in a layer's cache.
  HeadRows<scalar_t> new_rows(const Tensor& cache) const {
    return {mutable_data_of<scalar_t>(cache) + call_.cache.cached * cache.stride(1), cache.stride(0),
            cache.stride(1), cache.stride(2)};
  }

  // By one of the tables, counted from 1; 0: not turned.
  void turn(const HeadsIn& from, const Norm& norm, int64_t table, HeadRows<scalar_t> to) const {
    const int64_t norm_head = s_.norm_over == NormOver::kEach ? s_.D : 0;
    const Tensor &cos = call_.rotary.cos, &sin = call_.rotary.sin;
    const int64_t turned = cos.size(2) / s_.table_count(), at = (table - 1) * turned;
    const DecoderHeadsParams<scalar_t> p{.kind = s_.norms,
                                         .rotation = s_.rotation,
                                         .norm_last = s_.norm_last,
                                         .clip = s_.clip,
                                         .from = from.data,
                                         .from_row = from.row,
                                         .from_group = from.group,
                                         .norm = data_of_norm(norm),
                                         .norm_group = from.whole * norm_head,
                                         .norm_head = norm_head,
                                         .cos = table ? data_of<scalar_t>(cos) + at : nullptr,
                                         .sin = table ? data_of<scalar_t>(sin) + at : nullptr,
                                         .to = to.data,
                                         .to_stride_b = to.stride_b,
                                         .to_stride_t = to.stride_t,
                                         .to_stride_h = to.stride_h,
                                         .T = tokens_.T,
                                         .groups = from.groups,
                                         .each = from.each,
                                         .D = s_.D,
                                         .R = table ? turned : 0,
                                         .table_stride = cos.size(2),
                                         .one_table = cos.size(0) == 1,
                                         .eps = s_.eps};
    const auto kernel = FLEXTRON_FOR_ISA(decoder_heads, scalar_t);
    parallel_for(rows_, from.groups * from.each * s_.D,
                 [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
  }

  // Every row's choices in layer l, of the sums W1 n that are in routed_.
  void choose(int64_t l, Used& heads, Used& neurons) const {
    const Router& r = *router_;
    const int64_t hidden = r.hidden, choices = r.choices();
    const float* const base = data_of<float>(r.base) + l * r.base.stride(0);
    const DecoderRouterParams p{.normed = normed_,
                                .state = data_of<float>(r.state) + l * r.state.stride(0),
                                .h = routed_,
                                .K = s_.K,
                                .row_stride = row_,
                                .hidden = hidden,
                                .state_stride = r.state.stride(1),
                                .rows_each = r.rows_each};
    const auto kernel = FLEXTRON_FOR_PLAIN_ISA(decoder_router);
    parallel_for(rows_, s_.K + hidden, [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
    run_gemm(job(gemm_of_router(r.w2, l), {routed_, hidden, 0}, every_, {hidden, 0}, {choices, 0},
                 {choices_, choices}));
    std::vector<int64_t> chosen_neurons(rows_), chosen_heads(rows_);
    parallel_for(rows_, 4 * choices, [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row) {
        const float* const request = base + row / r.rows_each * r.base.stride(1);
        float* const logits = choices_ + row * choices;
        for (int64_t i = 0; i < choices; ++i) logits[i] += request[i];
        float *const middle = logits + r.neuron_menu.size(), *const end = logits + choices;
        chosen_neurons[row] = r.neuron_menu[std::max_element(logits, middle) - logits];
        chosen_heads[row] = r.head_menu[std::max_element(middle, end) - middle];
      }
    });
    neurons = used_by_rows(std::move(chosen_neurons), most_of(r.neuron_menu));
    heads = used_by_rows(std::move(chosen_heads), most_of(r.head_menu));
  }
  static int64_t most_of(const std::vector<int64_t>& menu) {
    return *std::max_element(menu.begin(), menu.end());
  }

  // What the heads saw, in their order: rows of `heads`' widest.
  const float* attend(int64_t l, const Used& heads) const {
    const AttentionPlan plan = attention_plan(l, heads);
    if (plan.H == 0) return attended_;
    const Tensor &keys = call_.cache.keys[l], &values = call_.cache.values[l];
    const int64_t row = plan.H * s_.D;
    auto p = attention_params<scalar_t>(plan);
    p.q = data_of<scalar_t>(q_);
    p.q_stride_t = row;
    p.q_stride_h = s_.D;
    p.k = {data_of<scalar_t>(keys), keys.stride(0), keys.stride(1), keys.stride(2)};
    p.v = {data_of<scalar_t>(values), values.stride(0), values.stride(1), values.stride(2)};
    p.out = mutable_data_of<scalar_t>(out_);
    // A sequence that sees no key may have no work item, and then nothing writes its rows.
    const auto is_blind = [&](int64_t start) { return start == call_.cache.cached + tokens_.T; };
    if (std::any_of(starts_.begin(), starts_.end(), is_blind)) {
      Tensor out = out_;
      torch::stable::zero_(out);
    }
    run_decode(plan, p, q_);
    if (std::is_same_v<scalar_t, float> && heads.flat()) return data_of<float>(out_);
    widen(out_, rows_, row, attended_, row, heads.order());
    return attended_;
  }

  AttentionPlan attention_plan(int64_t l, const Used& heads) const {
    const int64_t most = heads.widest(), T = tokens_.T;
    AttentionPlan plan{};
    plan.G = s_.by_group ? most : s_.G;
    plan.M = s_.by_group ? s_.queries() : most;
    plan.H = plan.G * plan.M;
    plan.D = s_.D;
    plan.heads = most;
    plan.by_group = s_.by_group;
    plan.causal = true;
    plan.scale = s_.scale;
    if (s_.windows[l] > 0) plan.window = std::min(s_.windows[l], kNoWindow);
    plan.softcap = s_.softcap;
    if (!heads.flat()) {
      plan.extent = heads.extents;
      plan.extent_stride_t = 1;
    }
    plan.page = call_.cache.keys[l].size(1);
    for (int64_t b = 0; b < tokens_.B; ++b) plan.pages.push_back(b);
    for (int64_t b = 0; b < tokens_.B; ++b)
      for (int64_t t = 0, end; t < T; t = end) {
        end = alike_from(b, t, plan);
        plan.sequences.push_back({.query = b * T + t,
                                  .T = end - t,
                                  .S = call_.cache.cached + end,
                                  .k_start = start_of(b),
                                  .position = 0,
                                  .pages = plan.pages.data() + b});
      }
    plan.measure();
    return plan;
  }

  int64_t start_of(int64_t b) const { return starts_.empty() ? 0 : starts_[b]; }

  // Behind the tokens of sequence b, from t on, whose keys begin and are split as if each came alone, and
  // whose rows are few together where they are alone: a few tokens get the same bits in one step as in
  // several. A prompt's keys are not split.
  int64_t alike_from(int64_t b, int64_t t, const AttentionPlan& plan) const {
    constexpr int64_t kFewRows = 8;  // that csrc/kernels/head_attention_block.h takes otherwise than more
    const int64_t T = tokens_.T;
    if (T > kAttentionQueries) return T;
    const auto seen = [&](int64_t token) {
      const int64_t S = call_.cache.cached + token + 1, first = std::max(start_of(b), S - plan.window);
      return std::pair{first, keys_of_part(S - first)};
    };
    const int64_t most = plan.M > kFewRows ? T : t + kFewRows / std::max<int64_t>(plan.M, 1);
    int64_t end = t + 1;
    while (end < std::min(T, most) && seen(end) == seen(t)) ++end;
    return end;
  }

  void project_out(const Layer& layer, const LayerGemms& gemms, const Used& heads, const float* seen) const {
    const int64_t block = s_.unit_heads() * heads.widest() * s_.D;
    ElasticGemmParams o = gemms.o;
    set_bias(o, 0, layer.o.bias, s_.K, 3);
    run_gemm(job(o, {seen, s_.blocks() * block, block}, heads.stairs, {0, s_.unit_heads() * s_.D}, {s_.K, 0},
                 {added_, s_.K, heads.order()}));
  }

  void mlp(const Layer& layer, const LayerGemms& gemms, const Used& neurons) const {
    if (neurons.widest() > 0) {
      ElasticGemmParams up = gemms.up;
      set_bias(up, 0, s_.gated ? layer.gate.bias : layer.up.bias, s_.F, 0);
      if (s_.gated) set_bias(up, 1, layer.up.bias, s_.F, 1);
      run_gemm(job(up, sorted(neurons), neurons.stairs, {s_.K, 0}, {0, 1}, {hidden_, hidden_row_}));
    }
    ElasticGemmParams down = gemms.down;
    set_bias(down, 0, layer.down.bias, s_.K, 2);
    run_gemm(job(down, {hidden_, hidden_row_, 0}, neurons.stairs, {0, 1}, {s_.K, 0},
                 {added_, s_.K, neurons.order()}));
  }

  // The logits of the last `keep` tokens of each sequence.
  void logits(const ElasticGemmParams& head, const Tensor& y) const {
    if (y.numel() == 0) return;
    const int64_t keep = tokens_.keep, count = tokens_.B * keep, vocabulary = s_.vocabulary;
    parallel_for(count, s_.K, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const float* const from = normed_ + (i / keep * tokens_.T + tokens_.T - keep + i % keep) * row_;
        float* const to = last_ + i * row_;
        for (int64_t k = 0; k < s_.K; ++k) to[k] = s_.logit_scale * from[k];
      }
    });
    GemmJob all = job(head, {last_, row_, 0}, flat_staircase(count, 0), {s_.K, 0}, {vocabulary, 0},
                      {nullptr, vocabulary});
    all.p.io = gemm_dtype(y);
    all.p.y = y.mutable_data_ptr();
    if (model_.head.bias) {
      all.p.bias[0] = model_.head.bias->const_data_ptr();
      all.p.bias_block = vocabulary;
    }
    run_gemm(std::move(all));
    if (s_.logit_cap == 0) return;
    const DecoderCapParams<scalar_t> p{.x = mutable_data_of<scalar_t>(y), .cap = s_.logit_cap};
    const auto kernel = FLEXTRON_FOR_ISA(decoder_cap, scalar_t);
    parallel_for(y.numel(), 16, [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
  }

  void best(const Tensor& logits, const Tensor& to) const {
    const int64_t skipped = (tokens_.keep - 1) * s_.vocabulary;
    const DecoderBestParams<scalar_t> p{.logits = data_of<scalar_t>(logits) + skipped,
                                        .best = mutable_data_of<int64_t>(to),
                                        .vocabulary = s_.vocabulary,
                                        .stride = tokens_.keep * s_.vocabulary};
    const auto kernel = FLEXTRON_FOR_ISA(decoder_best, scalar_t);
    parallel_for(tokens_.B, s_.vocabulary, [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
  }

  const Model& model_;
  const Shape& s_;
  const Call& call_;
  const Tokens& tokens_;
  const Router* router_;               // null: none
  const std::vector<int64_t> starts_;  // the first key that each sequence sees; empty: the first there is
  int64_t rows_, row_, hidden_row_, query_row_, longest_bias_;
  Tensor out_, q_;
  Staircase every_;  // all rows, as they are
  Buffers buffers_;
  float *residual_, *normed_, *sorted_, *added_, *hidden_, *queries_, *attended_, *keys_, *values_, *last_;
  float *routed_ = nullptr, *choices_ = nullptr;  // null without a router
  float* biases_[4];
};

class CpuPass : public Pass {
 public:
  explicit CpuPass(const Model& model) : model_(model), head_(gemm_of(model, model.head)) {
    dispatch_dtype(DecoderTypes{}, kHold, model.embedding->scalar_type(), []<class scalar_t>() {});
    for (const Layer& layer : model.layers) gemms_.push_back(gemms_of(model, layer));
  }

  void run(const Call& call, const Answer& answer) const override {
    const Tokens& tokens = call.tokens;
    const auto* const ids = data_of<int64_t>(tokens.ids);
    for (int64_t r = 0; r < tokens.rows(); ++r)
      check_range(kStep, "ids", ids[r], 0, model_.shape.vocabulary - 1);
    std::vector<int64_t> starts;
    if (call.cache.k_start)
      starts = host_integers(kStep, "k_start", *call.cache.k_start, std::numeric_limits<int64_t>::max());
    for (int64_t& start : starts) start = std::min(start, call.cache.cached + tokens.T);
    Team::lead(operations(call), [&] {
      dispatch_dtype(DecoderTypes{}, kStep, model_.embedding->scalar_type(), [&]<class scalar_t>() {
        Run<scalar_t>(model_, call, std::move(starts))(gemms_, head_, answer);
      });
    });
  }

 private:
  // Operations of all rows: in each layer the projections, and the keys that a row meets.
  int64_t operations(const Call& call) const {
    const Shape& s = model_.shape;
    const int64_t end = call.cache.cached + call.tokens.T;
    const int64_t layer = s.K * (3 * s.F + 2 * (s.H + s.G) * s.D) + s.H * s.D * end;
    return call.tokens.rows() * (s.layers * layer + s.vocabulary * s.K);
  }

  const Model& model_;
  std::vector<LayerGemms> gemms_;
  ElasticGemmParams head_;
};

}  // namespace

std::unique_ptr<const Pass> pass_on_cpu(const Model& model) { return std::make_unique<const CpuPass>(model); }

}  // namespace flextron::decoder
