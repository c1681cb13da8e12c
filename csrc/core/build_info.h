// What this build of the op library contains; defined in library.cpp, shown to Python by bindings.cpp.
#pragma once

#include <string>
#include <vector>

#include "core/macros.h"

namespace flextron {

struct BuildInfo {
  std::string version, compiler;
  std::vector<std::string> isas;        // CPU instruction sets with code of their own
  std::vector<std::string> cuda_archs;  // empty: built without CUDA
};

FLEXTRON_API BuildInfo build_info();

// The op table's schemas, without the namespace.
FLEXTRON_API std::vector<std::string> op_schemas();

}  // namespace flextron
