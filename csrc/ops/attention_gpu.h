// What head_attention and head_attention_decode share on a GPU: arguments that stay on the device, and which
// kernels run. The host never waits: whatever the values are, the same operations are queued.
#pragma once

#include <vector>

#include "kernels/arch.h"
#include "kernels/head_attention_cuda.h"
#include "ops/attention_plan.h"

namespace flextron {

// A call and the tensors that its pointers need.
class DeviceAttention {
 public:
  explicit DeviceAttention(const AttentionPlan& plan) {
    call.H = plan.H;
    call.G = plan.G;
    call.M = plan.M;
    call.D = plan.D;
    call.heads = plan.heads;
    call.by_group = plan.by_group;
    call.causal = plan.causal;
    call.window = static_cast<int>(std::min<int64_t>(plan.window, kAllKeys));
  }

  AttentionCall call{};

  const int64_t* keep(const Tensor& integers) {
    kept_.push_back(integers);
    return data_of<int64_t>(integers);
  }

  // Integers of this shape on q's device, in int64.
  const int64_t* add(const char* op, const char* name, const Tensor& t, std::initializer_list<int64_t> shape,
                     const Tensor& q) {
    check_shape(op, name, t, shape);
    check_device(op, name, t, q.device());
    check_integers(op, name, t);
    return keep(torch::stable::contiguous(torch::stable::to(t, ScalarType::Long)));
  }

 private:
  std::vector<Tensor> kept_;
};

// What both ops give their kernels; q's strides are those of [T, H, D], k's and v's of [.., S, G, D].
template <class Call>
Call attention_call(const AttentionPlan& plan, const AttentionCall& lengths) {
  Call call{};
  static_cast<AttentionCall&>(call) = lengths;
  using acc_t = typename Call::acc_t;
  call.scale = static_cast<acc_t>(plan.scale);
  call.softcap = static_cast<acc_t>(plan.softcap);
  if (plan.softcap != 0) call.cap_scale = static_cast<acc_t>(plan.scale / plan.softcap);
  if (plan.sinks) call.sinks = data_of<acc_t>(*plan.sinks);
  return call;
}

// Memory that kernels need while they run: emulated ones do when on_gpu_of returns, so it is kept outside.
class Workspace {
 public:
  explicit Workspace(const Tensor& like) : like_(like) {}

  int64_t* integers(int64_t count) {
    kept_.push_back(empty(like_, {count}, ScalarType::Long));
    return mutable_data_of<int64_t>(kept_.back());
  }

  float* floats(int64_t count) {
    kept_.push_back(empty(like_, {count}, ScalarType::Float));
    return mutable_data_of<float>(kept_.back());
  }

  // Schedules of blocks of `rows` over `total` rows of all sequences.
  AttentionSchedule queries(const AttentionCall& call, int64_t total, int64_t rows, CUstream_st* stream) {
    const int64_t blocks = most_blocks(call.B, total, rows);
    return head_attention_query_schedule_cuda(call, rows, blocks, schedule(blocks), stream);
  }
  AttentionSchedule keys(const AttentionCall& call, int64_t total, int64_t rows, CUstream_st* stream) {
    const int64_t blocks = most_blocks(call.B, total, rows);
    return head_attention_key_schedule_cuda(call, rows, blocks, schedule(blocks), stream);
  }

 private:
  int64_t* schedule(int64_t blocks) { return integers(head_attention_schedule_size(blocks)); }

  Tensor like_;
  std::vector<Tensor> kept_;
};

template <class scalar_t>
void launch_head_attention(const HeadAttentionCall<scalar_t>& call, Workspace& workspace,
                           CUstream_st* stream) {
  if (call.T == 0 || call.heads == 0) return;
#ifdef FLEXTRON_WITH_SM90
  if constexpr (sizeof(scalar_t) == 2) {
    if (cuda_arch() >= 90 && call.plain_scores() && head_attention_fits_sm90(call)) {
      const AttentionSchedule queries = workspace.queries(call, call.T, kAttentionRowsSm90, stream);
      return head_attention_sm90(call, queries, stream);
    }
  }
#endif
  const int64_t rows = head_attention_rows(call);
  head_attention_cuda(call, workspace.queries(call, call.T, rows, stream), stream);
}

// Keys of all sequences at most.
inline int64_t most_keys(const AttentionCall& call) { return call.seqlens ? call.B * call.S : call.S; }

// The gradients that the call has room for. Pages may be several sequences': their keys have no schedule.
template <class scalar_t>
void launch_head_attention_backward(const HeadAttentionBackwardCall<scalar_t>& call, Workspace& workspace,
                                    CUstream_st* stream) {
  if (call.T == 0 || call.heads == 0) return;
  const auto schedules = [&](int64_t query_rows, int64_t key_rows, const auto& then) {
    const auto queries = workspace.queries(call, call.T, query_rows, stream);
    AttentionSchedule keys{};
    if (!call.block_table && (call.dk.data || call.dv.data))
      keys = workspace.keys(call, most_keys(call), key_rows, stream);
    then(call, queries, keys, stream);
  };
#ifdef FLEXTRON_WITH_SM90
  if constexpr (sizeof(scalar_t) == 2) {
    if (cuda_arch() >= 90 && call.plain_scores() && head_attention_backward_fits_sm90(call)) {
      float* const partial = workspace.floats(head_attention_backward_partial_sm90(call));
      return schedules(kAttentionRowsSm90, kAttentionRowsSm90,
                       [&](const auto&, const auto& queries, const auto& keys, CUstream_st*) {
                         head_attention_backward_sm90(call, queries, keys, partial, stream);
                       });
    }
  }
#endif
  schedules(head_attention_backward_rows(call), head_attention_backward_keys(call),
            head_attention_backward_cuda<scalar_t>);
}

}  // namespace flextron
