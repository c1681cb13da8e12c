// The words of a CPU's matrix unit (Intel AMX), with an emulated body beside the real one: every machine runs
// the same kernels. Included by what is compiled for it; vector.h says why all is anonymous.
//
// There are eight tiles of 16 rows of 64 bytes. A product of tiles is
//
//   c[m][n] += sum_{k even} a[m][k] b[k][n] + sum_{k odd} a[m][k] b[k][n]     c, sums float, k < 32
//
// each sum begun at 0 and made in order of k, of bfloat16 numbers; b lies in pairs, [k / 2][n][2]. Numbers
// below the smallest normal one are 0 to the real unit, as inputs and as results.
#pragma once

#include "kernels/vector.h"

namespace flextron {
namespace {

constexpr i64 kTileRows = 16;
constexpr i64 kTileRowBytes = 64;
constexpr i64 kTileElements = kTileRows * kTileRowBytes / i64(sizeof(bf16));
constexpr i64 kTileInputs = kTileRowBytes / i64(sizeof(bf16));  // of a product of tiles

#ifdef __AMX_BF16__

// While one lives, this thread's tiles are in use, all of them whole.
class Tiles {
 public:
  Tiles() {
    alignas(64) Config config{};
    config.palette = 1;
    for (int t = 0; t < 8; ++t) config.row_bytes[t] = kTileRowBytes, config.rows[t] = kTileRows;
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

#else

struct EmulatedTiles {
  alignas(kTileRowBytes) unsigned char bytes[8][kTileRows][kTileRowBytes];
};
inline EmulatedTiles& emulated_tiles() {
  thread_local EmulatedTiles tiles;
  return tiles;
}

struct Tiles {
  Tiles() { emulated_tiles() = {}; }
};

template <int tile>
inline void tile_zero() {
  __builtin_memset(emulated_tiles().bytes[tile], 0, sizeof(EmulatedTiles::bytes[tile]));
}
template <int tile>
inline void tile_load(const void* from, i64 stride) {
  for (i64 row = 0; row < kTileRows; ++row)
    __builtin_memcpy(emulated_tiles().bytes[tile][row], static_cast<const char*>(from) + row * stride,
                     kTileRowBytes);
}
template <int tile>
inline void tile_store(void* to, i64 stride) {
  for (i64 row = 0; row < kTileRows; ++row)
    __builtin_memcpy(static_cast<char*>(to) + row * stride, emulated_tiles().bytes[tile][row], kTileRowBytes);
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

#endif

// -- floats and bfloat16 numbers, as tiles take them --

// Floats rounded to bfloat16, in the upper halves of words.
inline Words upper_bf16(Vec<float> x) {
  const Words w = (Words)x;
  const Words rounded = (w + 0x7FFFu + ((w >> 16) & 1u)) & 0xFFFF0000u;
  return x != x ? Words{} + 0x7FC00000u : rounded;
}
// A word of each lane: `low` in its lower half, `high` in its upper.
inline Words pairs_of(Vec<float> low, Vec<float> high) {
#ifdef __AVX512BF16__
  typedef uint16_t Halves __attribute__((vector_size(64)));
  constexpr Halves kInTurn = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                              8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512bh both = _mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
  return (Words)_mm512_permutexvar_epi16((__m512i)kInTurn, (__m512i)both);
#else
  return upper_bf16(low) >> 16 | upper_bf16(high);
#endif
}

inline void store_words(void* to, Words w) { *static_cast<Loose<uint32_t>::type*>(to) = w; }

// 32 floats as bfloat16 numbers.
inline void narrow_tile_row(const float* from, bf16* to) {
#ifdef __AVX512BF16__
  const __m512bh row = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(from + 16), _mm512_loadu_ps(from));
  _mm512_storeu_si512(to, (__m512i)row);
#else
  for (i64 i = 0; i < kTileInputs; ++i) narrow(from[i], to + i);
#endif
}

// 16 floats as bfloat16 numbers.
inline void store_bf16(bf16* to, Vec<float> v) {
#ifdef __AVX512BF16__
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh((__m512)v));
#else
  for (i64 i = 0; i < kLanes<float>; ++i) narrow(v[i], to + i);
#endif
}

// 16 rows of 16 words, turned over.
inline void transpose_words(Words (&r)[16]) {
  static_assert(sizeof(Words) == 64);
  typedef int32_t Pick __attribute__((vector_size(64)));
  constexpr Pick kSwap[4][2] = {
      {{0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30},
       {1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31}},
      {{0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29},
       {2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31}},
      {{0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27},
       {4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31}},
      {{0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23},
       {8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31}},
  };
#pragma GCC unroll 4
  for (int level = 0; level < 4; ++level) {
    const int apart = 1 << level;
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
      if (i & apart) continue;
      const Words low = r[i], high = r[i + apart];
      r[i] = __builtin_shuffle(low, high, kSwap[level][0]);
      r[i + apart] = __builtin_shuffle(low, high, kSwap[level][1]);
    }
  }
}

}  // namespace
}  // namespace flextron
