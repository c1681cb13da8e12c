// What head_attention and head_attention_decode share before a kernel runs: checked extents, sequences, work
// items.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <type_traits>
#include <vector>

#include "kernels/head_attention.h"
#include "ops/device.h"
#include "ops/dispatch.h"
#include "ops/extents.h"
#include "ops/gemm.h"
#include "ops/isa.h"
#include "ops/ops.h"

namespace flextron {

// Host copies of everything a kernel reads besides q, k and v.
struct AttentionPlan {
  int64_t H, G, M, D;
  int64_t heads;
  bool by_group, causal;
  double scale;
  int64_t window = kNoWindow;
  double softcap = 0;    // none
  OptionalTensor sinks;  // [H], contiguous, in wide_dtype
  int64_t page = std::numeric_limits<int64_t>::max();
  std::vector<int64_t> extent;  // empty: heads
  int64_t extent_stride_b = 0, extent_stride_t = 0;
  std::vector<uint8_t> chosen;  // empty: by extent
  std::vector<int64_t> pages;
  std::vector<AttentionSequence> sequences;
  int64_t max_queries = 0, max_keys = 0;

  // The most heads, in its unit, that any of the queries [begin, end) of sequence b keeps.
  int64_t widest(int64_t b, int64_t begin, int64_t end) const {
    if (extent.empty()) return begin < end ? heads : 0;
    int64_t most = 0;
    for (int64_t t = begin; t < end; ++t)
      most = std::max(most, extent[b * extent_stride_b + t * extent_stride_t]);
    return most;
  }

  bool group_active(int64_t group, int64_t widest) const {
    if (chosen.empty()) return by_group ? group < widest : widest > 0;
    return std::any_of(&chosen[group * M], &chosen[group * M] + M, [](uint8_t c) { return c != 0; });
  }

  // After the last sequence: what is known of all of them, and which keys are before every query's window.
  void measure() {
    for (auto& s : sequences) {
      s.k_start = std::max(s.k_start, s.S - s.T + 1 - window);
      max_queries = std::max(max_queries, std::min(s.T, kAttentionQueries));
      max_keys = std::max(max_keys, s.S - s.k_start);
    }
  }

  // What an item of so many keys costs, for parallel_for.
  int64_t item_cost(int64_t keys) const { return max_queries * M * D * (keys + 1); }
};

inline int64_t blocks_of(int64_t n, int64_t size) { return (n + size - 1) / size; }

// Blocks of queries of the active groups. Causal blocks grow with their number: first and last take turns, so
// that any two equal runs of items weigh about the same.
inline std::vector<AttentionItem> query_items(const AttentionPlan& plan) {
  std::vector<AttentionItem> items;
  for (int64_t b = 0; b < static_cast<int64_t>(plan.sequences.size()); ++b) {
    const auto& s = plan.sequences[b];
    const int64_t blocks = blocks_of(s.T, kAttentionQueries);
    std::vector<int64_t> widest(blocks);
    for (int64_t i = 0; i < blocks; ++i)
      widest[i] = plan.widest(b, s.query + i * kAttentionQueries,
                              s.query + std::min((i + 1) * kAttentionQueries, s.T));
    for (int64_t g = 0; g < plan.G; ++g)
      for (int64_t i = 0; i < blocks; ++i) {
        const int64_t block = i % 2 == 0 ? i / 2 : blocks - 1 - i / 2;
        if (plan.group_active(g, widest[block])) items.push_back({b, g, block, 0});
      }
  }
  return items;
}

// The (sequence, group) pairs with an active head, group after group.
inline std::vector<AttentionItem> pair_items(const AttentionPlan& plan) {
  std::vector<AttentionItem> items;
  for (int64_t g = 0; g < plan.G; ++g)
    for (int64_t b = 0; b < static_cast<int64_t>(plan.sequences.size()); ++b) {
      const auto& s = plan.sequences[b];
      if (plan.group_active(g, plan.widest(b, s.query, s.query + s.T))) items.push_back({b, g, 0, 0});
    }
  return items;
}

// Blocks of keys of the active pairs.
inline std::vector<AttentionItem> key_items(const AttentionPlan& plan) {
  std::vector<AttentionItem> items;
  for (const auto& pair : pair_items(plan)) {
    const auto& s = plan.sequences[pair.sequence];
    const int64_t blocks = blocks_of(s.S - s.k_start, kAttentionKeys);
    for (int64_t i = 0; i < blocks; ++i) {
      const int64_t block = i % 2 == 0 ? i / 2 : blocks - 1 - i / 2;
      items.push_back({pair.sequence, pair.group, block, 0});
    }
  }
  return items;
}

// A floating tensor argument has the dtype and device of q; the result's last dimension is adjacent.
inline Tensor check_rows(const char* op, const char* name, const Tensor& t, const Tensor& q) {
  check_dtype(op, name, t, q.scalar_type());
  check_device(op, name, t, q.device());
  const int64_t last = t.dim() - 1;
  return t.size(last) > 1 && t.stride(last) != 1 ? torch::stable::contiguous(t) : t;
}

inline ScalarType wide_dtype(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// What both ops do to scores.
struct AttentionScores {
  std::optional<double> scale;
  std::optional<int64_t> window;
  std::optional<double> softcap;
  const OptionalTensor& sinks;
};

inline void describe_scores(const char* op, const Tensor& q, const AttentionScores& scores, bool causal,
                            AttentionPlan& plan) {
  plan.scale = scores.scale.value_or(1 / std::sqrt(static_cast<double>(plan.D)));
  check_finite(op, "scale", plan.scale);
  plan.causal = causal;
  if (scores.window) {
    check_positive(op, "window", *scores.window);
    if (!causal) fail(op, ": window must be None where causal is false, got ", *scores.window);
    plan.window = std::min(*scores.window, kNoWindow);
  }
  if (scores.softcap) {
    const auto cap = static_cast<float>(*scores.softcap);
    if (!std::isfinite(cap) || cap <= 0)
      fail(op, ": softcap must be positive and finite, got ", *scores.softcap);
    plan.softcap = *scores.softcap;
  }
  if (scores.sinks) {
    const Tensor& sinks = *scores.sinks;
    check_shape(op, "sinks", sinks, {plan.H});
    if (sinks.scalar_type() != ScalarType::Float) check_dtype(op, "sinks", sinks, q.scalar_type());
    check_device(op, "sinks", sinks, q.device());
    plan.sinks = torch::stable::contiguous(torch::stable::to(sinks, wide_dtype(q)));
  }
}

// H, G, D, heads, unit and scores, which both ops have; no value of a tensor is read.
inline AttentionPlan describe_heads(const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
                                    int64_t heads, const std::string& unit, const OptionalTensor& index,
                                    const AttentionScores& scores, bool causal) {
  check_floating(op, "q", q);
  const int64_t last = q.dim() - 1;
  AttentionPlan plan{};
  plan.page = std::numeric_limits<int64_t>::max();
  plan.H = q.size(last - 1);
  plan.G = k.size(k.dim() - 2);
  plan.D = q.size(last);
  check_positive(op, "q.size(-1)", plan.D);
  check_positive(op, "k.size(-2)", plan.G);
  if (plan.H % plan.G != 0)
    fail(op, ": q.size(-2) must be divisible by the ", plan.G, " key/value heads, got ", plan.H);
  if (k.size(k.dim() - 1) != plan.D) fail(op, ": k.size(-1) must be ", plan.D, ", got ", k.size(k.dim() - 1));
  if (shape_text(k.sizes()) != shape_text(v.sizes()))
    fail(op, ": v must have shape ", shape_text(k.sizes()), ", got ", shape_text(v.sizes()));
  plan.M = plan.H / plan.G;
  if (unit != "kv_group" && unit != "query") fail(op, ": unit must be kv_group or query, got ", unit);
  plan.by_group = unit == "kv_group";
  plan.heads = heads;
  describe_scores(op, q, scores, causal, plan);
  if (!index) {
    check_range(op, "heads", heads, 0, plan.by_group ? plan.G : plan.M);
    return plan;
  }
  check_dim(op, "index", *index, 1);
  check_device(op, "index", *index, q.device());
  check_range(op, "heads", heads, index->size(0), index->size(0));
  return plan;
}

inline AttentionPlan start_plan(const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
                                int64_t heads, const std::string& unit, const OptionalTensor& index,
                                const AttentionScores& scores, bool causal) {
  AttentionPlan plan = describe_heads(op, q, k, v, heads, unit, index, scores, causal);
  if (!index) return plan;
  plan.chosen.assign(plan.H, 0);
  for (const int64_t h : host_integers(op, "index", *index, plan.H - 1)) {
    if (plan.chosen[h]) fail(op, ": index must name each head once, got ", h, " twice");
    plan.chosen[h] = 1;
  }
  return plan;
}

// A list of integers of a given length, each in [0, maximum].
inline std::vector<int64_t> check_list(const char* op, const char* name, const Tensor& t, int64_t length,
                                       int64_t maximum, const Tensor& q) {
  check_shape(op, name, t, {length});
  check_device(op, name, t, q.device());
  return host_integers(op, name, t, maximum);
}

template <class scalar_t>
HeadAttentionParams<scalar_t> attention_params(const AttentionPlan& plan) {
  HeadAttentionParams<scalar_t> p{};
  p.page = plan.page;
  p.sequences = plan.sequences.data();
  p.extent = plan.extent.empty() ? nullptr : plan.extent.data();
  p.extent_stride_b = plan.extent_stride_b;
  p.extent_stride_t = plan.extent_stride_t;
  p.chosen = plan.chosen.empty() ? nullptr : plan.chosen.data();
  p.heads = plan.heads;
  p.by_group = plan.by_group;
  p.causal = plan.causal;
  p.window = plan.window;
  p.scale = static_cast<accumulate_t<scalar_t>>(plan.scale);
  p.softcap = static_cast<accumulate_t<scalar_t>>(plan.softcap);
  p.sinks = plan.sinks ? data_of<accumulate_t<scalar_t>>(*plan.sinks) : nullptr;
  p.H = plan.H;
  p.G = plan.G;
  p.M = plan.M;
  p.D = plan.D;
  p.max_queries = plan.max_queries;
  p.max_keys = plan.max_keys;
  return p;
}

// Scratch of one thread. What is small is kept for the thread's next call: a decode step asks once a layer,
// and to give that much back makes malloc tidy up.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) : own_(bytes > kKept ? make(bytes) : nullptr), data_(own_.get()) {
    if (own_) return;
    thread_local Memory kept;
    thread_local int64_t kept_bytes = 0;
    if (kept_bytes < bytes) {
      kept = make(bytes);
      kept_bytes = bytes;
    }
    data_ = kept.get();
  }
  char* get() const { return data_; }

 private:
  static constexpr int64_t kKept = 256 * 1024;
  static constexpr std::align_val_t kAlign{64};
  struct Free {
    void operator()(char* data) const { ::operator delete(data, kAlign); }
  };
  using Memory = std::unique_ptr<char, Free>;
  static Memory make(int64_t bytes) { return Memory(static_cast<char*>(::operator new(bytes, kAlign))); }

  Memory own_;
  char* data_;
};

// launch(first, last, scratch) over [0, count) on torch's threads.
template <class Launch>
void run_items(int64_t count, int64_t cost, int64_t scratch_bytes, const Launch& launch) {
  parallel_for(count, cost, [&](int64_t first, int64_t last) {
    const Scratch scratch(scratch_bytes);
    launch(first, last, scratch.get());
  });
}

// Bytes of scratch of the forward pass, split or not.
template <class scalar_t>
int64_t forward_scratch(const HeadAttentionParams<scalar_t>& p) {
#ifdef __x86_64__
  if constexpr (std::is_same_v<scalar_t, bf16>)
    if (isa() == Isa::kAmx) return head_attention_amx_scratch(p);
#endif
  return head_attention_scratch(p);
}

// The launchers `name`_<isa>, of which a matrix unit has one for bfloat16.
#ifdef __x86_64__
#define FLEXTRON_FOR_MATRIX_ISA(name, scalar_t)   \
  [] {                                            \
    if constexpr (std::is_same_v<scalar_t, bf16>) \
      if (isa() == Isa::kAmx) return &name##_amx; \
    return FLEXTRON_FOR_ISA(name, scalar_t);      \
  }()
#else
#define FLEXTRON_FOR_MATRIX_ISA(name, scalar_t) FLEXTRON_FOR_ISA(name, scalar_t)
#endif

// Forward without splitting the keys; p has its pointers.
template <class scalar_t>
void run_forward(const AttentionPlan& plan, HeadAttentionParams<scalar_t> p) {
  const auto items = query_items(plan);
  p.items = items.data();
  const auto launch = FLEXTRON_FOR_MATRIX_ISA(head_attention, scalar_t);
  run_items(items.size(), plan.item_cost(plan.max_keys), forward_scratch(p),
            [&](int64_t first, int64_t last, char* scratch) { launch(p, first, last, scratch); });
}

// Whether whole (sequence, group) pairs, five products a tile, keep the threads as busy as blocks with seven
// do.
inline bool prefer_pairs(const AttentionPlan& plan, int64_t pairs) {
  constexpr int64_t kLongest = 16384;  // keys: a thread keeps both gradients of a pair, 8 MiB at D = 64
  const int64_t threads = torch::stable::get_num_threads();
  return plan.max_keys <= kLongest && blocks_of(pairs, threads) * threads * 5 <= pairs * 7;
}

template <class scalar_t, class grad_t>
void run_backward_part(const AttentionPlan& plan, HeadAttentionBackwardParams<scalar_t, grad_t> p,
                       BackwardPart part, const std::vector<AttentionItem>& items) {
  p.forward.items = items.data();
  const auto launch = FLEXTRON_FOR_ISA(head_attention_backward, scalar_t, grad_t);
  run_items(items.size(), plan.item_cost(plan.max_keys), head_attention_backward_scratch(p.forward, part),
            [&](int64_t first, int64_t last, char* scratch) { launch(p, part, first, last, scratch); });
}

// Before the other parts: delta, where the kernels do not make it from out, and the gradient of the sinks of
// the T rows; null where that is not wanted.
template <class scalar_t, class grad_t>
void run_first_parts(const AttentionPlan& plan, const HeadAttentionBackwardParams<scalar_t, grad_t>& p,
                     int64_t T, accumulate_t<scalar_t>* dsinks) {
  if (p.delta) run_backward_part(plan, p, BackwardPart::kDelta, query_items(plan));
  if (dsinks)
    parallel_for(plan.H, T * (p.delta ? 16 : plan.D),
                 [&](int64_t first, int64_t last) { head_attention_sinks_cpu(p, T, dsinks, first, last); });
}

template <class scalar_t, class grad_t>
void run_backward(const AttentionPlan& plan, const HeadAttentionBackwardParams<scalar_t, grad_t>& p) {
  const bool want_keys = p.dk.data || p.dv.data;
  if (p.dq && want_keys) {
    const auto pairs = pair_items(plan);
    if (prefer_pairs(plan, pairs.size())) return run_backward_part(plan, p, BackwardPart::kFused, pairs);
  }
  if (p.dq) run_backward_part(plan, p, BackwardPart::kQueries, query_items(plan));
  if (want_keys) run_backward_part(plan, p, BackwardPart::kKeys, key_items(plan));
}

// Which gradients output_mask asks for, and the gradients; one that is not wanted is empty.
struct AttentionWanted {
  bool q, k, v, sinks;
};
struct AttentionGradients {
  Tensor q, k, v, sinks;
};

inline AttentionWanted attention_wanted(const char* op, int64_t output_mask, const OptionalTensor& sinks) {
  check_range(op, "output_mask", output_mask, 0, 15);
  return {.q = (output_mask & 1) != 0,
          .k = (output_mask & 2) != 0,
          .v = (output_mask & 4) != 0,
          .sinks = (output_mask & 8) != 0 && sinks};
}

// Zeros for the gradients that are wanted; those of keys and values have the dtype k_dtype, those of sinks
// wide_dtype(q).
inline AttentionGradients room_for(const AttentionWanted& wanted, const Tensor& q, const Tensor& k,
                                   ScalarType k_dtype, const OptionalTensor& sinks) {
  const auto room = [](bool is_wanted, const Tensor& like, ScalarType dtype) {
    const std::vector<int64_t> shape(like.sizes().begin(), like.sizes().end());
    return is_wanted ? zeros(like, shape, dtype) : empty(like, {0}, dtype);
  };
  return {room(wanted.q, q, q.scalar_type()), room(wanted.k, k, k_dtype), room(wanted.v, k, k_dtype),
          room(wanted.sinks, sinks ? *sinks : q, wide_dtype(q))};
}

// The gradients as the ops return them, each in the dtype of its input.
inline std::tuple<Tensor, Tensor, Tensor, Tensor> in_dtypes(const AttentionGradients& d, const Tensor& q,
                                                            const OptionalTensor& sinks) {
  const ScalarType dtype = q.scalar_type();
  return {d.q, torch::stable::to(d.k, dtype), torch::stable::to(d.v, dtype),
          torch::stable::to(d.sinks, sinks ? sinks->scalar_type() : dtype)};
}

// What HeadAttentionBackwardParams::delta points to: one per query head for 16-bit types, nothing for the
// others.
inline Tensor delta_for(const Tensor& q, const AttentionPlan& plan) {
  const bool rounded = q.scalar_type() == ScalarType::BFloat16 || q.scalar_type() == ScalarType::Half;
  return zeros(q, {rounded ? q.numel() / plan.D : 0}, ScalarType::Float);
}

}  // namespace flextron
