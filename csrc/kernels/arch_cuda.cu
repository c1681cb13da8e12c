// The current device's architecture, and the environment variable that lowers it.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels/arch.h"
#include "kernels/device/launch.cuh"

namespace flextron {

int cuda_arch() {
  const int arch = compute_capability() == 90 ? 90 : 80;
  const char* const variable = std::getenv("FLEXTRON_ARCH");
  if (variable == nullptr) return arch;
  const std::string asked = variable;
  if (asked != "80" && asked != "90")
    throw std::runtime_error("FLEXTRON_ARCH must be 80 or 90, got " + asked);
  return asked == "80" ? 80 : arch;
}

}  // namespace flextron
