// The checks of elastic_mlp's arguments; packed_mlp has those of its panels in their place.
#include "ops/mlp/arguments.h"

#include "ops/device.h"

namespace flextron::mlp {
namespace {

void check_choices(const char* op, const std::vector<int64_t>& choices, int64_t width) {
  if (choices.empty()) fail(op, ": choices must have at least 1 entry, got 0");
  for (size_t c = 0; c < choices.size(); ++c) {
    check_range(op, "choices", choices[c], 0, width);
    if (c > 0 && choices[c] <= choices[c - 1])
      fail(op, ": choices must be ascending, got ", choices[c], " after ", choices[c - 1]);
  }
}

void check_weights(const Mlp& m) {
  check_dim(m.op, "x", m.x, 2);
  check_floating(m.op, "x", m.x);
  check_dim(m.op, "w_up", m.w_up, 2);
  check_dim(m.op, "w_down", m.w_down, 2);
  const auto dtype = m.x.scalar_type();
  const auto device = m.x.device();
  const int64_t F = m.w_up.size(0), K = m.x.size(1), N = m.w_down.size(0);
  check_like(m.op, "w_up", m.w_up, {F, K}, dtype, device);
  check_like(m.op, "w_down", m.w_down, {N, F}, dtype, device);
  if (m.w_gate) check_like(m.op, "w_gate", *m.w_gate, {F, K}, dtype, device);
  if (m.b_gate) check_like(m.op, "b_gate", *m.b_gate, {F}, dtype, device);
  if (m.b_up) check_like(m.op, "b_up", *m.b_up, {F}, dtype, device);
  if (m.b_down) check_like(m.op, "b_down", *m.b_down, {N}, dtype, device);
  if (m.b_gate && !m.w_gate) fail(m.op, ": b_gate must be None without w_gate, got a tensor");
  check_range(m.op, "width", m.width, 0, F);
}

void read_mixture(Mlp& m) {
  if (!m.choices) fail(m.op, ": choices must be given with gate, got None");
  check_choices(m.op, *m.choices, m.width);
  check_floating(m.op, "gate", *m.mixture);
  check_device(m.op, "gate", *m.mixture, m.x.device());
  const int64_t T = m.x.size(0), C = static_cast<int64_t>(m.choices->size());
  if (m.mixture->dim() != 2 || m.mixture->size(1) != C ||
      (m.mixture->size(0) != 1 && m.mixture->size(0) != T))
    fail(m.op, ": gate must have shape [1, ", C, "] or [", T, ", ", C, "], got ",
         shape_text(m.mixture->sizes()));
  if (runs_on_gpu(m.x) && C > kMaxChoices)
    fail(m.op, ": choices must have at most ", kMaxChoices, " entries on a GPU, got ", C);
  const bool wide = m.x.scalar_type() == ScalarType::Double;
  m.mixture =
      torch::stable::contiguous(torch::stable::to(*m.mixture, wide ? ScalarType::Double : ScalarType::Float));
  m.width = m.choices->back();
}

}  // namespace

Mlp read(Mlp m) {
  check_weights(m);
  if (m.extent && m.mixture) fail(m.op, ": extent must be None when gate is given, got both");
  if (m.choices && !m.mixture) fail(m.op, ": choices must be None without gate, got a list");
  if (m.mixture) read_mixture(m);
  if (!m.extent || !runs_on_gpu(m.x)) m.extents = read_extents(m.op, "extent", m.extent, m.x, m.width);
  return m;
}

Wanted read_output_mask(const Mlp& m, int64_t output_mask) {
  check_range(m.op, "output_mask", output_mask, 0, 255);
  const auto has = [&](int bit) { return (output_mask >> bit & 1) != 0; };
  return {.x = has(0),
          .w_gate = has(1) && m.w_gate,
          .w_up = has(2),
          .w_down = has(3),
          .b_gate = has(4) && m.b_gate,
          .b_up = has(5) && m.b_up,
          .b_down = has(6) && m.b_down,
          .mixture = has(7) && m.mixture};
}

}  // namespace flextron::mlp
