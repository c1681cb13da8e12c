// decoder_hold, decoder_step, decoder_drop: tokens through every layer of a model in one call.
//
// Formula in csrc/kernels/decoder.h. decoder_hold checks the weights once, since to unpack and check those of
// 30 layers anew takes a tenth of a small model's step. decoder_step reads its call and hands it to the pass
// of the model's device; it writes new keys and values into the caches and changes nothing else.
#include "ops/decoder/call.h"
#include "ops/decoder/held.h"
#include "ops/gemm.h"
#include "ops/ops.h"

namespace flextron {
namespace {

// The one place that knows which devices there is a pass for.
std::unique_ptr<const decoder::Pass> make_pass(const decoder::Model& model) {
  const Device device = model.embedding->device();
  if (device.is_cpu()) return decoder::pass_on_cpu(model);
  fail(decoder::kHold, ": embedding must be on cpu, got ", device_text(device));
}

}  // namespace

int64_t decoder_hold(const std::vector<Tensor>& weights, const Text& names, const std::vector<int64_t>& shape,
                     const std::vector<double>& numbers, const Text& unit, const Text& activation,
                     const Text& format, const Text& norms, bool gated, bool parallel,
                     const std::vector<double>& scales, std::optional<double> logit_cap,
                     std::optional<double> softcap, const std::optional<std::vector<int64_t>>& tables,
                     const std::optional<std::vector<int64_t>>& windows, const Text& rotation,
                     const Text& norm_over, bool norm_last, std::optional<double> clip) {
  const decoder::Settings settings{.shape = shape,
                                   .numbers = numbers,
                                   .unit = unit.value,
                                   .activation = activation.value,
                                   .format = format.value,
                                   .norms = norms.value,
                                   .rotation = rotation.value,
                                   .norm_over = norm_over.value,
                                   .gated = gated,
                                   .parallel = parallel,
                                   .norm_last = norm_last,
                                   .scales = scales,
                                   .logit_cap = logit_cap,
                                   .softcap = softcap,
                                   .clip = clip,
                                   .tables = tables,
                                   .windows = windows};
  return decoder::keep(std::make_shared<const decoder::Held>(make_pass, weights, names.value, settings));
}

std::tuple<Tensor, Tensor> decoder_step(const Tensor& ids, const Tensor& cos, const Tensor& sin, int64_t held,
                                        const std::vector<Tensor>& keys, const std::vector<Tensor>& values,
                                        int64_t cached, const std::vector<int64_t>& widths,
                                        const std::vector<int64_t>& heads,
                                        const std::vector<int64_t>& kv_heads, int64_t keep,
                                        const OptionalTensor& k_start,
                                        const std::optional<std::vector<Tensor>>& router,
                                        const std::optional<std::vector<int64_t>>& mlp_choices,
                                        const std::optional<std::vector<int64_t>>& head_choices) {
  using namespace decoder;
  const NoGrad no_grad;
  const std::shared_ptr<const Held> mine = find(kStep, held);
  mine->check_places(kStep);
  const Model& model = mine->model;
  const Tokens tokens(model, ids, keep);
  const bool has_router = router.has_value();
  const Call call{
      .tokens = tokens,
      .rotary = Rotary(model, tokens, cos, sin),
      .router = read_router(model, tokens, router, mlp_choices, head_choices),
      .neurons = read_layer_extents("widths", widths, model, tokens, model.shape.F, has_router),
      .heads = read_layer_extents("heads", heads, model, tokens, model.shape.most_heads(), has_router),
      .cache = {keys, values, cached, kv_heads, k_start}};
  check_cache(model, call);
  Answer answer(model, tokens);
  if (tokens.rows() > 0) mine->pass->run(call, answer);
  return {std::move(answer.logits), std::move(answer.best)};
}

void decoder_drop(int64_t held) { decoder::take("decoder_drop", held); }

}  // namespace flextron
