// Reads and checks what decoder_step is given.
#include "ops/decoder/call.h"

#include <limits>

#include "ops/gemm.h"

namespace flextron::decoder {
namespace {

constexpr int64_t kMost = std::numeric_limits<int64_t>::max();

// Whether elements of a tensor of four dimensions may share memory, as an expanded one's do.
template <class Integers>
bool overlaps(const Integers& all_sizes, const Integers& all_strides) {
  struct Dimension {
    int64_t stride, size;
  };
  Dimension dims[4];  // those of more than one entry, by ascending strides
  int64_t count = 0;
  for (int64_t d = 0; d < 4; ++d) {
    if (all_sizes[d] <= 1) continue;
    int64_t at = count++;
    for (; at > 0 && dims[at - 1].stride > all_strides[d]; --at) dims[at] = dims[at - 1];
    dims[at] = {all_strides[d], all_sizes[d]};
  }
  int64_t reach = 1;
  for (int64_t i = 0; i < count; ++i) {
    if (dims[i].stride < reach) return true;
    reach += (dims[i].size - 1) * dims[i].stride;
  }
  return false;
}

// One layer's keys or values.
void check_layer_cache(const char* name, const Tensor& t, const Model& model, const Call& call,
                       int64_t stored) {
  check_dim(kStep, name, t, 4);
  check_dtype(kStep, name, t, model.embedding->scalar_type());
  check_device(kStep, name, t, model.embedding->device());
  const int64_t B = call.tokens.B, end = call.cache.cached + call.tokens.T, D = model.shape.D;
  const auto sizes = t.sizes(), strides = t.strides();
  if (sizes[0] != B || sizes[1] < end || sizes[2] < stored || sizes[3] != D)
    fail(kStep, ": ", name, " must have shape [", B, ", at least ", end, ", at least ", stored, ", ", D,
         "], got ", shape_text(sizes));
  if (D > 1 && strides[3] != 1)
    fail(kStep, ": ", name, " must have a contiguous last dimension, got strides");
  if (overlaps(sizes, strides))
    fail(kStep, ": ", name, " must have memory of its own for every element, got strides");
}

}  // namespace

Tokens::Tokens(const Model& model, const Tensor& token_ids, int64_t kept) : keep(kept) {
  check_dim(kStep, "ids", token_ids, 2);
  check_dtype(kStep, "ids", token_ids, ScalarType::Long);
  check_device(kStep, "ids", token_ids, model.embedding->device());
  ids = torch::stable::contiguous(token_ids);
  B = ids.size(0);
  T = ids.size(1);
  check_range(kStep, "keep", keep, 0, T);
}

Rotary::Rotary(const Model& model, const Tokens& tokens, const Tensor& cosines, const Tensor& sines) {
  check_dim(kStep, "cos", cosines, 3);
  const int64_t tables = cosines.size(0) == 1 ? 1 : tokens.B, turned = cosines.size(2), D = model.shape.D;
  const int64_t beside = model.shape.table_count();
  if (turned > beside * D || turned % (2 * beside) != 0)
    fail(kStep, ": cos.size(2) must be even and at most ", D, beside > 1 ? " in each of two tables" : "",
         ", got ", turned);
  const ScalarType dtype = model.embedding->scalar_type();
  const Device device = model.embedding->device();
  check_like(kStep, "cos", cosines, {tables, tokens.T, turned}, dtype, device);
  check_like(kStep, "sin", sines, {tables, tokens.T, turned}, dtype, device);
  cos = torch::stable::contiguous(cosines);
  sin = torch::stable::contiguous(sines);
}

std::optional<Router> read_router(const Model& model, const Tokens& tokens,
                                  const std::optional<std::vector<Tensor>>& tensors,
                                  const Integers& neuron_menu, const Integers& head_menu) {
  const auto check_menu = [&](const char* name, const Integers& menu, int64_t most) {
    if (menu.has_value() != tensors.has_value())
      fail(kStep, ": ", name, " must be given with a router and with none else, got ",
           tensors ? "a router alone" : "no router");
    if (!menu) return;
    if (menu->empty()) fail(kStep, ": ", name, " must have an entry, got none");
    for (const int64_t choice : *menu) check_range(kStep, name, choice, 0, most);
  };
  const Shape& s = model.shape;
  check_menu("mlp_choices", neuron_menu, s.F);
  check_menu("head_choices", head_menu, s.most_heads());
  if (!tensors) return {};
  if (tensors->size() != 4) fail(kStep, ": router must have 4 tensors, got ", tensors->size());
  const Tensor &w1 = (*tensors)[0], &w2 = (*tensors)[1], &state = (*tensors)[2], &base = (*tensors)[3];
  check_dim(kStep, "router[0]", w1, 3);
  check_dim(kStep, "router[3]", base, 3);
  const auto choices = static_cast<int64_t>(neuron_menu->size() + head_menu->size());
  const int64_t hidden = w1.size(1), requests = base.size(1);
  check_positive(kStep, "router[0].size(1)", hidden);
  if (requests < 1 || tokens.B % requests != 0)
    fail(kStep, ": ids.size(0) must be a multiple of the ", requests, " requests of the router, got ",
         tokens.B);
  const Device device = model.embedding->device();
  check_like(kStep, "router[0]", w1, {s.layers, hidden, s.K}, ScalarType::Float, device);
  check_like(kStep, "router[1]", w2, {s.layers, choices, hidden}, ScalarType::Float, device);
  check_like(kStep, "router[2]", state, {s.layers, requests, hidden}, ScalarType::Float, device);
  check_like(kStep, "router[3]", base, {s.layers, requests, choices}, ScalarType::Float, device);
  return Router{.w1 = torch::stable::contiguous(w1),
                .w2 = torch::stable::contiguous(w2),
                .state = torch::stable::contiguous(state),
                .base = torch::stable::contiguous(base),
                .neuron_menu = *neuron_menu,
                .head_menu = *head_menu,
                .hidden = hidden,
                .rows_each = tokens.B / requests * tokens.T};
}

LayerExtents read_layer_extents(const char* name, const std::vector<int64_t>& values, const Model& model,
                                const Tokens& tokens, int64_t most, bool has_router) {
  const int64_t layers = model.shape.layers, size = static_cast<int64_t>(values.size());
  const int64_t each = layers == 0 ? 0 : size / layers;
  if (has_router && size > 0) fail(kStep, ": ", name, " must have no entries with a router, got ", size);
  if (!has_router && size != layers * (each == tokens.B ? tokens.B : 1))
    fail(kStep, ": ", name, " must have ", layers, " entries",
         tokens.B > 1 ? ", or as many for each sequence" : "", ", got ", size);
  for (const int64_t extent : values) check_range(kStep, name, extent, 0, most);
  return {values, each};
}

void check_cache(const Model& model, const Call& call) {
  const auto& [keys, values, cached, stored, k_start] = call.cache;
  const Shape& s = model.shape;
  const std::pair<const char*, size_t> lists[] = {
      {"keys", keys.size()}, {"values", values.size()}, {"kv_heads", stored.size()}};
  for (const auto& [name, size] : lists)
    if (static_cast<int64_t>(size) != s.layers)
      fail(kStep, ": ", name, " must have ", s.layers, " entries, got ", size);
  check_range(kStep, "cached", cached, 0, kMost - call.tokens.T);
  if (k_start) {
    check_shape(kStep, "k_start", *k_start, {call.tokens.B});
    check_integers(kStep, "k_start", *k_start);
    check_device(kStep, "k_start", *k_start, model.embedding->device());
  }
  for (int64_t l = 0; l < s.layers; ++l) {
    int64_t most = 0;  // heads that any row may use
    if (call.router)
      most = *std::max_element(call.router->head_menu.begin(), call.router->head_menu.end());
    else if (call.tokens.rows() > 0)
      most = call.heads.most(l);
    check_range(kStep, "kv_heads", stored[l], s.by_group || most == 0 ? most : s.G, s.G);
    check_layer_cache("keys", keys[l], model, call, stored[l]);
    check_layer_cache("values", values[l], model, call, stored[l]);
    if (keys[l].numel() > 0 && keys[l].const_data_ptr() == values[l].const_data_ptr())
      fail(kStep, ": values must have other memory than keys, got the same in layer ", l);
  }
}

Answer::Answer(const Model& model, const Tokens& tokens)
    : logits(empty(*model.embedding, {tokens.B, tokens.keep, model.shape.vocabulary})),
      best(empty(*model.embedding, {logits.size(1) * logits.size(2) > 0 ? tokens.B : 0}, ScalarType::Long)) {}

}  // namespace flextron::decoder
