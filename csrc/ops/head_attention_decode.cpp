// head_attention_decode: attention of a few new tokens over a prefix of heads, against a contiguous or paged
// cache.
#include "ops/attention_decode.h"
#include "ops/attention_gpu.h"

namespace flextron {
namespace {

// The arguments that both ops have, in the order of their schemas.
struct HeadAttentionDecode {
  const char* op;
  const Tensor &q, &k_cache, &v_cache, &seqlens;
  int64_t heads;
  const Text& unit;
  const OptionalTensor &extent, &block_table, &k_start;
  AttentionScores scores;

  int64_t B() const { return q.size(0); }
  int64_t T() const { return q.size(1); }
  bool one_extent() const { return extent->dim() == 1 && extent->size(0) == 1; }  // for all sequences
};

// What is known without reading a value of a tensor.
struct Described {
  AttentionPlan plan;
  int64_t columns;  // pages of a sequence: a contiguous cache is one page each
  int64_t room;     // keys of a sequence at most
};

Described describe(const HeadAttentionDecode& a) {
  check_dim(a.op, "k_cache", a.k_cache, 4);
  check_dim(a.op, "v_cache", a.v_cache, 4);
  AttentionPlan plan =
      describe_heads(a.op, a.q, a.k_cache, a.v_cache, a.heads, a.unit.value, std::nullopt, a.scores, true);
  const int64_t B = a.B();
  int64_t columns = 1;
  if (a.block_table) {
    check_dim(a.op, "block_table", *a.block_table, 2);
    columns = a.block_table->size(1);
    check_shape(a.op, "block_table", *a.block_table, {B, columns});
    check_device(a.op, "block_table", *a.block_table, a.q.device());
    check_integers(a.op, "block_table", *a.block_table);
  } else if (a.k_cache.size(0) != B) {
    fail(a.op, ": k_cache.size(0) must be ", B, " without block_table, got ", a.k_cache.size(0));
  }
  return {std::move(plan), columns, columns * a.k_cache.size(1)};
}

// The pages each sequence uses; entries of block_table beyond them are never looked at.
std::vector<int64_t> read_pages(const char* op, const Tensor& block_table,
                                const std::vector<int64_t>& lengths, const Tensor& cache) {
  const Tensor wide = torch::stable::contiguous(torch::stable::to(block_table, ScalarType::Long));
  const auto* data = data_of<int64_t>(wide);
  std::vector<int64_t> pages(data, data + wide.numel());
  const int64_t columns = block_table.size(1), P = cache.size(0), page = std::max<int64_t>(cache.size(1), 1);
  for (size_t b = 0; b < lengths.size(); ++b)
    for (int64_t i = 0; i < blocks_of(lengths[b], page); ++i) {
      const int64_t number = pages[b * columns + i];
      if (number < 0 || number >= P)
        fail(op, ": block_table must name pages in [0, ", P - 1, "] for the keys in use, got ", number);
    }
  return pages;
}

AttentionPlan make_plan(const HeadAttentionDecode& a) {
  Described described = describe(a);
  AttentionPlan plan = std::move(described.plan);
  const int64_t columns = described.columns, room = described.room, B = a.B(), T = a.T();
  plan.page = std::max<int64_t>(a.k_cache.size(1), 1);
  const auto lengths = check_list(a.op, "seqlens", a.seqlens, B, room, a.q);
  const auto starts =
      a.k_start ? check_list(a.op, "k_start", *a.k_start, B, room, a.q) : std::vector<int64_t>(B, 0);
  if (a.extent) {
    plan.extent = check_list(a.op, "extent", *a.extent, a.one_extent() ? 1 : B, a.heads, a.q);
    plan.extent_stride_b = a.one_extent() ? 0 : 1;
  }

  if (a.block_table) {
    plan.pages = read_pages(a.op, *a.block_table, lengths, a.k_cache);
  } else {
    for (int64_t b = 0; b < B; ++b) plan.pages.push_back(b);
  }
  for (int64_t b = 0; b < B; ++b)
    plan.sequences.push_back({.query = b * T,
                              .T = T,
                              .S = lengths[b],
                              .k_start = std::min(starts[b], lengths[b]),
                              .position = 0,
                              .pages = plan.pages.data() + b * columns});
  plan.measure();
  return plan;
}

template <class scalar_t>
HeadAttentionParams<scalar_t> fill_params(const AttentionPlan& plan, const Tensor& q, const Tensor& k,
                                          const Tensor& v) {
  auto p = attention_params<scalar_t>(plan);
  p.q = data_of<scalar_t>(q);
  p.q_stride_t = plan.H * plan.D;
  p.q_stride_h = plan.D;
  p.k = {data_of<scalar_t>(k), k.stride(0), k.stride(1), k.stride(2)};
  p.v = {data_of<scalar_t>(v), v.stride(0), v.stride(1), v.stride(2)};
  return p;
}

// Sequences may share pages, so the sequences of a group take turns; groups never meet.
template <class scalar_t, class grad_t>
void run_paged_backward(const AttentionPlan& plan, HeadAttentionBackwardParams<scalar_t, grad_t> p) {
  const auto pairs = pair_items(plan);  // group after group
  p.forward.items = pairs.data();
  const auto launch = FLEXTRON_FOR_ISA(head_attention_backward, scalar_t, grad_t);
  const auto begin_of = [&](int64_t group) {
    return std::lower_bound(pairs.begin(), pairs.end(), group,
                            [](const AttentionItem& item, int64_t g) { return item.group < g; }) -
           pairs.begin();
  };
  run_items(plan.G, plan.item_cost(plan.max_keys),
            head_attention_backward_scratch(p.forward, BackwardPart::kFused),
            [&](int64_t first, int64_t last, char* scratch) {
              launch(p, BackwardPart::kFused, begin_of(first), begin_of(last), scratch);
            });
}

// ---- on a GPU ----

// Rows [B, T] in one stride, D adjacent; a copy where that cannot be.
Tensor as_rows(const Tensor& t) {
  const bool one_stride = t.size(0) <= 1 || t.size(1) <= 1 || t.stride(0) == t.size(1) * t.stride(1);
  return one_stride ? adjacent(t) : torch::stable::contiguous(t);
}

struct DeviceCall {
  AttentionPlan plan;  // what is known without a value of a tensor
  DeviceAttention device;
  Tensor q, k, v;

  // Whether every head is known to be written.
  bool all_heads() const {
    return device.call.extent == nullptr && plan.heads == (plan.by_group ? plan.G : plan.M);
  }

  template <class Call, class scalar_t>
  Call fill() const {
    auto call = attention_call<Call>(plan, device.call);
    call.q = data_of<scalar_t>(q);
    call.q_stride_h = q.stride(2);
    call.q_stride_t = q.size(1) == 1 ? q.stride(0) : q.stride(1);
    call.k = {data_of<scalar_t>(k), k.stride(0), k.stride(1), k.stride(2)};
    call.v = {data_of<scalar_t>(v), v.stride(0), v.stride(1), v.stride(2)};
    return call;
  }
};

DeviceCall make_device_call(const HeadAttentionDecode& a) {
  const Described described = describe(a);
  DeviceCall result{described.plan, DeviceAttention(described.plan), as_rows(a.q),
                    check_rows(a.op, "k_cache", a.k_cache, a.q), check_rows(a.op, "v_cache", a.v_cache, a.q)};
  check_range(a.op, "the keys of a sequence in the cache", described.room, 0,
              std::numeric_limits<int32_t>::max());
  const int64_t B = a.B();
  const auto add = [&](const char* name, const Tensor& t, std::initializer_list<int64_t> shape) {
    return result.device.add(a.op, name, t, shape, a.q);
  };
  AttentionCall& call = result.device.call;
  call.B = B;
  call.queries_each = a.T();
  call.T = B * a.T();
  call.S = a.k_cache.size(1);
  call.pages = a.k_cache.size(0);
  call.columns = described.columns;
  call.seqlens = add("seqlens", a.seqlens, {B});
  if (a.block_table) call.block_table = add("block_table", *a.block_table, {B, call.columns});
  if (a.k_start) call.k_start = add("k_start", *a.k_start, {B});
  if (a.extent) {
    call.extent = add("extent", *a.extent, {a.one_extent() ? 1 : B});
    call.extent_stride_b = a.one_extent() ? 0 : 1;
  }
  return result;
}

Tensor forward_on_gpu(const HeadAttentionDecode& a) {
  const DeviceCall device_call = make_device_call(a);
  const Tensor& q = a.q;
  const std::vector<int64_t> shape{a.B(), a.T(), device_call.plan.H, device_call.plan.D};
  const Tensor out = device_call.all_heads() ? empty(q, shape) : zeros(q, shape);
  dispatch_dtype(HeadAttentionTypes{}, a.op, q.scalar_type(), [&]<class scalar_t>() {
    auto call = device_call.fill<HeadAttentionCall<scalar_t>, scalar_t>();
    call.out = mutable_data_of<scalar_t>(out);
    Tensor partial = empty(q, {0}, wide_dtype(q));
    on_gpu_of(a.op, q, [&](auto stream) {
      partial = empty(partial, {head_attention_decode_partial(call)});
      head_attention_decode_cuda(call, mutable_data_of<accumulate_t<scalar_t>>(partial), stream);
    });
  });
  return out;
}

// The lse that the backward pass needs is made again, with scores as the backward pass makes them.
AttentionGradients backward_on_gpu(const HeadAttentionDecode& a, const Tensor& dout_,
                                   const AttentionWanted& wanted) {
  const DeviceCall device_call = make_device_call(a);
  const Tensor& q = a.q;
  const int64_t H = device_call.plan.H, G = device_call.plan.G, D = device_call.plan.D,
                page = a.k_cache.size(1);
  check_like(a.op, "dout", dout_, {a.B(), a.T(), H, D}, q.scalar_type(), q.device());
  const Tensor dout = torch::stable::contiguous(dout_), out = empty(q, {a.B(), a.T(), H, D});
  const std::vector<int64_t> row_shape{a.B(), a.T(), H};
  Tensor lse = empty(q, row_shape, wide_dtype(q));
  if (wanted.sinks) torch::stable::fill_(lse, -std::numeric_limits<double>::infinity());  // of inactive heads
  const Tensor delta = empty(q, row_shape, wide_dtype(q));
  AttentionGradients d = room_for(wanted, q, a.k_cache, q.scalar_type(), a.scores.sinks);
  dispatch_dtype(HeadAttentionTypes{}, a.op, q.scalar_type(), [&]<class scalar_t>() {
    using acc_t = accumulate_t<scalar_t>;
    auto call = device_call.fill<HeadAttentionBackwardCall<scalar_t>, scalar_t>();
    call.out = mutable_data_of<scalar_t>(out);
    call.lse = mutable_data_of<acc_t>(lse);
    call.dout = data_of<scalar_t>(dout);
    call.delta = mutable_data_of<acc_t>(delta);
    if (wanted.q) call.dq = mutable_data_of<scalar_t>(d.q);
    if (wanted.k) call.dk = {mutable_data_of<scalar_t>(d.k), page * G * D, G * D, D};
    if (wanted.v) call.dv = {mutable_data_of<scalar_t>(d.v), page * G * D, G * D, D};
    if (wanted.sinks) call.dsinks = mutable_data_of<acc_t>(d.sinks);
    Workspace workspace(q);
    on_gpu_of(a.op, q, [&](auto stream) {
      if (call.T > 0 && call.heads > 0)
        head_attention_cuda<scalar_t>(
            call, workspace.queries(call, call.T, head_attention_rows<scalar_t>(call), stream), stream);
      launch_head_attention_backward(call, workspace, stream);
    });
  });
  return d;
}

// ---- on a CPU ----

// q contiguous, the caches with adjacent last dimensions.
struct Rows {
  Tensor q, k, v;
};
Rows rows_of(const HeadAttentionDecode& a) {
  return {torch::stable::contiguous(a.q), check_rows(a.op, "k_cache", a.k_cache, a.q),
          check_rows(a.op, "v_cache", a.v_cache, a.q)};
}

Tensor forward_on_cpu(const HeadAttentionDecode& a) {
  const AttentionPlan plan = make_plan(a);
  const Rows rows = rows_of(a);
  const Tensor out = zeros(a.q, {a.B(), a.T(), plan.H, plan.D});
  dispatch_dtype(HeadAttentionTypes{}, a.op, a.q.scalar_type(), [&]<class scalar_t>() {
    auto p = fill_params<scalar_t>(plan, rows.q, rows.k, rows.v);
    p.out = mutable_data_of<scalar_t>(out);
    run_decode(plan, p, a.q);
  });
  return out;
}

AttentionGradients backward_on_cpu(const HeadAttentionDecode& a, const Tensor& dout_,
                                   const AttentionWanted& wanted) {
  const AttentionPlan plan = make_plan(a);
  const Tensor& q = a.q;
  const int64_t page = a.k_cache.size(1), key = plan.G * plan.D;
  check_like(a.op, "dout", dout_, {a.B(), a.T(), plan.H, plan.D}, q.scalar_type(), q.device());
  const Rows rows = rows_of(a);
  const Tensor dout = torch::stable::contiguous(dout_), delta = delta_for(q, plan);
  const Tensor out = zeros(q, {a.B(), a.T(), plan.H, plan.D});
  Tensor lse = empty(q, {a.B(), a.T(), plan.H}, wide_dtype(q));
  torch::stable::fill_(lse, -std::numeric_limits<double>::infinity());
  // Keys' and values' are summed in the wider type: several sequences may add to one page.
  AttentionGradients d = room_for(wanted, q, a.k_cache, wide_dtype(q), a.scores.sinks);
  dispatch_dtype(HeadAttentionTypes{}, a.op, q.scalar_type(), [&]<class scalar_t>() {
    using acc_t = accumulate_t<scalar_t>;
    HeadAttentionBackwardParams<scalar_t, acc_t> p{};
    p.forward = fill_params<scalar_t>(plan, rows.q, rows.k, rows.v);
    p.forward.out = mutable_data_of<scalar_t>(out);
    p.forward.lse = mutable_data_of<acc_t>(lse);
    run_decode(plan, p.forward, q);
    p.dout = data_of<scalar_t>(dout);
    if (delta.numel() > 0) p.delta = mutable_data_of<acc_t>(delta);
    if (wanted.q) p.dq = mutable_data_of<scalar_t>(d.q);
    if (wanted.k) p.dk = {mutable_data_of<acc_t>(d.k), page * key, key, plan.D};
    if (wanted.v) p.dv = {mutable_data_of<acc_t>(d.v), page * key, key, plan.D};
    run_first_parts(plan, p, a.B() * a.T(), wanted.sinks ? mutable_data_of<acc_t>(d.sinks) : nullptr);
    if (a.block_table && (p.dk.data || p.dv.data))
      run_paged_backward(plan, p);
    else
      run_backward(plan, p);
  });
  return d;
}

}  // namespace

Tensor head_attention_decode(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                             const Tensor& seqlens, int64_t heads, const Text& unit,
                             const OptionalTensor& extent, const OptionalTensor& block_table,
                             const OptionalTensor& k_start, std::optional<double> scale,
                             std::optional<int64_t> window, std::optional<double> softcap,
                             const OptionalTensor& sinks) {
  constexpr auto op = "head_attention_decode";
  const NoGrad no_grad;
  check_dim(op, "q", q, 4);
  const AttentionScores scores{scale, window, softcap, sinks};
  const HeadAttentionDecode arguments{op,   q,      k_cache,     v_cache, seqlens, heads,
                                      unit, extent, block_table, k_start, scores};
  return runs_on_gpu(q) ? forward_on_gpu(arguments) : forward_on_cpu(arguments);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> head_attention_decode_backward(
    const Tensor& dout, const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const Tensor& seqlens,
    int64_t heads, const Text& unit, const OptionalTensor& extent, const OptionalTensor& block_table,
    const OptionalTensor& k_start, std::optional<double> scale, std::optional<int64_t> window,
    std::optional<double> softcap, const OptionalTensor& sinks, int64_t output_mask) {
  constexpr auto op = "head_attention_decode_backward";
  const NoGrad no_grad;
  check_dim(op, "q", q, 4);
  const AttentionScores scores{scale, window, softcap, sinks};
  const HeadAttentionDecode arguments{op,   q,      k_cache,     v_cache, seqlens, heads,
                                      unit, extent, block_table, k_start, scores};
  const AttentionWanted wanted = attention_wanted(op, output_mask, sinks);
  const AttentionGradients d =
      runs_on_gpu(q) ? backward_on_gpu(arguments, dout, wanted) : backward_on_cpu(arguments, dout, wanted);
  return in_dtypes(d, q, sinks);
}

}  // namespace flextron
