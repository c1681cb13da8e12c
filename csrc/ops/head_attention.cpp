// head_attention: attention over a prefix or a list of heads, for one sequence or a ragged batch.
//
// Only active heads become work items, so the cost follows the extents and the keys of unused groups are
// never read. On a GPU the kernels read lengths and extents where they are.
#include "kernels/head_attention.h"

#include "ops/attention_gpu.h"
#include "ops/attention_plan.h"

namespace flextron {
namespace {

// Ends of the sequences: [0, total] without cu_seqlens.
std::vector<int64_t> read_ends(const char* op, const char* name, const OptionalTensor& cu_seqlens, int64_t B,
                               int64_t total, const Tensor& q) {
  if (!cu_seqlens) {
    if (B != 1) fail(op, ": ", name, " must have shape [", B + 1, "], got None");
    return {0, total};
  }
  const auto ends = check_list(op, name, *cu_seqlens, B + 1, total, q);
  if (ends[0] != 0) fail(op, ": ", name, " must start with 0, got ", ends[0]);
  for (int64_t b = 0; b < B; ++b)
    if (ends[b + 1] < ends[b])
      fail(op, ": ", name, " must not decrease, got ", ends[b + 1], " after ", ends[b]);
  return ends;
}

int64_t count_sequences(const char* op, const OptionalTensor& cu_seqlens_q,
                        const OptionalTensor& cu_seqlens_k) {
  const OptionalTensor& given = cu_seqlens_q ? cu_seqlens_q : cu_seqlens_k;
  if (!given) return 1;
  const char* name = cu_seqlens_q ? "cu_seqlens_q" : "cu_seqlens_k";
  check_dim(op, name, *given, 1);
  if (given->size(0) < 1) fail(op, ": ", name, " must have at least 1 element, got 0");
  return given->size(0) - 1;
}

// How many extents there are, and which is that of row t of sequence b: b * stride_b + t * stride_t.
struct ExtentShape {
  int64_t count, stride_b, stride_t;
};

ExtentShape extent_shape(const char* op, const OptionalTensor& extent, const Text& extent_per,
                         const OptionalTensor& index, int64_t B, int64_t T) {
  const bool per_token = extent_per.value == "token";
  if (!per_token && extent_per.value != "sequence")
    fail(op, ": extent_per must be sequence or token, got ", extent_per.value);
  if (!extent) return {};
  if (index) fail(op, ": extent must be None when index is given, got both");
  if (per_token) return {T, 0, 1};
  const bool one = extent->dim() == 1 && extent->size(0) == 1;
  return {one ? 1 : B, one ? 0 : 1, 0};
}

// The arguments that both ops have, in the order of their schemas.
struct HeadAttention {
  const char* op;
  const Tensor &q, &k, &v;
  int64_t heads;
  const Text& unit;
  const OptionalTensor& extent;
  const Text& extent_per;
  const OptionalTensor &index, &cu_seqlens_q, &cu_seqlens_k, &k_start;
  bool causal;
  AttentionScores scores;
};

// What the forward made and the gradient of its output.
struct Results {
  const Tensor &dout, &out, &lse;
};

// q, k and v as the kernels take them: last dimensions that are adjacent.
struct Rows {
  const char* op;
  Tensor q, k, v;
};
Rows rows_of(const HeadAttention& a) {
  return {a.op, check_rows(a.op, "q", a.q, a.q), check_rows(a.op, "k", a.k, a.q),
          check_rows(a.op, "v", a.v, a.q)};
}

AttentionPlan make_plan(const HeadAttention& arguments) {
  const auto& [op, q, k, v, heads, unit, extent, extent_per, index, cu_seqlens_q, cu_seqlens_k, k_start,
               causal, scores] = arguments;
  check_dim(op, "k", k, 3);
  check_dim(op, "v", v, 3);
  AttentionPlan plan = start_plan(op, q, k, v, heads, unit.value, index, scores, causal);
  const int64_t T = q.size(0), S = k.size(0), B = count_sequences(op, cu_seqlens_q, cu_seqlens_k);
  const auto ends_q = read_ends(op, "cu_seqlens_q", cu_seqlens_q, B, T, q);
  const auto ends_k = read_ends(op, "cu_seqlens_k", cu_seqlens_k, B, S, q);
  const auto starts = k_start ? check_list(op, "k_start", *k_start, B, S, q) : std::vector<int64_t>(B, 0);

  const ExtentShape shape = extent_shape(op, extent, extent_per, index, B, T);
  if (extent) plan.extent = check_list(op, "extent", *extent, shape.count, heads, q);
  plan.extent_stride_b = shape.stride_b;
  plan.extent_stride_t = shape.stride_t;

  plan.pages = {0};
  for (int64_t b = 0; b < B; ++b) {
    const int64_t keys = ends_k[b + 1] - ends_k[b];
    plan.sequences.push_back({.query = ends_q[b],
                              .T = ends_q[b + 1] - ends_q[b],
                              .S = keys,
                              .k_start = std::min(starts[b], keys),
                              .position = ends_k[b],
                              .pages = plan.pages.data()});
  }
  plan.measure();
  return plan;
}

template <class scalar_t>
HeadAttentionParams<scalar_t> fill_params(const AttentionPlan& plan, const Tensor& q, const Tensor& k,
                                          const Tensor& v) {
  auto p = attention_params<scalar_t>(plan);
  p.q = data_of<scalar_t>(q);
  p.q_stride_t = q.stride(0);
  p.q_stride_h = q.stride(1);
  p.k = {data_of<scalar_t>(k), 0, k.stride(0), k.stride(1)};
  p.v = {data_of<scalar_t>(v), 0, v.stride(0), v.stride(1)};
  return p;
}

void check_results(const HeadAttention& arguments, const AttentionPlan& plan, const Results& results) {
  const Tensor& q = arguments.q;
  const int64_t T = q.size(0);
  check_like(arguments.op, "dout", results.dout, {T, plan.H, plan.D}, q.scalar_type(), q.device());
  check_like(arguments.op, "out", results.out, {T, plan.H, plan.D}, q.scalar_type(), q.device());
  check_like(arguments.op, "lse", results.lse, {T, plan.H}, wide_dtype(q), q.device());
}

// ---- on a GPU ----

struct DeviceCall {
  AttentionPlan plan;  // what is known without a value of a tensor
  DeviceAttention device;
  bool whole;  // every head of every row is active: then all of the results is written
};

DeviceCall make_device_call(const HeadAttention& arguments) {
  const auto& [op, q, k, v, heads, unit, extent, extent_per, index, cu_seqlens_q, cu_seqlens_k, k_start,
               causal, scores] = arguments;
  check_dim(op, "k", k, 3);
  check_dim(op, "v", v, 3);
  AttentionPlan plan = describe_heads(op, q, k, v, heads, unit.value, index, scores, causal);
  const int64_t T = q.size(0), S = k.size(0), B = count_sequences(op, cu_seqlens_q, cu_seqlens_k);
  const ExtentShape shape = extent_shape(op, extent, extent_per, index, B, T);
  const bool all_heads = heads == (plan.by_group ? plan.G : plan.M);
  DeviceCall result{plan, DeviceAttention(plan), !extent && !index && !cu_seqlens_q && all_heads};
  DeviceAttention& device = result.device;
  AttentionCall& call = device.call;
  call.B = B;
  call.T = T;
  call.S = S;
  call.queries_each = T;
  if (S <= call.window) call.window = kAllKeys;  // Hopper's kernels have none
  const auto add_ends = [&](const char* name, const OptionalTensor& ends) -> const int64_t* {
    if (ends) return device.add(op, name, *ends, {B + 1}, q);
    if (B != 1) fail(op, ": ", name, " must have shape [", B + 1, "], got None");
    return nullptr;
  };
  call.cu_seqlens_q = add_ends("cu_seqlens_q", cu_seqlens_q);
  call.cu_seqlens_k = add_ends("cu_seqlens_k", cu_seqlens_k);
  if (k_start) call.k_start = device.add(op, "k_start", *k_start, {B}, q);
  if (extent) call.extent = device.add(op, "extent", *extent, {shape.count}, q);
  call.extent_stride_b = shape.stride_b;
  call.extent_stride_t = shape.stride_t;
  if (index) {
    check_integers(op, "index", *index);
    call.index = device.keep(sort_ascending(torch::stable::to(*index, ScalarType::Long)).first);
  }
  if (call.per_token() && T > 0) {
    const Tensor keys = empty(q, {T}, ScalarType::Long);
    on_gpu_of(op, q, [&](auto stream) {
      head_attention_order_keys_cuda(call, mutable_data_of<int64_t>(keys), stream);
    });
    call.order = device.keep(sort_descending(keys).second);
  }
  return result;
}

template <class Call, class scalar_t>
Call fill_call(const DeviceCall& device_call, const Tensor& q, const Tensor& k, const Tensor& v,
               const scalar_t* out, const accumulate_t<scalar_t>* lse) {
  auto call = attention_call<Call>(device_call.plan, device_call.device.call);
  call.q = data_of<scalar_t>(q);
  call.q_stride_t = q.stride(0);
  call.q_stride_h = q.stride(1);
  call.k = {data_of<scalar_t>(k), 0, k.stride(0), k.stride(1)};
  call.v = {data_of<scalar_t>(v), 0, v.stride(0), v.stride(1)};
  call.out = const_cast<scalar_t*>(out);  // the backward pass reads them only
  call.lse = const_cast<accumulate_t<scalar_t>*>(lse);
  return call;
}

std::tuple<Tensor, Tensor> forward_on_gpu(const HeadAttention& arguments) {
  const DeviceCall device_call = make_device_call(arguments);
  const auto& [op, q, k, v] = rows_of(arguments);
  const std::vector<int64_t> shape{q.size(0), device_call.plan.H, device_call.plan.D};
  const Tensor out = device_call.whole ? empty(q, shape) : zeros(q, shape);
  Tensor lse = empty(q, {q.size(0), device_call.plan.H}, wide_dtype(q));
  if (!device_call.whole) torch::stable::fill_(lse, -std::numeric_limits<double>::infinity());
  dispatch_dtype(HeadAttentionTypes{}, op, q.scalar_type(), [&]<class scalar_t>() {
    const auto call = fill_call<HeadAttentionCall<scalar_t>>(device_call, q, k, v, data_of<scalar_t>(out),
                                                             data_of<accumulate_t<scalar_t>>(lse));
    Workspace workspace(q);
    on_gpu_of(op, q, [&](auto stream) { launch_head_attention(call, workspace, stream); });
  });
  return {out, lse};
}

AttentionGradients backward_on_gpu(const HeadAttention& arguments, const Results& results,
                                   const AttentionWanted& wanted) {
  const DeviceCall device_call = make_device_call(arguments);
  const AttentionPlan& plan = device_call.plan;
  check_results(arguments, plan, results);
  const auto& [op, q, k, v] = rows_of(arguments);
  const Tensor dout = torch::stable::contiguous(results.dout), lse = torch::stable::contiguous(results.lse);
  const Tensor delta = empty(q, {q.size(0), plan.H}, wide_dtype(q));
  AttentionGradients d = room_for(wanted, q, k, k.scalar_type(), arguments.scores.sinks);
  dispatch_dtype(HeadAttentionTypes{}, op, q.scalar_type(), [&]<class scalar_t>() {
    using acc_t = accumulate_t<scalar_t>;
    auto call = fill_call<HeadAttentionBackwardCall<scalar_t>>(
        device_call, q, k, v, data_of<scalar_t>(results.out), data_of<acc_t>(lse));
    call.dout = data_of<scalar_t>(dout);
    call.delta = mutable_data_of<acc_t>(delta);
    if (wanted.q) call.dq = mutable_data_of<scalar_t>(d.q);
    if (wanted.k) call.dk = {mutable_data_of<scalar_t>(d.k), 0, plan.G * plan.D, plan.D};
    if (wanted.v) call.dv = {mutable_data_of<scalar_t>(d.v), 0, plan.G * plan.D, plan.D};
    if (wanted.sinks) call.dsinks = mutable_data_of<acc_t>(d.sinks);
    Workspace workspace(q);
    on_gpu_of(op, q, [&](auto stream) { launch_head_attention_backward(call, workspace, stream); });
  });
  return d;
}

// ---- on a CPU ----

std::tuple<Tensor, Tensor> forward_on_cpu(const HeadAttention& arguments) {
  const AttentionPlan plan = make_plan(arguments);
  const auto& [op, q, k, v] = rows_of(arguments);
  const int64_t T = q.size(0);
  const Tensor out = zeros(q, {T, plan.H, plan.D});
  Tensor lse = empty(q, {T, plan.H}, wide_dtype(q));
  torch::stable::fill_(lse, -std::numeric_limits<double>::infinity());
  dispatch_dtype(HeadAttentionTypes{}, op, q.scalar_type(), [&]<class scalar_t>() {
    auto p = fill_params<scalar_t>(plan, q, k, v);
    p.out = mutable_data_of<scalar_t>(out);
    p.lse = mutable_data_of<accumulate_t<scalar_t>>(lse);
    run_forward(plan, p);
  });
  return {out, lse};
}

AttentionGradients backward_on_cpu(const HeadAttention& arguments, const Results& results,
                                   const AttentionWanted& wanted) {
  const AttentionPlan plan = make_plan(arguments);
  check_results(arguments, plan, results);
  const auto& [op, q, k, v] = rows_of(arguments);
  const Tensor dout = torch::stable::contiguous(results.dout), out = torch::stable::contiguous(results.out);
  const Tensor lse = torch::stable::contiguous(results.lse), delta = delta_for(q, plan);
  AttentionGradients d = room_for(wanted, q, k, k.scalar_type(), arguments.scores.sinks);
  dispatch_dtype(HeadAttentionTypes{}, op, q.scalar_type(), [&]<class scalar_t>() {
    HeadAttentionBackwardParams<scalar_t, scalar_t> p{};
    p.forward = fill_params<scalar_t>(plan, q, k, v);
    p.forward.out = const_cast<scalar_t*>(data_of<scalar_t>(out));  // read only in the backward pass
    p.forward.lse = const_cast<accumulate_t<scalar_t>*>(data_of<accumulate_t<scalar_t>>(lse));
    p.dout = data_of<scalar_t>(dout);
    if (delta.numel() > 0) p.delta = mutable_data_of<accumulate_t<scalar_t>>(delta);
    if (wanted.q) p.dq = mutable_data_of<scalar_t>(d.q);
    if (wanted.k) p.dk = {mutable_data_of<scalar_t>(d.k), 0, plan.G * plan.D, plan.D};
    if (wanted.v) p.dv = {mutable_data_of<scalar_t>(d.v), 0, plan.G * plan.D, plan.D};
    run_first_parts(plan, p, q.size(0),
                    wanted.sinks ? mutable_data_of<accumulate_t<scalar_t>>(d.sinks) : nullptr);
    run_backward(plan, p);
  });
  return d;
}

}  // namespace

std::tuple<Tensor, Tensor> head_attention(const Tensor& q, const Tensor& k, const Tensor& v, int64_t heads,
                                          const Text& unit, const OptionalTensor& extent,
                                          const Text& extent_per, const OptionalTensor& index,
                                          const OptionalTensor& cu_seqlens_q,
                                          const OptionalTensor& cu_seqlens_k, const OptionalTensor& k_start,
                                          bool causal, std::optional<double> scale,
                                          std::optional<int64_t> window, std::optional<double> softcap,
                                          const OptionalTensor& sinks) {
  constexpr auto op = "head_attention";
  const NoGrad no_grad;
  check_dim(op, "q", q, 3);
  const AttentionScores scores{scale, window, softcap, sinks};
  const HeadAttention arguments{op,           q,       k,          v,     heads,
                                unit,         extent,  extent_per, index, cu_seqlens_q,
                                cu_seqlens_k, k_start, causal,     scores};
  return runs_on_gpu(q) ? forward_on_gpu(arguments) : forward_on_cpu(arguments);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> head_attention_backward(
    const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
    const Tensor& lse, int64_t heads, const Text& unit, const OptionalTensor& extent, const Text& extent_per,
    const OptionalTensor& index, const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
    const OptionalTensor& k_start, bool causal, std::optional<double> scale, std::optional<int64_t> window,
    std::optional<double> softcap, const OptionalTensor& sinks, int64_t output_mask) {
  constexpr auto op = "head_attention_backward";
  const NoGrad no_grad;
  check_dim(op, "q", q, 3);
  const AttentionScores scores{scale, window, softcap, sinks};
  const HeadAttention arguments{op,           q,       k,          v,     heads,
                                unit,         extent,  extent_per, index, cu_seqlens_q,
                                cu_seqlens_k, k_start, causal,     scores};
  const Results results{dout, out, lse};
  const AttentionWanted wanted = attention_wanted(op, output_mask, sinks);
  const AttentionGradients d = runs_on_gpu(q) ? backward_on_gpu(arguments, results, wanted)
                                              : backward_on_cpu(arguments, results, wanted);
  return in_dtypes(d, q, sinks);
}

}  // namespace flextron
