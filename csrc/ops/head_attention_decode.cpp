// head_attention_decode: attention of a few new tokens over a prefix of heads, against a contiguous or paged
// cache.
#include "ops/attention_decode.h"
#include "ops/attention_gpu.h"

namespace flextron {
namespace {

// What is known without reading a value of a tensor.
struct Described {
  AttentionPlan plan;
  int64_t columns;  // pages of a sequence: a contiguous cache is one page each
  int64_t room;     // keys of a sequence at most
};

Described describe(const char* op, const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                   int64_t heads, const Text& unit, const OptionalTensor& block_table,
                   std::optional<double> scale) {
  check_dim(op, "k_cache", k_cache, 4);
  check_dim(op, "v_cache", v_cache, 4);
  AttentionPlan plan = describe_heads(op, q, k_cache, v_cache, heads, unit.value, std::nullopt, scale);
  plan.causal = true;
  const int64_t B = q.size(0);
  int64_t columns = 1;
  if (block_table) {
    check_dim(op, "block_table", *block_table, 2);
    columns = block_table->size(1);
    check_shape(op, "block_table", *block_table, {B, columns});
    check_device(op, "block_table", *block_table, q.device());
    check_integers(op, "block_table", *block_table);
  } else if (k_cache.size(0) != B) {
    fail(op, ": k_cache.size(0) must be ", B, " without block_table, got ", k_cache.size(0));
  }
  return {std::move(plan), columns, columns * k_cache.size(1)};
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

AttentionPlan make_plan(const char* op, const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                        const Tensor& seqlens, int64_t heads, const Text& unit, const OptionalTensor& extent,
                        const OptionalTensor& block_table, const OptionalTensor& k_start,
                        std::optional<double> scale) {
  Described described = describe(op, q, k_cache, v_cache, heads, unit, block_table, scale);
  AttentionPlan plan = std::move(described.plan);
  const int64_t columns = described.columns, room = described.room;
  const int64_t B = q.size(0), T = q.size(1);
  plan.page = std::max<int64_t>(k_cache.size(1), 1);
  const auto lengths = check_list(op, "seqlens", seqlens, B, room, q);
  const auto starts = k_start ? check_list(op, "k_start", *k_start, B, room, q) : std::vector<int64_t>(B, 0);
  if (extent) {
    const bool one = extent->dim() == 1 && extent->size(0) == 1;
    plan.extent = check_list(op, "extent", *extent, one ? 1 : B, heads, q);
    plan.extent_stride_b = one ? 0 : 1;
  }

  if (block_table) {
    plan.pages = read_pages(op, *block_table, lengths, k_cache);
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
  p.q = data_of<scalar_t>(q), p.q_stride_t = plan.H * plan.D, p.q_stride_h = plan.D;
  p.k = {data_of<scalar_t>(k), k.stride(0), k.stride(1), k.stride(2)};
  p.v = {data_of<scalar_t>(v), v.stride(0), v.stride(1), v.stride(2)};
  return p;
}

// Sequences may share pages, so the sequences of a group take turns; groups never meet.
template <class scalar_t, class grad_t>
void run_paged_backward(const AttentionPlan& plan, HeadAttentionBackwardParams<scalar_t, grad_t> p) {
  run_delta(plan, p);
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
  AttentionPlan plan;
  DeviceAttention device;
  Tensor q, k, v;

  DeviceCall(const char* op, const Tensor& q_, const Tensor& k_cache, const Tensor& v_cache,
             const Tensor& seqlens, int64_t heads, const Text& unit, const OptionalTensor& extent,
             const OptionalTensor& block_table, const OptionalTensor& k_start, std::optional<double> scale)
      : DeviceCall(op, describe(op, q_, k_cache, v_cache, heads, unit, block_table, scale), q_, k_cache,
                   v_cache, seqlens, extent, block_table, k_start) {}

  // Whether every head is known to be written.
  bool all_heads() const {
    return device.call.extent == nullptr && plan.heads == (plan.by_group ? plan.G : plan.M);
  }

  template <class Call, class scalar_t>
  Call fill() const {
    auto call = attention_call<Call>(plan, device.call);
    call.q = data_of<scalar_t>(q), call.q_stride_h = q.stride(2);
    call.q_stride_t = q.size(1) == 1 ? q.stride(0) : q.stride(1);
    call.k = {data_of<scalar_t>(k), k.stride(0), k.stride(1), k.stride(2)};
    call.v = {data_of<scalar_t>(v), v.stride(0), v.stride(1), v.stride(2)};
    return call;
  }

 private:
  DeviceCall(const char* op, Described described, const Tensor& q_, const Tensor& k_cache,
             const Tensor& v_cache, const Tensor& seqlens, const OptionalTensor& extent,
             const OptionalTensor& block_table, const OptionalTensor& k_start)
      : plan(std::move(described.plan)),
        device(plan),
        q(as_rows(q_)),
        k(check_rows(op, "k_cache", k_cache, q_)),
        v(check_rows(op, "v_cache", v_cache, q_)) {
    check_range(op, "the keys of a sequence in the cache", described.room, 0,
                std::numeric_limits<int32_t>::max());
    const int64_t B = q.size(0);
    auto& call = device.call;
    call.B = B, call.queries_each = q.size(1), call.T = B * q.size(1);
    call.S = k_cache.size(1), call.pages = k_cache.size(0), call.columns = described.columns;
    call.seqlens = device.add(op, "seqlens", seqlens, {B}, q);
    if (block_table) call.block_table = device.add(op, "block_table", *block_table, {B, call.columns}, q);
    if (k_start) call.k_start = device.add(op, "k_start", *k_start, {B}, q);
    if (extent) {
      const bool one = extent->dim() == 1 && extent->size(0) == 1;
      call.extent = device.add(op, "extent", *extent, {one ? 1 : B}, q);
      call.extent_stride_b = one ? 0 : 1;
    }
  }
};

Tensor decode_on_gpu(const char* op, const DeviceCall& of, const Tensor& q) {
  const std::vector<int64_t> shape{q.size(0), q.size(1), of.plan.H, of.plan.D};
  const Tensor out = of.all_heads() ? empty(q, shape) : zeros(q, shape);
  dispatch_dtype(HeadAttentionTypes{}, op, q.scalar_type(), [&]<class scalar_t>() {
    auto call = of.fill<HeadAttentionCall<scalar_t>, scalar_t>();
    call.out = mutable_data_of<scalar_t>(out);
    Tensor partial = empty(q, {0}, wide_dtype(q));
    on_gpu_of(op, q, [&](auto stream) {
      partial = empty(partial, {head_attention_decode_partial(call)});
      head_attention_decode_cuda(call, mutable_data_of<accumulate_t<scalar_t>>(partial), stream);
    });
  });
  return out;
}

// Of the forward pass lse is needed: made again with scores as the backward pass makes them.
std::tuple<Tensor, Tensor, Tensor> decode_backward_on_gpu(const char* op, const DeviceCall& of,
                                                          const Tensor& dout, const Tensor& q,
                                                          const Tensor& k_cache, const Tensor& v_cache,
                                                          int64_t output_mask) {
  const int64_t G = of.plan.G, D = of.plan.D, page = k_cache.size(1);
  const std::vector<int64_t> q_shape{q.size(0), q.size(1), of.plan.H, D};
  const std::vector<int64_t> cache_shape{k_cache.size(0), page, G, D};
  check_like(op, "dout", dout, {q.size(0), q.size(1), of.plan.H, D}, q.scalar_type(), q.device());
  check_range(op, "output_mask", output_mask, 0, 7);
  const Tensor dout_ = torch::stable::contiguous(dout), out = empty(q, q_shape);
  const std::vector<int64_t> row_shape{q.size(0), q.size(1), of.plan.H};
  const Tensor lse = empty(q, row_shape, wide_dtype(q)), delta = empty(q, row_shape, wide_dtype(q));
  const Tensor dq = wanted(q, output_mask, 0, q_shape), dk = wanted(k_cache, output_mask, 1, cache_shape),
               dv = wanted(v_cache, output_mask, 2, cache_shape);
  dispatch_dtype(HeadAttentionTypes{}, op, q.scalar_type(), [&]<class scalar_t>() {
    using acc_t = accumulate_t<scalar_t>;
    auto call = of.fill<HeadAttentionBackwardCall<scalar_t>, scalar_t>();
    call.out = mutable_data_of<scalar_t>(out);
    call.lse = mutable_data_of<acc_t>(lse);
    call.dout = data_of<scalar_t>(dout_);
    call.delta = mutable_data_of<acc_t>(delta);
    if (output_mask & 1) call.dq = mutable_data_of<scalar_t>(dq);
    if (output_mask & 2) call.dk = {mutable_data_of<scalar_t>(dk), page * G * D, G * D, D};
    if (output_mask & 4) call.dv = {mutable_data_of<scalar_t>(dv), page * G * D, G * D, D};
    Workspace workspace(q);
    on_gpu_of(op, q, [&](auto stream) {
      if (call.T > 0 && call.heads > 0)
        head_attention_cuda<scalar_t>(
            call, workspace.queries(call, call.T, head_attention_rows<scalar_t>(call), stream), stream);
      launch_head_attention_backward(call, workspace, stream);
    });
  });
  return {dq, dk, dv};
}

}  // namespace

Tensor head_attention_decode(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                             const Tensor& seqlens, int64_t heads, const Text& unit,
                             const OptionalTensor& extent, const OptionalTensor& block_table,
                             const OptionalTensor& k_start, std::optional<double> scale) {
  constexpr auto op = "head_attention_decode";
  const NoGrad no_grad;
  check_dim(op, "q", q, 4);
  if (runs_on_gpu(q))
    return decode_on_gpu(
        op, DeviceCall(op, q, k_cache, v_cache, seqlens, heads, unit, extent, block_table, k_start, scale),
        q);
  const AttentionPlan plan =
      make_plan(op, q, k_cache, v_cache, seqlens, heads, unit, extent, block_table, k_start, scale);
  const Tensor q_ = torch::stable::contiguous(q);
  const Tensor k_ = check_rows(op, "k_cache", k_cache, q), v_ = check_rows(op, "v_cache", v_cache, q);
  Tensor out = zeros(q, {q.size(0), q.size(1), plan.H, plan.D});
  dispatch_dtype(HeadAttentionTypes{}, op, q.scalar_type(), [&]<class scalar_t>() {
    auto p = fill_params<scalar_t>(plan, q_, k_, v_);
    p.out = mutable_data_of<scalar_t>(out);
    run_decode(plan, p, q);
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> head_attention_decode_backward(
    const Tensor& dout, const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const Tensor& seqlens,
    int64_t heads, const Text& unit, const OptionalTensor& extent, const OptionalTensor& block_table,
    const OptionalTensor& k_start, std::optional<double> scale, int64_t output_mask) {
  constexpr auto op = "head_attention_decode_backward";
  const NoGrad no_grad;
  check_dim(op, "q", q, 4);
  if (runs_on_gpu(q))
    return decode_backward_on_gpu(
        op, DeviceCall(op, q, k_cache, v_cache, seqlens, heads, unit, extent, block_table, k_start, scale),
        dout, q, k_cache, v_cache, output_mask);
  const AttentionPlan plan =
      make_plan(op, q, k_cache, v_cache, seqlens, heads, unit, extent, block_table, k_start, scale);
  const int64_t B = q.size(0), T = q.size(1), pages = k_cache.size(0), page = k_cache.size(1);
  check_like(op, "dout", dout, {B, T, plan.H, plan.D}, q.scalar_type(), q.device());
  const Tensor q_ = torch::stable::contiguous(q), dout_ = torch::stable::contiguous(dout);
  const Tensor k_ = check_rows(op, "k_cache", k_cache, q), v_ = check_rows(op, "v_cache", v_cache, q);
  const std::vector<int64_t> q_shape{B, T, plan.H, plan.D}, cache_shape{pages, page, plan.G, plan.D};
  Tensor out = zeros(q, q_shape), lse = empty(q, {B, T, plan.H}, wide_dtype(q));
  torch::stable::fill_(lse, -std::numeric_limits<double>::infinity());
  const Tensor delta = delta_for(q, plan);
  check_range(op, "output_mask", output_mask, 0, 7);
  Tensor dq = wanted(q, output_mask, 0, q_shape);
  // Summed in the wider type: several sequences may add to one page.
  Tensor dk = wanted(k_cache, output_mask, 1, cache_shape, wide_dtype(q)),
         dv = wanted(v_cache, output_mask, 2, cache_shape, wide_dtype(q));
  dispatch_dtype(HeadAttentionTypes{}, op, q.scalar_type(), [&]<class scalar_t>() {
    using acc_t = accumulate_t<scalar_t>;
    HeadAttentionBackwardParams<scalar_t, acc_t> p{};
    p.forward = fill_params<scalar_t>(plan, q_, k_, v_);
    p.forward.out = mutable_data_of<scalar_t>(out);
    p.forward.lse = mutable_data_of<acc_t>(lse);
    run_decode(plan, p.forward, q);
    p.dout = data_of<scalar_t>(dout_);
    if (delta.numel() > 0) p.delta = mutable_data_of<accumulate_t<scalar_t>>(delta);
    const int64_t key = plan.G * plan.D;
    if (output_mask & 1) p.dq = mutable_data_of<scalar_t>(dq);
    if (output_mask & 2) p.dk = {mutable_data_of<acc_t>(dk), page * key, key, plan.D};
    if (output_mask & 4) p.dv = {mutable_data_of<acc_t>(dv), page * key, key, plan.D};
    if (block_table && (p.dk.data || p.dv.data))
      run_paged_backward(plan, p);
    else
      run_backward(plan, p);
  });
  return {dq, torch::stable::to(dk, q.scalar_type()), torch::stable::to(dv, q.scalar_type())};
}

}  // namespace flextron
