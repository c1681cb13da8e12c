// Which of an op's kernels the current device runs.
#pragma once

namespace flextron {

// 90 on sm_90, 80 on everything else: what is compiled for sm_90a runs on no other GPU, newer ones included.
// Lowered by FLEXTRON_ARCH=80.
int cuda_arch();

}  // namespace flextron
