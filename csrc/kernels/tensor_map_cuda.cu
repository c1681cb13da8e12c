// make_tensor_map, compiled once for every kernel file that calls it.
#include "kernels/device/tensor_map.cuh"

namespace flextron {

template TensorMap make_tensor_map(const TensorShape<2>&, bool);
template TensorMap make_tensor_map(const TensorShape<3>&, bool);

}  // namespace flextron
