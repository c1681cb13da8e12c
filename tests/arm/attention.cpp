// Attention: prompts and their gradients, and a few new tokens against a cache, split over the keys and
// merged.
#include <algorithm>
#include <new>

#include "checks.h"
#include "kernels/head_attention_decode.h"

namespace flextron {
namespace {

constexpr int64_t kHeads = 6, kGroups = 2, kOfGroup = kHeads / kGroups, kSize = 20;

struct Sequence {
  int64_t T, S, k_start;
};

struct Scores {
  bool causal = true;
  int64_t window = kNoWindow;
  float softcap = 0;
  bool sinks = false;
};

// Tokens of a batch use one group, both or none; what nobody uses is NaN.
template <class scalar_t>
struct Batch {
  std::vector<Sequence> sequences;
  Scores scores;
  int64_t page;
  std::vector<int64_t> first, extent;       // of a sequence, its first token; groups of a token
  std::vector<std::vector<int64_t>> pages;  // of a sequence
  std::vector<scalar_t> q, dout, k, v;      // [T][H][D], [pages][page][G][D]
  std::vector<float> sinks;

  Batch(std::vector<Sequence> s, Scores scores_, int64_t page_)
      : sequences(std::move(s)), scores(scores_), page(page_), sinks(drawn(kHeads)) {
    int64_t tokens = 0, count = 0;
    for (const Sequence& each : sequences) {
      first.push_back(tokens);
      pages.emplace_back();
      for (int64_t j = 0; j < each.S; j += page) pages.back().push_back(count++);
      tokens += each.T;
    }
    for (auto& list : pages)
      for (int64_t& number : list) number = count - 1 - number;
    for (int64_t t = 0; t < tokens; ++t) extent.push_back((t + 2) % 3);
    q.assign(tokens * kHeads * kSize, scalar_t(kNan));
    dout = q;
    k.assign(count * page * kGroups * kSize, scalar_t(kNan));
    v = k;
    const auto fill = [](scalar_t* to, int64_t n) {
      for (const float value : drawn(n)) *to++ = scalar_t(value);
    };
    for (int64_t t = 0; t < tokens; ++t)
      for (auto* rows : {&q, &dout}) fill(&(*rows)[t * kHeads * kSize], extent[t] * kOfGroup * kSize);
    for (size_t b = 0; b < sequences.size(); ++b)
      for (int64_t j = sequences[b].k_start; j < sequences[b].S; ++j) {
        fill(&k[key(b, j, 0)], kGroups * kSize);
        fill(&v[key(b, j, 0)], kGroups * kSize);
      }
  }

  int64_t key(size_t b, int64_t j, int64_t g) const {
    return ((pages[b][j / page] * page + j % page) * kGroups + g) * kSize;
  }
};

struct Result {
  std::vector<double> out, lse, dq, dk, dv;
};

// Bytes at whole lines.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) : memory_(static_cast<char*>(::operator new(bytes, kLine))) {}
  ~Scratch() { ::operator delete(memory_, kLine); }
  Scratch(const Scratch&) = delete;
  char* get() const { return memory_; }

 private:
  static constexpr std::align_val_t kLine{64};
  char* memory_;
};

// Gradients of what p is of, by one of the two ways.
template <class scalar_t>
void differentiate(const Batch<scalar_t>& batch, const HeadAttentionParams<scalar_t>& p,
                   const std::vector<AttentionItem>& queries, bool fused, Result& to) {
  std::vector<scalar_t> dq(batch.q.size(), scalar_t(0.0f));
  std::vector<float> dk(batch.k.size(), 0.0f), dv = dk, delta(batch.extent.size() * kHeads, 0.0f);
  HeadAttentionBackwardParams<scalar_t, float> d{};
  d.forward = p;
  d.dout = batch.dout.data();
  d.delta = std::is_same_v<scalar_t, float> ? nullptr : delta.data();
  d.dq = dq.data();
  d.dk = {dk.data(), p.k.page_stride, p.k.key_stride, p.k.group_stride};
  d.dv = {dv.data(), p.v.page_stride, p.v.key_stride, p.v.group_stride};
  const auto part = [&](BackwardPart which, const std::vector<AttentionItem>& items) {
    d.forward.items = items.data();
    const Scratch scratch(head_attention_backward_scratch(p, which));
    const int64_t count = static_cast<int64_t>(items.size()), middle = count / 3;
    head_attention_backward_cpu(d, which, 0, middle, scratch.get());
    head_attention_backward_cpu(d, which, middle, count, scratch.get());
  };
  std::vector<AttentionItem> pairs, keys;
  for (const AttentionItem& item : queries) {
    const bool known = std::any_of(pairs.begin(), pairs.end(), [&](const AttentionItem& pair) {
      return pair.sequence == item.sequence && pair.group == item.group;
    });
    if (known) continue;
    pairs.push_back({item.sequence, item.group, 0});
    const AttentionSequence& s = p.sequences[item.sequence];
    for (int64_t j = s.k_start; j < s.S; j += kAttentionKeys)
      keys.push_back({item.sequence, item.group, (j - s.k_start) / kAttentionKeys});
  }
  if (d.delta) part(BackwardPart::kDelta, queries);
  if (fused) {
    part(BackwardPart::kFused, pairs);
  } else {
    part(BackwardPart::kQueries, queries);
    part(BackwardPart::kKeys, keys);
  }
  to.dq.clear();
  for (const scalar_t value : dq) to.dq.push_back(static_cast<float>(value));
  to.dk.assign(dk.begin(), dk.end());
  to.dv.assign(dv.begin(), dv.end());
}

// Of some of the sequences.
template <class scalar_t>
Result run(const Batch<scalar_t>& batch, const std::vector<size_t>& which, bool split) {
  std::vector<AttentionSequence> sequences;
  std::vector<AttentionItem> items;
  std::vector<int64_t> merge_at{0};
  HeadAttentionParams<scalar_t> p{};
  for (const size_t b : which) {
    const Sequence& s = batch.sequences[b];
    const int64_t k_start = std::max(s.k_start, s.S - s.T + 1 - batch.scores.window), keys = s.S - k_start;
    p.max_queries = std::max(p.max_queries, std::min(s.T, kAttentionQueries));
    p.max_keys = std::max(p.max_keys, keys);
    for (int64_t g = 0; g < kGroups; ++g)
      for (int64_t i = 0; i < s.T; i += kAttentionQueries) {
        const auto at = batch.extent.begin() + batch.first[b] + i;
        if (*std::max_element(at, at + std::min(kAttentionQueries, s.T - i)) <= g) continue;
        AttentionItem item{static_cast<int64_t>(sequences.size()), g, i / kAttentionQueries};
        const int64_t part = split ? 112 : keys;
        for (; item.begin < keys; item.begin = item.end) {
          item.end = std::min(item.begin + part, keys);
          items.push_back(item);
        }
        merge_at.push_back(static_cast<int64_t>(items.size()));
      }
    sequences.push_back({batch.first[b], s.T, s.S, k_start, 0, batch.pages[b].data()});
  }
  const int64_t rows = static_cast<int64_t>(batch.extent.size()) * kHeads;
  std::vector<scalar_t> out(rows * kSize, scalar_t(0.0f));
  std::vector<float> lse(rows, -std::numeric_limits<float>::infinity());
  p.q = batch.q.data();
  p.q_stride_t = kHeads * kSize;
  p.q_stride_h = kSize;
  p.k = {batch.k.data(), batch.page * kGroups * kSize, kGroups * kSize, kSize};
  p.v = {batch.v.data(), batch.page * kGroups * kSize, kGroups * kSize, kSize};
  p.page = batch.page;
  p.out = out.data();
  p.lse = split ? nullptr : lse.data();
  p.sequences = sequences.data();
  p.items = items.data();
  p.extent = batch.extent.data();
  p.extent_stride_t = 1;
  p.heads = kGroups;
  p.by_group = true;
  p.few_rows = split;
  p.causal = batch.scores.causal;
  p.window = batch.scores.window;
  p.scale = 0.3f;
  p.softcap = batch.scores.softcap;
  p.sinks = batch.scores.sinks ? batch.sinks.data() : nullptr;
  p.H = kHeads, p.G = kGroups, p.M = kOfGroup, p.D = kSize;
  const Scratch scratch(head_attention_scratch(p));
  const int64_t count = static_cast<int64_t>(items.size()), middle = count / 3;  // two threads' parts
  if (split) {
    std::vector<float> partial(count * p.max_queries * kOfGroup * (kSize + 2), kNan);
    const HeadAttentionDecodeParams<scalar_t> parts{p, partial.data(), merge_at.data()};
    head_attention_decode_cpu(parts, 0, middle, scratch.get());
    head_attention_decode_cpu(parts, middle, count, scratch.get());
    head_attention_decode_merge_cpu(parts, 0, static_cast<int64_t>(merge_at.size()) - 1, scratch.get());
  } else {
    head_attention_cpu(p, 0, middle, scratch.get());
    head_attention_cpu(p, middle, count, scratch.get());
  }
  Result result{{}, {lse.begin(), lse.end()}, {}, {}, {}};
  for (const scalar_t value : out) result.out.push_back(static_cast<float>(value));
  if constexpr (!std::is_same_v<scalar_t, fp16>)
    if (!split) {
      Result other;
      differentiate(batch, p, items, false, other);
      differentiate(batch, p, items, true, result);
      expect(result.dq == other.dq && result.dk == other.dk && result.dv == other.dv,
             "attention: gradients differ by the way they are made");
    }
  return result;
}

// In T; results of floats as the kernel stores its own.
template <class T, class scalar_t>
Result reference(const Batch<scalar_t>& batch) {
  Result to;
  const auto value = [](scalar_t x) { return static_cast<T>(static_cast<float>(x)); };
  const auto stored = [](T x) {
    return std::is_same_v<T, float> ? static_cast<float>(scalar_t(static_cast<float>(x))) : double(x);
  };
  std::vector<T> dk(batch.k.size(), T(0)), dv = dk;
  for (size_t b = 0; b < batch.sequences.size(); ++b) {
    const Sequence& s = batch.sequences[b];
    for (int64_t i = 0; i < s.T; ++i)
      for (int64_t h = 0; h < kHeads; ++h) {
        const int64_t t = batch.first[b] + i, g = h / kOfGroup;
        const int64_t last = batch.scores.causal ? std::clamp<int64_t>(i + s.S - s.T + 1, 0, s.S) : s.S;
        const int64_t first = std::max(s.k_start, last - batch.scores.window);
        const scalar_t* const q = &batch.q[(t * kHeads + h) * kSize];
        const scalar_t* const dout = &batch.dout[(t * kHeads + h) * kSize];
        const auto dot = [&](const scalar_t* x, const scalar_t* y) {
          T sum = 0;
          for (int64_t d = 0; d < kSize; ++d) sum += value(x[d]) * value(y[d]);
          return sum;
        };
        std::vector<T> sum(kSize, T(0)), dq(kSize, T(0)), score;
        const bool active = g < batch.extent[t];
        const T cap = batch.scores.softcap;
        for (int64_t j = first; j < last && active; ++j) {
          const T x = T(0.3f) * dot(q, &batch.k[batch.key(b, j, g)]);
          score.push_back(cap > 0 ? cap * std::tanh(x / cap) : x);
        }
        T most = batch.scores.sinks ? T(batch.sinks[h]) : -std::numeric_limits<T>::infinity(), total = 0;
        for (const T x : score) most = std::max(most, x);
        for (const T x : score) total += std::exp(x - most);
        if (batch.scores.sinks) total += std::exp(T(batch.sinks[h]) - most);
        T delta = 0;
        for (size_t j = 0; j < score.size(); ++j) {
          const int64_t at = batch.key(b, first + j, g);
          const T share = std::exp(score[j] - most) / total;
          for (int64_t d = 0; d < kSize; ++d) sum[d] += share * value(batch.v[at + d]);
          delta += share * dot(dout, &batch.v[at]);
        }
        for (size_t j = 0; j < score.size(); ++j) {
          const int64_t at = batch.key(b, first + j, g);
          const T share = std::exp(score[j] - most) / total, slope = cap > 0 ? score[j] / cap : T(0);
          const T ds = T(0.3f) * share * (dot(dout, &batch.v[at]) - delta) * (1 - slope * slope);
          for (int64_t d = 0; d < kSize; ++d) {
            dq[d] += ds * value(batch.k[at + d]);
            dk[at + d] += ds * value(q[d]);
            dv[at + d] += share * value(dout[d]);
          }
        }
        for (const T x : sum) to.out.push_back(stored(x));
        for (const T x : dq) to.dq.push_back(stored(x));
        const bool none = score.empty() && !(active && batch.scores.sinks);
        to.lse.push_back(none ? -std::numeric_limits<double>::infinity() : most + std::log(total));
      }
  }
  to.dk.assign(dk.begin(), dk.end());
  to.dv.assign(dv.begin(), dv.end());
  return to;
}

// Of one sequence's tokens.
std::vector<double> part_of(const std::vector<double>& all, int64_t first, int64_t tokens, int64_t each) {
  return {all.begin() + first * each, all.begin() + (first + tokens) * each};
}

template <class scalar_t>
void check(const std::string& dtype, const std::vector<Sequence>& sequences, const Scores& scores,
           int64_t page, bool split) {
  const Batch<scalar_t> batch(sequences, scores, page);
  const std::string what = std::string("attention ") + (split ? "split " : "") + dtype + " pages of " +
                           std::to_string(page) + (scores.causal ? " causal" : "") +
                           (scores.window < kNoWindow ? " window" : "") +
                           (scores.softcap > 0 ? " capped" : "") + (scores.sinks ? " sinks" : "");
  std::vector<size_t> all;
  for (size_t b = 0; b < sequences.size(); ++b) all.push_back(b);
  const Result ours = run(batch, all, split);
  Result exact = reference<double>(batch), loop = reference<float>(batch);
  expect_exact(ours.out, loop.out, exact.out, what);
  if (!split) {
    Result ends = ours;
    for (Result* each : {&ends, &exact, &loop})
      for (double& x : each->lse) x = std::isinf(x) ? -100 : x;  // a row that sees no key
    expect_exact(ends.lse, loop.lse, exact.lse, what + " lse");
    if (!ours.dq.empty()) {
      expect_exact(ours.dq, loop.dq, exact.dq, what + " dq");
      expect_exact(ours.dk, loop.dk, exact.dk, what + " dk");
      expect_exact(ours.dv, loop.dv, exact.dv, what + " dv");
    }
  }
  for (const size_t b : all) {
    const int64_t first = batch.first[b], T = sequences[b].T, each = kHeads * kSize;
    expect(part_of(run(batch, {b}, split).out, first, T, each) == part_of(ours.out, first, T, each),
           what + ": a sequence's bits differ");
  }
}

template <class scalar_t>
void check_dtype(const std::string& dtype) {
  const std::vector<Sequence> prompts{{40, 70, 0}, {3, 90, 7}, {70, 70, 0}, {5, 3, 0}};
  const std::vector<Sequence> steps{{1, 300, 0}, {2, 401, 130}, {1, 5, 0}, {4, 113, 0}};
  for (const int64_t page : {16, 512}) {
    for (const Scores& scores : {Scores{}, Scores{true, 20, 0, true}, Scores{true, kNoWindow, 1.5f}}) {
      check<scalar_t>(dtype, prompts, scores, page, false);
      check<scalar_t>(dtype, steps, scores, page, true);
    }
    check<scalar_t>(dtype, prompts, {false}, page, false);
  }
}

}  // namespace

void check_attention() {
  check_dtype<float>("float32");
  check_dtype<bf16>("bfloat16");
  check_dtype<fp16>("float16");
}

}  // namespace flextron
