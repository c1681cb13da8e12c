// What computes an op's GEMMs, and the one function that chooses it.
#pragma once

#include <cstdint>
#include <string>

#include "core/macros.h"

namespace flextron {

enum class Executor {
  kViews,   // the vendor's GEMM (MKL, cuBLAS) on views of the weights: a CPU or a GPU
  kPanels,  // our own GEMM on a CPU, panel by panel: csrc/kernels/elastic_gemm.h
  kTile,    // our own kernels on a GPU, tile by tile of the result
  kStream,  // our own kernels on a GPU that stream the weights past a few tokens
};

// What the choice depends on.
struct GemmCall {
  bool on_gpu;
  bool extents_on_device;  // there is an extent that the host does not know
  bool fits_panels;        // the CPU's own GEMM reads these weights as they lie, and takes their dtype
  bool own_preferred;      // on a CPU: ours is chosen where nothing is asked for (ops/machine.h)
  int64_t tokens, element_size;
  std::string asked;  // FLEXTRON_KERNEL: decode, tile, vendor, or nothing
};

// csrc/kernels/tuning.h's choice, or FLEXTRON_KERNEL's wherever that executor can do it.
FLEXTRON_API Executor executor_of(const GemmCall& call);

// The same for the gradients of weights, in a backward on a CPU that is kPanels: kPanels or kViews.
FLEXTRON_API Executor executor_of_weight_gradient(const GemmCall& call);

}  // namespace flextron
