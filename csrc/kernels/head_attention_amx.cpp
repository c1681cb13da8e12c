// head_attention and head_attention_decode of bfloat16 with a matrix unit (Intel AMX), chosen at run time:
// both products of attend() by tiles, its softmax between them in float.
//
//   scores[keys][rows] = K[keys][D] Q^T[D][rows]        out[D][rows] += V^T[D][keys] P[keys][rows]
//
// A column of a product is one row of the item and no other's; P is rounded to bfloat16. Keys and values are
// turned into tiles once for the items of a (sequence, group) that follow one another.
#include "kernels/amx.h"
#include "kernels/head_attention_decode_block.h"

namespace flextron {
namespace {

constexpr i64 kBlockKeys = 128;  // of a step of the online softmax
constexpr i64 kKeyTiles = kBlockKeys / kTileRows;
constexpr i64 kKeySteps = kBlockKeys / kTileInputs;
constexpr i64 kHalfStep = kTileInputs / 2;
static_assert(kHalfStep == kTileRows && kLanes<float> == kTileRows);

constexpr i64 tiles_of(i64 n, i64 size) { return (n + size - 1) / size; }

// -- products of tiles: C[i][j] += sum over steps of A[i][step] B[j][step] --

struct Operand {
  const bf16* data;
  i64 stride;  // elements between the first tiles of two sums
};
struct Sums {
  float* data;
  i64 a_stride, b_stride, row;
};

template <int as, int bs>
void product_of_tiles(i64 steps, Operand a, Operand b, Sums c, bool add) {
  const auto at = [&](i64 i, i64 j) { return c.data + i * c.a_stride + j * c.b_stride; };
  const i64 row_bytes = c.row * i64(sizeof(float));
  if (add) {
    tile_load<0>(at(0, 0), row_bytes);
    if constexpr (bs > 1) tile_load<1>(at(0, 1), row_bytes);
    if constexpr (as > 1) tile_load<2>(at(1, 0), row_bytes);
    if constexpr (as > 1 && bs > 1) tile_load<3>(at(1, 1), row_bytes);
  } else {
    tile_zero<0>();
    if constexpr (bs > 1) tile_zero<1>();
    if constexpr (as > 1) tile_zero<2>();
    if constexpr (as > 1 && bs > 1) tile_zero<3>();
  }
  for (i64 step = 0; step < steps * kTileElements; step += kTileElements) {
    tile_load<4>(a.data + step, kTileRowBytes);
    tile_load<6>(b.data + step, kTileRowBytes);
    tile_dot_bf16<0, 4, 6>();
    if constexpr (bs > 1) {
      tile_load<7>(b.data + b.stride + step, kTileRowBytes);
      tile_dot_bf16<1, 4, 7>();
    }
    if constexpr (as > 1) {
      tile_load<5>(a.data + a.stride + step, kTileRowBytes);
      tile_dot_bf16<2, 5, 6>();
      if constexpr (bs > 1) tile_dot_bf16<3, 5, 7>();
    }
  }
  tile_store<0>(at(0, 0), row_bytes);
  if constexpr (bs > 1) tile_store<1>(at(0, 1), row_bytes);
  if constexpr (as > 1) tile_store<2>(at(1, 0), row_bytes);
  if constexpr (as > 1 && bs > 1) tile_store<3>(at(1, 1), row_bytes);
}

// All of a's sums and at most two of b's.
void product_of_tiles(i64 as, i64 bs, i64 steps, Operand a, Operand b, Sums c, bool add) {
  for (i64 i = 0; i < as; i += 2) {
    const Operand from{a.data + i * a.stride, a.stride};
    const Sums to{c.data + i * c.a_stride, c.a_stride, c.b_stride, c.row};
    if (as - i > 1)
      bs > 1 ? product_of_tiles<2, 2>(steps, from, b, to, add)
             : product_of_tiles<2, 1>(steps, from, b, to, add);
    else
      bs > 1 ? product_of_tiles<1, 2>(steps, from, b, to, add)
             : product_of_tiles<1, 1>(steps, from, b, to, add);
  }
}

// -- what the products read --

// Elements [d, d + 32) of a row of D, 0 behind its end.
inline Words words_of(const bf16* row, i64 d, i64 D) {
  if (d + kTileInputs <= D) return load_loose<uint32_t>(row + d);
  Words words{};
  __builtin_memcpy(&words, row + d, (D - d) * sizeof(bf16));
  return words;
}

// Keys of a step of the online softmax and their values; what fills up the tiles is 0.
struct Block {
  bf16* k;      // tiles [kKeyTiles][steps of D]: [16 keys][32 elements]
  bf16* v;      // tiles [tiles of D][kKeySteps]: [16 elements][16 keys][2], the second half's key beside the
                // first's
  bool finite;  // every value
  i64 sequence, group, begin;  // which they are
};

void pack_block(const HeadAttentionParams<bf16>& p, const AttentionSequence& s, i64 group, i64 begin, i64 n,
                Block& block) {
  const i64 steps = tiles_of(p.D, kTileInputs);
  const bf16 *k[kBlockKeys], *v[kBlockKeys];
  find_keys(p, p.k, s, group, begin, n, k);
  find_keys(p, p.v, s, group, begin, n, v);
  for (i64 j = 0; j < tiles_of(n, kTileInputs) * kTileInputs; ++j)
    for (i64 step = 0; step < steps; ++step)
      store_words(block.k + (j / kTileRows * steps + step) * kTileElements + j % kTileRows * kTileInputs,
                  j < n ? words_of(k[j], step * kTileInputs, p.D) : Words{});
  Words infinite{};
  for (i64 step = 0; step < tiles_of(n, kTileInputs); ++step)
    for (i64 d = 0; d < p.D; d += kTileInputs) {
      Words first[kHalfStep], second[kHalfStep];
      for (i64 j = 0; j < kHalfStep; ++j) {
        const i64 key = step * kTileInputs + j;
        first[j] = key < n ? words_of(v[key], d, p.D) : Words{};
        second[j] = key + kHalfStep < n ? words_of(v[key + kHalfStep], d, p.D) : Words{};
        // An exponent of ones alone carries into the sign.
        infinite |= (first[j] & 0x7F807F80u) + 0x00800080u;
        infinite |= (second[j] & 0x7F807F80u) + 0x00800080u;
      }
      transpose_words(first);
      transpose_words(second);
      for (i64 i = 0; i < kTileInputs; i += 2) {
        bf16* const to =
            block.v + ((d + i) / kTileRows * kKeySteps + step) * kTileElements + i % kTileRows * kTileInputs;
        store_words(to, (first[i / 2] & 0xFFFFu) | second[i / 2] << 16);
        store_words(to + kTileInputs, first[i / 2] >> 16 | (second[i / 2] & 0xFFFF0000u));
      }
    }
  uint32_t any = 0;
  for (i64 i = 0; i < kTileRows; ++i) any |= infinite[i];
  block.finite = (any & 0x80008000u) == 0;
}

// Tiles [row tiles][steps of D] of Q^T: [16 pairs of elements][16 rows][2].
void pack_queries(const HeadAttentionParams<bf16>& p, const Rows& rows, bf16* to) {
  for (i64 first = 0; first < rows.count; first += kTileRows)
    for (i64 d = 0; d < p.D; d += kTileInputs, to += kTileElements) {
      Words words[kTileRows]{};
      for (i64 r = first; r < smaller(first + kTileRows, rows.count); ++r)
        words[r - first] =
            words_of(p.q + rows.at[r] / p.H * p.q_stride_t + rows.at[r] % p.H * p.q_stride_h, d, p.D);
      transpose_words(words);
      for (i64 i = 0; i < kTileRows; ++i) store_words(to + i * kTileInputs, words[i]);
    }
}

// -- scratch --

constexpr i64 kTogetherRows =
    2 * kTileRows;  // rows that go through all steps with their scores in the L1 cache
constexpr i64 kScoreRow = kTogetherRows + kTileRows;  // an odd number of lines

struct TileScratch {
  bf16* q;        // see pack_queries; then rows of the result
  bf16* p;        // tiles [2][kKeySteps]: [16 keys][16 rows][2], the second half's key beside the first's
  float* scores;  // [kBlockKeys][kScoreRow]
  float* out;     // tiles [row tiles][tiles of D]: [16 elements][16 rows]
  float *first, *visible;  // [row tiles][16] of the rows, counted from the step's first key
  bf16* masked;            // tiles [kKeySteps] of V^T
  Block* blocks;
  i64 count;  // of blocks
};

// Blocks that stay for the next item of the same (sequence, group): half of the L2 cache of those who have a
// matrix unit.
constexpr i64 kKeptBytes = 1 << 20;

TileScratch take_tiles(const HeadAttentionParams<bf16>& p, Arena& arena) {
  const i64 steps = tiles_of(p.D, kTileInputs), row_tiles = tiles_of(max_rows(p), kTileRows);
  const i64 k_tiles = kKeyTiles * steps, v_tiles = 2 * steps * kKeySteps;
  TileScratch t;
  t.q = arena.take<bf16>(row_tiles * steps * kTileElements);
  t.p = arena.take<bf16>(2 * kKeySteps * kTileElements);
  t.scores = arena.take<float>(kBlockKeys * kScoreRow);
  t.out = arena.take<float>(row_tiles * 2 * steps * kTileRows * kTileRows);
  t.first = arena.take<float>(row_tiles * kTileRows);
  t.visible = arena.take<float>(row_tiles * kTileRows);
  t.masked = arena.take<bf16>(kKeySteps * kTileElements);
  const i64 most = kKeptBytes / ((k_tiles + v_tiles) * kTileElements * i64(sizeof(bf16)));
  const bool one = p.max_queries < kAttentionQueries;  // such sequences have one item each
  t.count = one ? 1 : larger(smaller(tiles_of(p.max_keys, kBlockKeys), most), i64(1));
  t.blocks = arena.take<Block>(t.count);
  bf16* const tiles = arena.take<bf16>(t.count * (k_tiles + v_tiles) * kTileElements);
  if (!arena.base) return t;
  for (i64 i = 0; i < t.count; ++i) {
    t.blocks[i].k = tiles + i * (k_tiles + v_tiles) * kTileElements;
    t.blocks[i].v = t.blocks[i].k + k_tiles * kTileElements;
    t.blocks[i].sequence = -1;
  }
  return t;
}

// exp of what is not above 0 in fewer steps than vec_exp() has: in base 2, whose rounded log2(e) costs a
// relative error of 2^-26 |x|, less than a score of that size has itself. The polynomial is 2^f for |f| <=
// 1/2 within 2e-9.
inline Vec<float> exp_to_one(Vec<float> x) {
  const Vec<float> zero = {}, low = zero - 87.3f;
  const Vec<float> shift = zero + 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const Vec<float> shifted = x * 1.44269504f + shift;
  const Vec<float> n = shifted - shift;
  const Vec<float> f = x * 1.44269504f - n;
  Vec<float> y = f * 1.5345812426e-4f + 1.3399930904e-3f;
  y = y * f + 9.6184890717e-3f;
  y = y * f + 5.5503286421e-2f;
  y = y * f + 2.4022646248e-1f;
  y = y * f + 6.9314718246e-1f;
  y = y * f + 1.0f;
#ifdef __AVX512F__
  const __mmask16 seen = _mm512_cmp_ps_mask((__m512)x, (__m512)low, _CMP_NLT_UQ);
  return (Vec<float>)_mm512_maskz_scalef_ps(seen, (__m512)y, (__m512)n);
#else
  const Words power = ((Words)shifted - (Words)shift + 127) << 23;
  return x < low ? zero : y * (Vec<float>)power;
#endif
}

// -- attend() by tiles --

struct AttendByTiles {
  const TileScratch& t;

  const Block& block_at(const HeadAttentionParams<bf16>& p, const AttentionItem& item, i64 begin) const {
    const AttentionSequence& s = p.sequences[item.sequence];
    Block& block = t.blocks[smaller((begin - s.k_start) / kBlockKeys, t.count - 1)];
    if (block.sequence != item.sequence || block.group != item.group || block.begin != begin) {
      pack_block(p, s, item.group, begin, smaller(kBlockKeys, s.S - begin), block);
      block.sequence = item.sequence, block.group = item.group, block.begin = begin;
    }
    return block;
  }

  // Scores of `keys` keys and 16 rows become what softmax is of: times scale, within the cap, -inf where a
  // row does not see a key. Gives their maximum, or `most` where that is more.
  template <bool hiding, bool capped>
  static Vec<float> prepare(float scale, float cap, i64 keys, const float* first, const float* visible,
                            Vec<float> most, float* x) {
    constexpr i64 kChains = 4;  // a maximum takes four cycles
    const Vec<float> zero = {}, lowest = zero - float(__builtin_inf());
    const Vec<float> from = hiding ? load(first) : zero, to = hiding ? load(visible) : zero;
    Vec<float> chain[kChains] = {most, lowest, lowest, lowest};
    for (i64 j = 0; j < keys; j += kChains)
#pragma GCC unroll 4
      for (i64 i = 0; i < kChains; ++i) {
        Vec<float> score = load(x + (j + i) * kScoreRow) * scale;
        if constexpr (capped) score = cap * vec_tanh(score / cap);
        if constexpr (hiding) {
          const Vec<float> key = zero + float(j + i);
          score = key < to ? score : lowest;
          score = key >= from ? score : lowest;
        }
        store(x + (j + i) * kScoreRow, score);
        chain[i] = chain[i] < score ? score : chain[i];
      }
#pragma GCC unroll 4
    for (i64 i = 1; i < kChains; ++i) chain[0] = chain[0] < chain[i] ? chain[i] : chain[0];
    return chain[0];
  }
  static Vec<float> prepare(const HeadAttentionParams<bf16>& p, bool hiding, i64 keys, const float* first,
                            const float* visible, Vec<float> most, float* x) {
    const auto some = [&](auto hides, auto caps) {
      return prepare<hides.value, caps.value>(p.scale, p.softcap, keys, first, visible, most, x);
    };
    const bool capped = p.softcap != 0;
    return hiding ? (capped ? some(std::true_type{}, std::true_type{})
                            : some(std::true_type{}, std::false_type{}))
                  : (capped ? some(std::false_type{}, std::true_type{})
                            : some(std::false_type{}, std::false_type{}));
  }

  // softmax_step() of `keys` keys and the 16 rows from r on, whose maximum is known, with P as tiles.
  static void step(i64 keys, const float* x, i64 r, Vec<float> max, const Softmax<float>& s, bf16* to) {
    const Vec<float> zero = {}, old = load(s.max + r);
    const Vec<float> from = max == zero - float(__builtin_inf()) ? zero : max;
    Vec<float> sum = zero;
    for (i64 j = 0; j < keys; j += kTileInputs, to += kTileElements, x += kTileInputs * kScoreRow)
      for (i64 i = 0; i < kHalfStep; ++i) {
        const Vec<float> first = exp_to_one(load(x + i * kScoreRow) - from);
        const Vec<float> second = exp_to_one(load(x + (i + kHalfStep) * kScoreRow) - from);
        store_words(to + i * kTileInputs, pairs_of(first, second));
        sum += first + second;
      }
    const Vec<float> shrink = exp_to_one(old - from);
    store(s.max + r, max), store(s.shrink + r, shrink);
    store(s.sum + r, load(s.sum + r) * shrink + sum);
  }

  // The product of one row with the values that it sees alone: of the others some are not finite. Bits are
  // those of the product of all.
  void add_values_of_row(i64 D_tiles, i64 steps, const Block& block, i64 passed, i64 seen, const bf16* p,
                         i64 column, float* out) const {
    alignas(kLine) float sums[kTileRows * kTileRows];
    for (i64 tile = 0; tile < D_tiles; ++tile, out += kTileRows * kTileRows) {
      for (i64 step = 0; step < steps; ++step) {
        Words mask{};
        for (i64 i = 0; i < kHalfStep; ++i) {
          const i64 key = step * kTileInputs + i, other = key + kHalfStep;
          mask[i] = (passed <= key && key < seen ? 0xFFFFu : 0) |
                    (passed <= other && other < seen ? 0xFFFF0000u : 0);
        }
        for (i64 d = 0; d < kTileRows; ++d) {
          const i64 row = step * kTileElements + d * kTileInputs;
          store_words(t.masked + row,
                      load_loose<uint32_t>(block.v + tile * kKeySteps * kTileElements + row) & mask);
        }
      }
      __builtin_memcpy(sums, out, sizeof(sums));
      product_of_tiles<1, 1>(steps, {t.masked, 0}, {p, 0}, {sums, 0, 0, kTileRows}, true);
      for (i64 d = 0; d < kTileRows; ++d) out[d * kTileRows + column] = sums[d * kTileRows + column];
    }
  }

  // attend() with out in t.out.
  void attend_tiles(const HeadAttentionParams<bf16>& p, const AttentionItem& item, const Rows& rows,
                    i64 begin, i64 end, const Softmax<float>& s) const {
    const i64 S = p.sequences[item.sequence].S;
    const i64 row_tiles = tiles_of(rows.count, kTileRows), D_tiles = tiles_of(p.D, kTileRows);
    const i64 D_steps = tiles_of(p.D, kTileInputs), D_sums = D_tiles * kTileRows * kTileRows;
    for (i64 r = 0; r < row_tiles * kTileRows; ++r) s.max[r] = -float(__builtin_inf()), s.sum[r] = 0;
    for (i64 i = 0; i < row_tiles * D_sums; ++i) t.out[i] = 0;
    pack_queries(p, rows, t.q);
    const i64 part = p.sequences[item.sequence].k_start + item.begin;
    begin =
        part + (begin - part) / kBlockKeys * kBlockKeys;  // where the items beside this one have their blocks
    for (i64 at = begin; at < end; at += kBlockKeys) {
      const Block& block = block_at(p, item, at);
      const i64 n = smaller(kBlockKeys, end - at), steps = tiles_of(n, kTileInputs);
      const i64 keys = steps * kTileInputs;  // those from n on are hidden, and may be of the sequence
      const bool hiding = n < keys || !all_see(rows, at, n);
      const bool all_values = block.finite || (all_see(rows, at, n) && n == smaller(keys, S - at));
      for (i64 r = 0; hiding && r < row_tiles * kTileRows; ++r) {
        t.first[r] = r < rows.count ? passed_of(rows, r, at, n) : 0;
        t.visible[r] = r < rows.count ? seen_of(rows, r, at, n) : n;
      }
      for (i64 tile = 0; tile < row_tiles; tile += 2) {
        const i64 count = smaller(row_tiles - tile, i64(2));
        product_of_tiles(2 * steps, count, D_steps, {block.k, D_steps * kTileElements},
                         {t.q + tile * D_steps * kTileElements, D_steps * kTileElements},
                         {t.scores, kTileRows * kScoreRow, kTileRows, kScoreRow}, false);
        for (i64 i = 0; i < count; ++i) {
          const i64 r = (tile + i) * kTileRows;
          float *const x = t.scores + i * kTileRows, *const out = t.out + (tile + i) * D_sums;
          const Vec<float> max = prepare(p, hiding, keys, t.first + r, t.visible + r, load(s.max + r), x);
          step(keys, x, r, max, s, t.p + i * kKeySteps * kTileElements);
          const Vec<float> shrink = load(s.shrink + r);
          for (i64 d = 0; d < D_sums; d += kTileRows) store(out + d, load(out + d) * shrink);
        }
        float* const out = t.out + tile * D_sums;
        if (all_values) {
          product_of_tiles(D_tiles, count, steps, {block.v, kKeySteps * kTileElements},
                           {t.p, kKeySteps * kTileElements}, {out, kTileRows * kTileRows, D_sums, kTileRows},
                           true);
          continue;
        }
        for (i64 i = 0; i < smaller(count * kTileRows, rows.count - tile * kTileRows); ++i) {
          const i64 r = tile * kTileRows + i;
          add_values_of_row(D_tiles, steps, block, passed_of(rows, r, at, n), seen_of(rows, r, at, n),
                            t.p + i / kTileRows * kKeySteps * kTileElements, i % kTileRows,
                            out + i / kTileRows * D_sums);
        }
      }
    }
  }

  // put(to, out) of 16 elements of each row of a tile, divided by its divisor, to [rows][ld].
  template <class T, class Put>
  void unpack_out(i64 D_tiles, i64 tile, Vec<float> divisor, T* to, i64 ld, i64 rows, const Put& put) const {
    const float* from = t.out + tile * D_tiles * kTileRows * kTileRows;
    for (i64 d = 0; d < D_tiles; ++d, from += kTileRows * kTileRows) {
      Words words[kTileRows];
      for (i64 i = 0; i < kTileRows; ++i) words[i] = (Words)(load(from + i * kTileRows) / divisor);
      transpose_words(words);
      for (i64 i = 0; i < rows; ++i) put(to + i * ld + d * kTileRows, (Vec<float>)words[i]);
    }
  }

  // attend() as decode_item() calls it.
  void operator()(const HeadAttentionParams<bf16>& p, const AttentionItem& item, const Rows& rows, i64 begin,
                  i64 end, const Softmax<float>& s) const {
    if (is_few(p, rows.count)) return attend_few(p, item, rows, begin, end, s);
    attend_tiles(p, item, rows, begin, end, s);
    const i64 ld = padded<float>(p.D);
    for (i64 r = 0; r < rows.count; r += kTileRows)
      unpack_out(tiles_of(p.D, kTileRows), r / kTileRows, Vec<float>{} + 1.0f, s.out + r * ld, ld,
                 smaller(kTileRows, rows.count - r), store<float>);
  }

  // forward_item(), without rows of floats between the tiles and the result.
  void forward(const HeadAttentionParams<bf16>& p, const AttentionItem& item, Arena arena) const {
    Arena rest = arena;
    Rows rows = take_rows(p, rest);
    const Softmax<float> s = take_softmax(p, rest);
    find_rows(p, item, rows);
    if (is_few(p, rows.count)) return forward_item(p, item, arena, *this);
    attend_tiles(p, item, rows, rows.begin, rows.most, s);
    const i64 ld = tiles_of(p.D, kTileInputs) * kTileInputs;
    for (i64 first = 0; first < rows.count; first += kTileRows) {
      const i64 count = smaller(kTileRows, rows.count - first);
      Vec<float> divisor = Vec<float>{} + 1.0f;
      for (i64 i = 0; i < count; ++i)
        divisor[i] = finish_row(p, rows.at[first + i], s.max[first + i], s.sum[first + i]);
      bf16* const out = t.q;  // row after row: those of the result lie far apart
      unpack_out(tiles_of(p.D, kTileRows), first / kTileRows, divisor, out, ld, kTileRows, store_bf16);
      for (i64 i = 0; i < count; ++i)
        __builtin_memcpy(p.out + rows.at[first + i] * p.D, out + i * ld, p.D * sizeof(bf16));
    }
  }
};

// f(scratch of items, attending) with tiles in use.
template <class F>
void with_tiles(const HeadAttentionParams<bf16>& p, char* scratch, const F& f) {
  Arena arena{scratch};
  const TileScratch t = take_tiles(p, arena);
  const Tiles tiles;
  f(arena, AttendByTiles{t});
}

}  // namespace

int64_t head_attention_amx_scratch(const HeadAttentionParams<bf16>& p) {
  Arena arena{nullptr};
  take_tiles(p, arena);
  return arena.used + head_attention_scratch(p);
}

void head_attention_amx(const HeadAttentionParams<bf16>& p, int64_t first, int64_t last, char* scratch) {
  with_tiles(p, scratch, [&](const Arena& arena, const AttendByTiles& attending) {
    for (; first < last; ++first) attending.forward(p, p.items[first], arena);
  });
}

void head_attention_decode_amx(const HeadAttentionDecodeParams<bf16>& p, int64_t first, int64_t last,
                               char* scratch) {
  with_tiles(p.attention, scratch, [&](const Arena& arena, const AttendByTiles& attending) {
    for (; first < last; ++first) decode_item(p, first, arena, attending);
  });
}

}  // namespace flextron
