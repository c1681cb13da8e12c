// Which GEMM FLEXTRON_KERNEL asks for.
#pragma once

#include <cstdlib>
#include <string>

#include "ops/checks.h"

namespace flextron {

// decode, tile, vendor, or nothing.
inline std::string asked_kernel() {
  const char* const variable = std::getenv("FLEXTRON_KERNEL");
  const std::string asked = variable == nullptr ? "" : variable;
  if (asked != "" && asked != "decode" && asked != "tile" && asked != "vendor")
    fail("FLEXTRON_KERNEL must be decode, tile or vendor, got ", asked);
  return asked;
}

}  // namespace flextron
