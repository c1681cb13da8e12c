// The words of a CPU's matrix unit (Intel AMX), with an emulated body beside the real one: every machine runs
// the same kernels. Included by what is compiled for it; vector.h says why all is anonymous.
//
// There are eight tiles of up to 16 rows of up to 64 bytes. A product of tiles is
//
//   c[m][n] += sum_{k even} a[m][k] b[k][n] + sum_{k odd} a[m][k] b[k][n]     c, sums float, k < 32
//   c[m][n] += sum_k a[m][k] b[k][n]                                          c int32, k < 64
//
// of bfloat16 numbers, each sum begun at 0 and made in order of k, b in pairs, [k / 2][n][2]; or of int8, b
// in fours, [k / 4][n][4]. Floats below the smallest normal one are 0 to the real unit, as inputs and as
// results.
#pragma once

#include "kernels/pairs.h"

namespace flextron {
namespace {

struct TileShape {
  uint8_t rows = kTileRows, row_bytes = kTileRowBytes;
};
constexpr TileShape kWholeTiles[8] = {};

#ifdef __AMX_TILE__

// While one lives, this thread's tiles are in use, of these shapes.
class Tiles {
 public:
  explicit Tiles(const TileShape (&shapes)[8] = kWholeTiles) {
    alignas(64) Config config{};
    config.palette = 1;
    for (int t = 0; t < 8; ++t) config.row_bytes[t] = shapes[t].row_bytes, config.rows[t] = shapes[t].rows;
    asm volatile("ldtilecfg %0" ::"m"(config) : "memory");
  }
  ~Tiles() { asm volatile("tilerelease" ::: "memory"); }
  Tiles(const Tiles&) = delete;

 private:
  struct Config {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  };
};

template <int tile>
inline void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(tile));
}
// Rows `stride` bytes apart.
template <int tile>
inline void tile_load(const void* from, i64 stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(tile) : "memory");
}
template <int tile>
inline void tile_store(void* to, i64 stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(tile) : "memory");
}
template <int c, int a, int b>
inline void tile_dot_bf16() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b));
}
template <int c, int a, int b>
inline void tile_dot_int8() {
  asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b));
}

#else

struct EmulatedTiles {
  alignas(kTileRowBytes) unsigned char bytes[8][kTileRows][kTileRowBytes];
  TileShape shapes[8];
};
inline EmulatedTiles& emulated_tiles() {
  thread_local EmulatedTiles tiles;
  return tiles;
}

struct Tiles {
  explicit Tiles(const TileShape (&shapes)[8] = kWholeTiles) {
    emulated_tiles() = {};
    __builtin_memcpy(emulated_tiles().shapes, shapes, sizeof(shapes));
  }
};

template <int tile>
inline void tile_zero() {
  __builtin_memset(emulated_tiles().bytes[tile], 0, sizeof(EmulatedTiles::bytes[tile]));
}
template <int tile>
inline void tile_load(const void* from, i64 stride) {
  EmulatedTiles& tiles = emulated_tiles();
  for (i64 row = 0; row < tiles.shapes[tile].rows; ++row)
    __builtin_memcpy(tiles.bytes[tile][row], static_cast<const char*>(from) + row * stride,
                     tiles.shapes[tile].row_bytes);
}
template <int tile>
inline void tile_store(void* to, i64 stride) {
  const EmulatedTiles& tiles = emulated_tiles();
  for (i64 row = 0; row < tiles.shapes[tile].rows; ++row)
    __builtin_memcpy(static_cast<char*>(to) + row * stride, tiles.bytes[tile][row],
                     tiles.shapes[tile].row_bytes);
}
template <int c, int a, int b>
inline void tile_dot_bf16() {
  auto& tiles = emulated_tiles().bytes;
  for (i64 m = 0; m < kTileRows; ++m) {
    float sum[kTileRows], even[kTileRows] = {}, odd[kTileRows] = {};
    for (i64 pair = 0; pair < kTileInputs / 2; ++pair) {
      bf16 x[2], y[kTileRows][2];
      __builtin_memcpy(x, tiles[a][m] + pair * sizeof(x), sizeof(x));
      __builtin_memcpy(y, tiles[b][pair], sizeof(y));
      for (i64 n = 0; n < kTileRows; ++n) {
        even[n] += widen(x[0]) * widen(y[n][0]);
        odd[n] += widen(x[1]) * widen(y[n][1]);
      }
    }
    __builtin_memcpy(sum, tiles[c][m], sizeof(sum));
    for (i64 n = 0; n < kTileRows; ++n) sum[n] += even[n] + odd[n];
    __builtin_memcpy(tiles[c][m], sum, sizeof(sum));
  }
}
template <int c, int a, int b>
inline void tile_dot_int8() {
  EmulatedTiles& tiles = emulated_tiles();
  const TileShape of_c = tiles.shapes[c], of_a = tiles.shapes[a];
  for (i64 m = 0; m < of_c.rows; ++m) {
    int32_t sum[kTileRows];
    __builtin_memcpy(sum, tiles.bytes[c][m], sizeof(sum));
    for (i64 k = 0; k < of_a.row_bytes; ++k)
      for (i64 n = 0; n < of_c.row_bytes / 4; ++n)
        sum[n] += int8_t(tiles.bytes[a][m][k]) * int8_t(tiles.bytes[b][k / 4][4 * n + k % 4]);
    __builtin_memcpy(tiles.bytes[c][m], sum, sizeof(sum));
  }
}

#endif

}  // namespace
}  // namespace flextron
