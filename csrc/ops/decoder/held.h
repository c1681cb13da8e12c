// What decoder_hold keeps between calls of decoder_step, by number.
#pragma once

#include <memory>
#include <vector>

#include "ops/decoder/model.h"
#include "ops/decoder/pass.h"

namespace flextron::decoder {

// A model with the pass that computes it. Records each weight's address and size, so that a call can refuse
// weights that were given other memory since they were checked.
class Held {
 public:
  // make_pass(model) gives the pass.
  template <class MakePass, class... Arguments>
  explicit Held(const MakePass& make_pass, Arguments&&... arguments)
      : model(std::forward<Arguments>(arguments)...), pass(make_pass(model)) {
    for (const Tensor& t : model.weights.all()) places_.push_back({t.const_data_ptr(), t.numel()});
  }
  void check_places(const char* op) const;

  const Model model;
  const std::unique_ptr<const Pass> pass;

 private:
  struct Place {
    const void* data;
    int64_t count;
  };
  std::vector<Place> places_;
};

int64_t keep(std::shared_ptr<const Held> held);
std::shared_ptr<const Held> find(const char* op, int64_t number);
// As find; from then on the number is nobody's.
std::shared_ptr<const Held> take(const char* op, int64_t number);

}  // namespace flextron::decoder
