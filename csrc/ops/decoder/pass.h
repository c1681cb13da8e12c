// Who computes a decoder's steps: one pass for each kind of device, made once from a model that was checked.
#pragma once

#include <memory>

#include "ops/decoder/call.h"
#include "ops/decoder/model.h"

namespace flextron::decoder {

class Pass {
 public:
  virtual ~Pass() = default;
  // Writes the new keys and values into the call's caches, and the answer. It first checks what of the call
  // lies on the device, and writes nothing where that is wrong. There is at least one row.
  virtual void run(const Call& call, const Answer& answer) const = 0;
};

// The model must outlive the pass.
std::unique_ptr<const Pass> pass_on_cpu(const Model& model);

}  // namespace flextron::decoder
