// A tensor map, TMA's description of a tensor: made on the host, passed to a kernel by value.
#pragma once

#include <array>
#include <cstdint>
#include <type_traits>

#include "core/types.h"

namespace flextron {

// How a tile's 16-byte pieces are permuted in shared memory: the piece's number within 128 (64, 32) bytes is
// xored with bits 7 .. 9 (7 .. 8, 7) of its address. The values are those of wgmma's descriptors.
enum class Swizzle : uint32_t { kNone = 0, k128 = 1, k64 = 2, k32 = 3 };

constexpr uint32_t swizzle_mask(Swizzle swizzle) {
  return swizzle == Swizzle::k128  ? 0x70
         : swizzle == Swizzle::k64 ? 0x30
         : swizzle == Swizzle::k32 ? 0x10
                                   : 0;
}
// Where the byte at offset `address` of a tile lies; tiles start at a multiple of 1024 bytes.
constexpr uint32_t swizzled(uint32_t address, Swizzle swizzle) {
  return address ^ ((address >> 3) & swizzle_mask(swizzle));
}

// Opaque; CUtensorMap on a GPU.
struct alignas(64) TensorMap {
  uint64_t opaque[16];
};

// A tensor of `rank` dimensions of 16-bit elements, the innermost first and contiguous. Bytes outside it read
// as zeros and are not written.
template <int rank>
struct TensorShape {
  const void* data;                       // a multiple of 16
  std::array<uint64_t, rank> size;        // elements
  std::array<uint64_t, rank - 1> stride;  // bytes to the next of dimension 1, 2, ...; multiples of 16
  std::array<uint32_t, rank> box;         // elements of a tile, each at most 256
  Swizzle swizzle;                        // the box's inner bytes: at most 128, 64, 32; multiples of 16
};

// Throws std::runtime_error where TMA cannot take the shape.
template <int rank>
TensorMap make_tensor_map(const TensorShape<rank>& shape, bool is_bf16);

}  // namespace flextron
