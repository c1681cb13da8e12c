// The loops of head_attention and head_attention_decode on a CPU. Included once by each file that is compiled
// for one instruction set, and all in an anonymous namespace: vector.h says why.
//
// Scores are kept transposed, [keys][rows]: a row is one active (query, head) pair of the item, so a vector
// holds the same key for several rows, softmax needs no sum across a vector, and K and V are used as they lie
// in memory. Each element of each product is summed in one order wherever it lies in a tile.
//
// A decode step has fewer rows than a vector has lanes: attend_few() keeps the scores of few rows as
// [rows][keys].
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

#include "kernels/head_attention.h"
#include "kernels/vector.h"

namespace flextron {
namespace {

// Hands out pieces of the scratch; with a null base it only counts them.
struct Arena {
  char* base;
  i64 used = 0;

  template <class T>
  T* take(i64 count) {
    char* at = base ? base + used : nullptr;
    used += (count * i64(sizeof(T)) + kLine - 1) / kLine * kLine;
    return reinterpret_cast<T*>(at);
  }
};

// -- products: C[i, n] (+)= sum_k A[i * a_row + k * a_col] B[k, n]. C and B are padded to whole lines in n.
// --

template <bool add, int rows, int vecs, class A>
inline void product_tile(i64 K, const A* a, i64 a_row, i64 a_col, const A* b, i64 ldb, A* c, i64 ldc) {
  Vec<A> sum[rows][vecs];
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 8
    for (int v = 0; v < vecs; ++v) sum[i][v] = add ? load(c + i * ldc + v * kLanes<A>) : Vec<A>{};
  for (i64 k = 0; k < K; ++k) {
    Vec<A> row[vecs];
#pragma GCC unroll 8
    for (int v = 0; v < vecs; ++v) row[v] = load(b + k * ldb + v * kLanes<A>);
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
      const A x = a[i * a_row + k * a_col];
#pragma GCC unroll 8
      for (int v = 0; v < vecs; ++v) sum[i][v] += x * row[v];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 8
    for (int v = 0; v < vecs; ++v) store(c + i * ldc + v * kLanes<A>, sum[i][v]);
}

// A strip of columns of C, all rows.
template <bool add, int vecs, class A>
inline void product_strip(i64 rows, i64 K, const A* a, i64 a_row, i64 a_col, const A* b, i64 ldb, A* c,
                          i64 ldc) {
  i64 i = 0;
  for (; i + 4 <= rows; i += 4)
    product_tile<add, 4, vecs>(K, a + i * a_row, a_row, a_col, b, ldb, c + i * ldc, ldc);
  a += i * a_row, c += i * ldc;
  if (rows - i == 3) product_tile<add, 3, vecs>(K, a, a_row, a_col, b, ldb, c, ldc);
  if (rows - i == 2) product_tile<add, 2, vecs>(K, a, a_row, a_col, b, ldb, c, ldc);
  if (rows - i == 1) product_tile<add, 1, vecs>(K, a, a_row, a_col, b, ldb, c, ldc);
}

template <bool add, class A>
void product_block(i64 rows, i64 cols, i64 K, const A* a, i64 a_row, i64 a_col, const A* b, i64 ldb, A* c,
                   i64 ldc) {
  constexpr i64 lanes = kLanes<A>;
  i64 n = 0;
  for (; n + lanes < cols; n += 2 * lanes)
    product_strip<add, 2>(rows, K, a, a_row, a_col, b + n, ldb, c + n, ldc);
  if (n < cols) product_strip<add, 1>(rows, K, a, a_row, a_col, b + n, ldb, c + n, ldc);
}

// B small enough for the L1 cache, A streamed: strip after strip.
template <bool add, class A>
void product_by_strip(i64 rows, i64 cols, i64 K, const A* a, i64 lda, const A* b, i64 ldb, A* c, i64 ldc) {
  product_block<add>(rows, cols, K, a, lda, 1, b, ldb, c, ldc);
}
// The same with A transposed, 16 rows (one line of A) at a time: B stays in the L1 cache, A is read once.
template <bool add, class A>
void product_of_transpose(i64 rows, i64 cols, i64 K, const A* a, i64 lda, const A* b, i64 ldb, A* c,
                          i64 ldc) {
  constexpr i64 step = kLine / i64(sizeof(A));
  for (i64 i = 0; i < rows; i += step)
    product_block<add>(smaller(step, rows - i), cols, K, a + i, 1, lda, b, ldb, c + i * ldc, ldc);
}

// -- rows of an item and what they see --

template <class scalar_t>
inline bool is_active(const HeadAttentionParams<scalar_t>& p, i64 b, i64 t, i64 h) {
  if (p.chosen) return p.chosen[h];
  const i64 number = p.by_group ? h / p.M : h % p.M;
  return number < (p.extent ? p.extent[b * p.extent_stride_b + t * p.extent_stride_t] : p.heads);
}

struct Rows {
  i64 count;
  i64* at;                // [count] t * H + h
  i64 *first, *visible;   // [count] the row sees keys from first on, below visible
  i64 begin;              // the step of keys where the block's first query's begin
  i64 late, least, most;  // the most of first; of visible
};

// Of n keys from `at`, those before what row r sees, and those before its end.
inline i64 passed_of(const Rows& rows, i64 r, i64 at, i64 n) {
  return larger(smaller(rows.first[r] - at, n), i64(0));
}
inline i64 seen_of(const Rows& rows, i64 r, i64 at, i64 n) {
  return larger(smaller(rows.visible[r] - at, n), i64(0));
}
// Whether every row sees all of them.
inline bool all_see(const Rows& rows, i64 at, i64 n) { return rows.late <= at && at + n <= rows.least; }

template <class scalar_t>
inline i64 max_rows(const HeadAttentionParams<scalar_t>& p) {
  return p.max_queries * p.M;
}

template <class scalar_t>
inline Rows take_rows(const HeadAttentionParams<scalar_t>& p, Arena& arena) {
  Rows rows{};
  rows.at = arena.take<i64>(max_rows(p));
  rows.first = arena.take<i64>(max_rows(p));
  rows.visible = arena.take<i64>(max_rows(p));
  return rows;
}

template <class scalar_t>
void find_rows(const HeadAttentionParams<scalar_t>& p, const AttentionItem& item, Rows& rows) {
  const AttentionSequence& s = p.sequences[item.sequence];
  const i64 begin = item.block * kAttentionQueries, end = smaller(begin + kAttentionQueries, s.T);
  const i64 passed = begin + s.S - s.T + 1 - p.window - s.k_start;
  rows.begin = s.k_start + larger(passed, i64(0)) / kAttentionKeys * kAttentionKeys;
  rows.count = 0, rows.late = 0, rows.least = s.S, rows.most = 0;
  for (i64 h = item.group * p.M; h < (item.group + 1) * p.M; ++h)
    for (i64 i = begin; i < end; ++i) {
      const i64 t = s.query + i;
      if (!is_active(p, item.sequence, t, h)) continue;
      const i64 visible = p.causal ? larger(smaller(i + s.S - s.T + 1, s.S), i64(0)) : s.S;
      rows.at[rows.count] = t * p.H + h;
      rows.first[rows.count] = larger(visible - p.window, i64(0));
      rows.late = larger(rows.late, rows.first[rows.count]);
      rows.visible[rows.count++] = visible;
      rows.least = smaller(rows.least, visible), rows.most = larger(rows.most, visible);
    }
}

// Rows of q, as [rows][D] and [D][rows]; either may be null. Columns beyond the rows are zero.
template <class A, class scalar_t>
void pack_queries(const HeadAttentionParams<scalar_t>& p, const Rows& rows, A* q, A* q_t) {
  const i64 ld = padded<A>(p.D), ld_t = padded<A>(rows.count);
  for (i64 r = 0; r < rows.count; ++r) {
    const scalar_t* from = p.q + rows.at[r] / p.H * p.q_stride_t + rows.at[r] % p.H * p.q_stride_h;
    for (i64 d = 0; d < p.D; ++d) q_t[d * ld_t + r] = widen(from[d]);
    if (q) {
      for (i64 d = 0; d < p.D; ++d) q[r * ld + d] = widen(from[d]);
      for (i64 d = p.D; d < ld; ++d) q[r * ld + d] = A(0);
    }
  }
  for (i64 d = 0; d < p.D; ++d)
    for (i64 r = rows.count; r < ld_t; ++r) q_t[d * ld_t + r] = A(0);
}

// f(j, row) of keys begin + j, j < n, of a sequence: where they lie, page after page.
template <class scalar_t, class stored_t, class F>
inline void for_each_key(const HeadAttentionParams<scalar_t>& p, const KeyView<stored_t>& view,
                         const AttentionSequence& s, i64 group, i64 begin, i64 n, const F& f) {
  for (i64 j = 0; j < n;) {
    const i64 position = s.position + begin + j, in_page = position % p.page;
    stored_t* row = view.data + s.pages[position / p.page] * view.page_stride + in_page * view.key_stride +
                    group * view.group_stride;
    for (const i64 end = smaller(n, j + p.page - in_page); j < end; ++j, row += view.key_stride) f(j, row);
  }
}

// Keys [begin, begin + n) of a sequence, as [n][D].
template <class A, class scalar_t>
void pack_keys(const HeadAttentionParams<scalar_t>& p, const KeyView<const scalar_t>& from,
               const AttentionSequence& s, i64 group, i64 begin, i64 n, A* to) {
  const i64 ld = padded<A>(p.D);
  for_each_key(p, from, s, group, begin, n,
               [&](i64 j, const scalar_t* row) { widen_row(to + j * ld, row, p.D, ld); });
}

// Adds [n][D] sums times a factor to the rows of keys [begin, begin + n).
template <class A, class scalar_t, class grad_t>
void unpack_keys(const HeadAttentionParams<scalar_t>& p, const KeyView<grad_t>& to,
                 const AttentionSequence& s, i64 group, i64 begin, i64 n, const A* from, A factor) {
  const i64 ld = padded<A>(p.D);
  for_each_key(p, to, s, group, begin, n, [&](i64 j, grad_t* row) {
    for (i64 d = 0; d < p.D; ++d) narrow(widen(row[d]) + from[j * ld + d] * factor, row + d);
  });
}

// Replaces x[j][r] by `hidden` where row r does not see key begin + j, in a block that some row does not see
// whole.
template <class A>
void hide(const Rows& rows, i64 begin, i64 n, A hidden, A* limit, A* x, i64 ld) {
  if (all_see(rows, begin, n)) return;
  const i64 lanes = kLanes<A>, used_rows = in_vectors<A>(rows.count);
  for (i64 r = 0; r < rows.count; ++r) limit[r] = A(seen_of(rows, r, begin, n));
  for (i64 r = rows.count; r < used_rows; ++r) limit[r] = A(n);
  for (i64 j = 0; j < n; ++j)
    for (i64 r = 0; r < used_rows; r += lanes) {
      const Vec<A> value = load(x + j * ld + r), other = Vec<A>{} + hidden;
      store(x + j * ld + r, load(limit + r) > Vec<A>{} + A(j) ? value : other);
    }
  if (rows.late <= begin) return;
  for (i64 r = 0; r < rows.count; ++r)
    for (i64 j = 0; j < passed_of(rows, r, begin, n); ++j) x[j * ld + r] = hidden;
}

// -- products where a row sees some of the keys alone: what it does not see may be NaN or infinite, and 0
// times that is not 0. Order and bits are those of the products above. --

template <class A>
inline bool is_finite(i64 rows, i64 cols, const A* x, i64 ld) {
  Vec<A> sum = {};
  for (i64 i = 0; i < rows; ++i)
    for (i64 d = 0; d < cols; d += kLanes<A>) sum += A(0) * load(x + i * ld + d);
  for (i64 e = 0; e < kLanes<A>; ++e)
    if (sum[e] != A(0)) return false;
  return true;
}

// c[r] += sum_j a[j][r] b[j] over n keys from `at`; cols of b and c are whole vectors.
template <class A>
void add_of_keys(const Rows& rows, i64 at, i64 n, i64 cols, const A* a, i64 lda, const A* b, i64 ldb, A* c,
                 i64 ldc) {
  const i64 least = rows.late <= at ? larger(smaller(rows.least - at, n), i64(0)) : 0;
  if (is_finite(n - least, cols, b + least * ldb, ldb))
    return product_of_transpose<true>(rows.count, cols, n, a, lda, b, ldb, c, ldc);
  for (i64 r = 0; r < rows.count; ++r) {
    const i64 passed = passed_of(rows, r, at, n);
    product_block<true>(1, cols, seen_of(rows, r, at, n) - passed, a + passed * lda + r, 1, lda,
                        b + passed * ldb, ldb, c + r * ldc, ldc);
  }
}

// c[j] += sum_r a[j][r] b[r] of n keys from `at`.
template <class A>
void add_of_rows(const Rows& rows, i64 at, i64 n, i64 cols, const A* a, i64 lda, const A* b, i64 ldb, A* c,
                 i64 ldc) {
  if (all_see(rows, at, n) || is_finite(rows.count, cols, b, ldb))
    return product_by_strip<true>(n, cols, rows.count, a, lda, b, ldb, c, ldc);
  for (i64 j = 0; j < n; ++j)
    for (i64 r = 0; r < rows.count; ++r)
      if (rows.first[r] <= at + j && at + j < rows.visible[r])
        product_block<true>(1, cols, 1, a + j * lda + r, 1, 1, b + r * ldb, ldb, c + j * ldc, ldc);
}

// -- forward: online softmax of a block of rows over a range of keys --

template <class A>
struct Softmax {
  A* q;      // [D][rows]; of few rows [rows][D]
  A *k, *v;  // [kAttentionKeys][D]
  A* p;      // [kAttentionKeys][rows] scores, then probabilities; of few rows [rows][kAttentionKeys]
  A *max, *sum, *shrink, *limit;  // [rows]
  A* out;                         // [rows][D], not yet divided by sum
};

template <class scalar_t, class A = typename HeadAttentionParams<scalar_t>::acc_t>
Softmax<A> take_softmax(const HeadAttentionParams<scalar_t>& p, Arena& arena) {
  const i64 R = padded<A>(max_rows(p)), D = padded<A>(p.D);
  Softmax<A> s;
  s.q = arena.take<A>(larger(p.D * R, max_rows(p) * D));
  s.k = arena.take<A>(kAttentionKeys * D);
  s.v = arena.take<A>(kAttentionKeys * D);
  s.p = arena.take<A>(kAttentionKeys * R);
  s.max = arena.take<A>(R);
  s.sum = arena.take<A>(R);
  s.shrink = arena.take<A>(R);
  s.limit = arena.take<A>(R);
  s.out = arena.take<A>(max_rows(p) * D);
  return s;
}

template <class A>
void scale_scores(i64 n, i64 used_rows, i64 ld, A scale, A* x) {
  for (i64 j = 0; j < n; ++j)
    for (i64 r = 0; r < used_rows; r += kLanes<A>) store(x + j * ld + r, load(x + j * ld + r) * scale);
}

// Scores [rows][cols] within +-cap, cols up to whole vectors.
template <class A>
void cap_scores(i64 rows, i64 cols, i64 ld, A cap, A* x) {
  for (i64 i = 0; i < rows; ++i)
    for (i64 c = 0; c < cols; c += kLanes<A>)
      store(x + i * ld + c, cap * vec_tanh(load(x + i * ld + c) / cap));
}

// Scores of n keys become probabilities relative to the new maximum; shrink is what the old sums are worth
// under it.
template <class A>
void softmax_step(i64 n, i64 used_rows, i64 ld, const Softmax<A>& s) {
  const A infinity = A(__builtin_inf());
  for (i64 r = 0; r < used_rows; r += kLanes<A>) {
    const Vec<A> zero = {}, old = load(s.max + r);
    Vec<A> max = old;
    for (i64 j = 0; j < n; ++j) {
      const Vec<A> x = load(s.p + j * ld + r);
      max = max < x ? x : max;
    }
    const Vec<A> from =
        max == zero - infinity ? zero : max;  // nothing seen yet: exp(-inf - 0), not exp(-inf + inf)
    const Vec<A> shrink = vec_exp(old - from);
    Vec<A> sum = zero;  // of this block alone: shorter sums round less
    for (i64 j = 0; j < n; ++j) {
      const Vec<A> x = vec_exp(load(s.p + j * ld + r) - from);
      store(s.p + j * ld + r, x);
      sum += x;
    }
    store(s.max + r, max), store(s.shrink + r, shrink);
    store(s.sum + r, load(s.sum + r) * shrink + sum);
  }
}

// What is summed in out so far, under the new maximum.
template <class A>
void shrink_out(i64 rows, i64 D, const Softmax<A>& s) {
  const i64 ld = padded<A>(D), used = in_vectors<A>(D);
  for (i64 r = 0; r < rows; ++r)
    if (s.shrink[r] != A(1))
      for (i64 d = 0; d < used; ++d) s.out[r * ld + d] *= s.shrink[r];
}

// -- forward of few rows: the lanes are keys in softmax, and elements of D in both products --

// The lane that fold() takes: group by group of lanes, the even (odd = 0) or odd units of x, then those of y.
constexpr int fold_lane(int lane, int unit, int group, int lanes, int odd) {
  const int at = lane % group / unit, half = group / unit / 2;
  return lane / group * group + (at % half * 2 + odd) * unit + lane % unit + (at < half ? 0 : lanes);
}

// Adds neighbouring units of x, and of y, and lays the sums side by side.
template <int unit, int group, class A, int... lane>
inline Vec<A> fold_lanes(Vec<A> x, Vec<A> y, std::integer_sequence<int, lane...>) {
  constexpr int lanes = kLanes<A>;
  return __builtin_shufflevector(x, y, fold_lane(lane, unit, group, lanes, 0)...) +
         __builtin_shufflevector(x, y, fold_lane(lane, unit, group, lanes, 1)...);
}

// `count` vectors into one: lane i of each group holds the sum over a group's units of x[i / unit].
template <int count, int unit, int group, class A>
inline Vec<A> fold(const Vec<A>* x) {
  if constexpr (count == 1)
    return x[0];
  else {
    Vec<A> half[count / 2];
#pragma GCC unroll 8
    for (int i = 0; i < count / 2; ++i)
      half[i] =
          fold_lanes<unit, group, A>(x[2 * i], x[2 * i + 1], std::make_integer_sequence<int, kLanes<A>>{});
    return fold<count / 2, unit, group, A>(half);
  }
}

// Keys whose sums are in registers together, for each row: one shuffle works inside 16 bytes.
template <class A>
constexpr int kFoldKeys = 16 / int(sizeof(A));

// Scores of as many keys as a vector has lanes. D is a whole number of vectors.
template <int rows, class A, class stored_t>
inline void score_tile(i64 D, const A* q, i64 ldq, const stored_t* const* k, A scale, A* p, i64 ldp) {
  constexpr int keys = kFoldKeys<A>, parts = kLanes<A> / keys;
  Vec<A> part[rows][parts];
#pragma GCC unroll 4
  for (int t = 0; t < parts; ++t) {
    Vec<A> sum[rows][keys] = {};
    for (i64 d = 0; d < D; d += kLanes<A>)
#pragma GCC unroll 4
      for (int j = 0; j < keys; ++j) {
        const Vec<A> key = widened(k[t * keys + j] + d);
#pragma GCC unroll 4
        for (int i = 0; i < rows; ++i) sum[i][j] += load(q + i * ldq + d) * key;
      }
#pragma GCC unroll 4
    for (int i = 0; i < rows; ++i) part[i][t] = fold<keys, 1, keys, A>(sum[i]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < rows; ++i) store(p + i * ldp, fold<parts, keys, int(kLanes<A>), A>(part[i]) * scale);
}

// Asks for a row of D elements ahead of its use: keys and values lie far apart in a cache of several groups,
// and a step of few rows would wait for each.
template <class stored_t>
inline void ask_for(const stored_t* row, i64 D) {
  for (i64 d = 0; d < D; d += kLine / i64(sizeof(stored_t))) __builtin_prefetch(row + d);
}

// out[rows][vecs] += p[rows][n] v[n][vecs]; asks for `ahead`, `asked` rows of D elements, at most n.
template <int rows, int vecs, class A, class stored_t>
inline void value_tile(i64 n, const A* p, i64 ldp, const stored_t* const* v, i64 d, A* out, i64 ldo,
                       const stored_t* const* ahead, i64 asked, i64 D) {
  Vec<A> sum[rows][vecs];
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 8
    for (int c = 0; c < vecs; ++c) sum[i][c] = load(out + i * ldo + d + c * kLanes<A>);
  for (i64 j = 0; j < n; ++j) {
    if (j < asked) ask_for(ahead[j], D);
    Vec<A> value[vecs];
#pragma GCC unroll 8
    for (int c = 0; c < vecs; ++c) value[c] = widened(v[j] + d + c * kLanes<A>);
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
      const A x = p[i * ldp + j];
#pragma GCC unroll 8
      for (int c = 0; c < vecs; ++c) sum[i][c] += x * value[c];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 8
    for (int c = 0; c < vecs; ++c) store(out + i * ldo + d + c * kLanes<A>, sum[i][c]);
}

template <int rows, class A, class stored_t>
inline void value_rows(i64 n, i64 D, const A* p, i64 ldp, const stored_t* const* v, A* out, i64 ldo,
                       const stored_t* const* ahead, i64 asked) {
  constexpr i64 lanes = kLanes<A>;
  i64 d = 0;
  const auto next = [&](auto vecs) {
    value_tile<rows, vecs.value>(n, p, ldp, v, d, out, ldo, ahead, d == 0 ? asked : 0, D);
    d += vecs.value * lanes;
  };
  if constexpr (rows == 1)  // as many sums as hide the latency of a multiply-add
    while (d + 8 * lanes <= D) next(std::integral_constant<int, 8>{});
  while (d + 4 * lanes <= D) next(std::integral_constant<int, 4>{});
  while (d + 2 * lanes <= D) next(std::integral_constant<int, 2>{});
  if (d < D) next(std::integral_constant<int, 1>{});
}

// f(integral_constant<rows of a tile>, first row): as few tiles as sums in 16 registers allow, even ones.
template <class F>
inline void by_row_tiles(i64 rows, const F& f) {
  for (i64 r = 0; r < rows;) {
    const i64 left = rows - r;
    if (left == 1)
      f(std::integral_constant<int, 1>{}, r), r += 1;
    else if (left == 2 || left == 4)
      f(std::integral_constant<int, 2>{}, r), r += 2;
    else
      f(std::integral_constant<int, 3>{}, r), r += 3;
  }
}

// Softmax of scores [rows][n] as softmax_step() does it, with keys in the lanes; scores up to whole vectors
// are given.
template <class A>
void softmax_few(const Rows& rows, i64 at, i64 n, const Softmax<A>& s) {
  constexpr i64 lanes = kLanes<A>;
  const A lowest = -A(__builtin_inf());
  const i64 used = in_vectors<A>(n);
  for (i64 r = 0; r < rows.count; ++r) {
    A* p = s.p + r * kAttentionKeys;
    for (i64 j = 0; j < passed_of(rows, r, at, n); ++j) p[j] = lowest;
    for (i64 j = seen_of(rows, r, at, n); j < used; ++j) p[j] = lowest;
    Vec<A> most = Vec<A>{} + s.max[r];
    for (i64 j = 0; j < used; j += lanes) {
      const Vec<A> x = load(p + j);
      most = most < x ? x : most;
    }
    A max = most[0];
    for (i64 i = 1; i < lanes; ++i) max = max < most[i] ? most[i] : max;
    const A from = max == lowest ? A(0) : max;  // nothing seen yet: exp(-inf - 0), not exp(-inf + inf)
    s.shrink[r] = max == s.max[r] ? A(1) : vec_exp(Vec<A>{} + (s.max[r] - from))[0];
    Vec<A> sums = {};
    for (i64 j = 0; j < used; j += lanes) {
      const Vec<A> x = vec_exp(load(p + j) - from);
      store(p + j, x);
      sums += x;
    }
    A sum = sums[0];
    for (i64 i = 1; i < lanes; ++i) sum += sums[i];
    s.max[r] = max, s.sum[r] = s.sum[r] * s.shrink[r] + sum;
  }
}

// Where keys [begin, begin + n) of a sequence lie; the last of them also for what a vector has beyond n.
template <class scalar_t>
void find_keys(const HeadAttentionParams<scalar_t>& p, const KeyView<const scalar_t>& from,
               const AttentionSequence& s, i64 group, i64 begin, i64 n, const scalar_t** rows) {
  for_each_key(p, from, s, group, begin, n, [&](i64 j, const scalar_t* row) { rows[j] = row; });
  for (i64 j = n; j % kLanes<accumulate_t<scalar_t>> != 0; ++j) rows[j] = rows[n - 1];
}

// Rows that attend_few() takes: against attend() it is 1.1 (8 rows) to 3 times (1 row) as fast with float and
// bf16 (AVX2, D = 64 and 128, 512 keys), 1.8 to 5 times with fp16. It needs whole vectors in D.
constexpr i64 kFewRows = 8;

template <class scalar_t>
bool is_few(const HeadAttentionParams<scalar_t>& p, i64 rows) {
  return p.few_rows && rows <= kFewRows && p.D % kLanes<accumulate_t<scalar_t>> == 0;
}

// attend() for few rows, with K and V where they lie. A score is a dot product whose lanes are elements of D;
// the sums across them are made for a vector of keys at a time. A row's bits are the same in every tile.
template <class scalar_t, class A>
void attend_few(const HeadAttentionParams<scalar_t>& p, const AttentionItem& item, const Rows& rows,
                i64 begin, i64 end, const Softmax<A>& s) {
  const AttentionSequence& sequence = p.sequences[item.sequence];
  const i64 ld = padded<A>(p.D);
  for (i64 r = 0; r < rows.count; ++r) {
    s.max[r] = -A(__builtin_inf()), s.sum[r] = A(0);
    for (i64 d = 0; d < p.D; ++d) s.out[r * ld + d] = A(0);
    widen_row(s.q + r * ld, p.q + rows.at[r] / p.H * p.q_stride_t + rows.at[r] % p.H * p.q_stride_h, p.D,
              p.D);
  }
  const scalar_t *k[2][kAttentionKeys], *v[kAttentionKeys];  // keys of this step and of the next
  if (begin < end) find_keys(p, p.k, sequence, item.group, begin, smaller(kAttentionKeys, end - begin), k[0]);
  for (i64 at = begin, turn = 0; at < end; at += kAttentionKeys, turn ^= 1) {
    const i64 n = smaller(kAttentionKeys, end - at), after = smaller(kAttentionKeys, end - at - n);
    find_keys(p, p.v, sequence, item.group, at, n, v);
    if (after > 0) find_keys(p, p.k, sequence, item.group, at + n, after, k[turn ^ 1]);
    by_row_tiles(rows.count, [&](auto tile, i64 r) {
      for (i64 j = 0; j < n; j += kLanes<A>) {
        for (i64 i = j; r == 0 && i < smaller(j + kLanes<A>, n); ++i) ask_for(v[i], p.D);
        score_tile<tile.value>(p.D, s.q + r * ld, ld, k[turn] + j, p.scale, s.p + r * kAttentionKeys + j,
                               kAttentionKeys);
      }
    });
    if (p.softcap != A(0)) cap_scores(rows.count, in_vectors<A>(n), kAttentionKeys, p.softcap, s.p);
    softmax_few(rows, at, n, s);
    shrink_out(rows.count, p.D, s);
    const auto add_values = [&](auto tile, i64 r, i64 first, i64 end) {
      value_rows<tile.value>(end - first, p.D, s.p + r * kAttentionKeys + first, kAttentionKeys, v + first,
                             s.out + r * ld, ld, k[turn ^ 1], r == 0 ? after : 0);
    };
    if (all_see(rows, at, n)) {
      by_row_tiles(rows.count, [&](auto tile, i64 r) { add_values(tile, r, 0, n); });
    } else {  // row by row, for a hidden value may be NaN
      for (i64 r = 0; r < rows.count; ++r)
        add_values(std::integral_constant<int, 1>{}, r, passed_of(rows, r, at, n), seen_of(rows, r, at, n));
    }
  }
}

template <class scalar_t, class A>
void attend(const HeadAttentionParams<scalar_t>& p, const AttentionItem& item, const Rows& rows, i64 begin,
            i64 end, const Softmax<A>& s) {
  if (is_few(p, rows.count)) return attend_few(p, item, rows, begin, end, s);
  const AttentionSequence& sequence = p.sequences[item.sequence];
  const i64 R = padded<A>(rows.count), D = padded<A>(p.D);
  const i64 used = in_vectors<A>(p.D), used_rows = in_vectors<A>(rows.count);
  for (i64 r = 0; r < R; ++r) s.max[r] = -A(__builtin_inf()), s.sum[r] = A(0);
  for (i64 i = 0; i < rows.count * D; ++i) s.out[i] = A(0);
  pack_queries<A>(p, rows, static_cast<A*>(nullptr), s.q);
  for (i64 at = begin; at < end; at += kAttentionKeys) {
    const i64 n = smaller(kAttentionKeys, end - at);
    pack_keys(p, p.k, sequence, item.group, at, n, s.k);
    pack_keys(p, p.v, sequence, item.group, at, n, s.v);
    product_by_strip<false>(n, used_rows, p.D, s.k, D, s.q, R, s.p, R);
    scale_scores(n, used_rows, R, p.scale, s.p);
    if (p.softcap != A(0)) cap_scores(n, used_rows, R, p.softcap, s.p);
    hide(rows, at, n, -A(__builtin_inf()), s.limit, s.p, R);
    softmax_step(n, used_rows, R, s);
    shrink_out(rows.count, p.D, s);
    add_of_keys(rows, at, n, used, s.p, R, s.v, D, s.out, D);
  }
}

// The lse of row t * H + h from its maximum and sum, and its sink if there is one; returns what the row's
// output is to be divided by.
template <class scalar_t, class A>
A finish_row(const HeadAttentionParams<scalar_t>& p, i64 at, A max, A sum) {
  A share = A(1);  // what a probability is worth under the new maximum
  if (p.sinks) {
    const A sink = p.sinks[at % p.H], old = max;
    max = larger(max, sink);
    const A from = max == -A(__builtin_inf()) ? A(0) : max;
    share = vec_exp(Vec<A>{} + (old - from))[0];
    sum = sum * share + vec_exp(Vec<A>{} + (sink - from))[0];
  }
  if (p.lse) p.lse[at] = max + log_of(sum);
  return sum == A(0) ? A(1) : sum / share;
}

// attend() as a value: a matrix unit's items are given another.
struct Attend {
  template <class scalar_t, class A>
  void operator()(const HeadAttentionParams<scalar_t>& p, const AttentionItem& item, const Rows& rows,
                  i64 begin, i64 end, const Softmax<A>& s) const {
    attend(p, item, rows, begin, end, s);
  }
};

template <class scalar_t, class Attending>
void forward_item(const HeadAttentionParams<scalar_t>& p, const AttentionItem& item, Arena arena,
                  const Attending& attending) {
  using A = typename HeadAttentionParams<scalar_t>::acc_t;
  Rows rows = take_rows(p, arena);
  const Softmax<A> s = take_softmax(p, arena);
  find_rows(p, item, rows);
  attending(p, item, rows, rows.begin, rows.most, s);
  const i64 D = padded<A>(p.D);
  for (i64 r = 0; r < rows.count; ++r) {
    const A sum = finish_row(p, rows.at[r], s.max[r], s.sum[r]);
    for (i64 d = 0; d < p.D; ++d) narrow(s.out[r * D + d] / sum, p.out + rows.at[r] * p.D + d);
  }
}

// -- backward: P = exp(S - lse), dS = P (dP - delta), delta = rowsum(dout out); with a softcap dS times the
// slope of tanh --

template <class A>
struct Backward {
  A *q, *dout;             // [rows][D]
  A *q_t, *dout_t;         // [D][rows]
  A *lse, *delta, *limit;  // [rows]
  A *k, *v;                // [kAttentionKeys][D]
  A *p, *ds;               // [kAttentionKeys][rows]
  A* slope;                // [kAttentionKeys][rows] of tanh; null without a softcap
  A* dq;                   // [rows][D]
  A *dk, *dv;              // [keys][D]
};

template <class scalar_t, class A = typename HeadAttentionParams<scalar_t>::acc_t>
Backward<A> take_backward(const HeadAttentionParams<scalar_t>& p, BackwardPart part, Arena& arena) {
  const i64 rows = max_rows(p), R = padded<A>(rows), D = padded<A>(p.D);
  const i64 keys = part == BackwardPart::kFused  ? p.max_keys
                   : part == BackwardPart::kKeys ? kAttentionKeys
                                                 : 0;
  Backward<A> s;
  s.q = arena.take<A>(rows * D), s.dout = arena.take<A>(rows * D);
  s.q_t = arena.take<A>(p.D * R), s.dout_t = arena.take<A>(p.D * R);
  s.lse = arena.take<A>(R), s.delta = arena.take<A>(R), s.limit = arena.take<A>(R);
  s.k = arena.take<A>(kAttentionKeys * D), s.v = arena.take<A>(kAttentionKeys * D);
  s.p = arena.take<A>(kAttentionKeys * R), s.ds = arena.take<A>(kAttentionKeys * R);
  s.slope = p.softcap != A(0) ? arena.take<A>(kAttentionKeys * R) : nullptr;
  s.dq = arena.take<A>(rows * D);
  s.dk = arena.take<A>(keys * D), s.dv = arena.take<A>(keys * D);
  return s;
}

template <class scalar_t, class grad_t, class A>
void pack_backward(const HeadAttentionBackwardParams<scalar_t, grad_t>& params, const Rows& rows,
                   const Backward<A>& s) {
  const HeadAttentionParams<scalar_t>& p = params.forward;
  const i64 R = padded<A>(rows.count), D = padded<A>(p.D);
  pack_queries(p, rows, s.q, s.q_t);
  for (i64 r = 0; r < rows.count; ++r) {
    const scalar_t *dout = params.dout + rows.at[r] * p.D, *out = p.out + rows.at[r] * p.D;
    widen_row(s.dout + r * D, dout, p.D, D);
    A delta = params.delta ? params.delta[rows.at[r]] : A(0);
    for (i64 d = 0; d < p.D; ++d) s.dout_t[d * R + r] = s.dout[r * D + d];
    for (i64 d = 0; !params.delta && d < p.D; ++d) delta += s.dout[r * D + d] * widen(out[d]);
    const A lse = p.lse[rows.at[r]];
    s.delta[r] = delta;
    s.lse[r] =
        lse == -A(__builtin_inf()) ? A(0) : lse;  // such a row sees nothing: hide() takes its probabilities
  }
  for (i64 r = rows.count; r < R; ++r) {
    s.lse[r] = s.delta[r] = A(0);
    for (i64 d = 0; d < p.D; ++d) s.dout_t[d * R + r] = A(0);
  }
}

// P of n keys with a softcap, and the slope of tanh.
template <class A>
void capped_probabilities(i64 n, i64 used_rows, i64 ld, A scale, A cap, const Backward<A>& s) {
  for (i64 j = 0; j < n; ++j)
    for (i64 r = 0; r < used_rows; r += kLanes<A>) {
      const Vec<A> share = vec_tanh(load(s.p + j * ld + r) * scale / cap);
      store(s.p + j * ld + r, vec_exp(cap * share - load(s.lse + r)));
      store(s.slope + j * ld + r, (A(1) - share) * (A(1) + share));
    }
}

// P and dS, without the slope, of n keys from `at`.
template <class scalar_t, class A>
void backward_scores(const HeadAttentionParams<scalar_t>& p, const AttentionItem& item, const Rows& rows,
                     i64 at, i64 n, const Backward<A>& s) {
  const AttentionSequence& sequence = p.sequences[item.sequence];
  const i64 R = padded<A>(rows.count), D = padded<A>(p.D);
  const i64 used_rows = in_vectors<A>(rows.count);
  pack_keys(p, p.k, sequence, item.group, at, n, s.k);
  pack_keys(p, p.v, sequence, item.group, at, n, s.v);
  product_by_strip<false>(n, used_rows, p.D, s.k, D, s.q_t, R, s.p, R);
  if (s.slope) {
    capped_probabilities(n, used_rows, R, p.scale, p.softcap, s);
  } else {
    for (i64 j = 0; j < n; ++j)
      for (i64 r = 0; r < used_rows; r += kLanes<A>)
        store(s.p + j * R + r, vec_exp(load(s.p + j * R + r) * p.scale - load(s.lse + r)));
  }
  hide(rows, at, n, A(0), s.limit, s.p, R);
  product_by_strip<false>(n, used_rows, p.D, s.v, D, s.dout_t, R, s.ds, R);
  for (i64 j = 0; j < n; ++j)
    for (i64 r = 0; r < used_rows; r += kLanes<A>)
      store(s.ds + j * R + r, load(s.p + j * R + r) * (load(s.ds + j * R + r) - load(s.delta + r)));
  hide(rows, at, n, A(0), s.limit, s.ds, R);  // a hidden value may be NaN: 0 * NaN is not 0
}

// dS with the slope.
template <class A>
void add_slope(const Rows& rows, i64 at, i64 n, i64 ld, const Backward<A>& s) {
  hide(rows, at, n, A(0), s.limit, s.slope, ld);  // a hidden score may be NaN
  for (i64 j = 0; j < n; ++j)
    for (i64 r = 0; r < in_vectors<A>(rows.count); r += kLanes<A>)
      store(s.ds + j * ld + r, load(s.ds + j * ld + r) * load(s.slope + j * ld + r));
}

// One block of queries against keys from `begin` to what its rows see, at most to `end`: adds to dq, and to
// dk and dv of the keys counted from `begin`; each may be null.
template <class scalar_t, class A>
void backward_block(const HeadAttentionParams<scalar_t>& p, const AttentionItem& item, const Rows& rows,
                    i64 begin, i64 end, const Backward<A>& s, A* dq, A* dk, A* dv) {
  const i64 R = padded<A>(rows.count), D = padded<A>(p.D), used = in_vectors<A>(p.D);
  for (i64 at = larger(begin, rows.begin); at < smaller(end, rows.most); at += kAttentionKeys) {
    const i64 n = smaller(kAttentionKeys, rows.most - at), key = at - begin;
    backward_scores(p, item, rows, at, n, s);
    if (s.slope) add_slope(rows, at, n, R, s);
    if (dq) add_of_keys(rows, at, n, used, s.ds, R, s.k, D, dq, D);
    if (dv) add_of_rows(rows, at, n, used, s.p, R, s.dout, D, dv + key * D, D);
    if (dk) add_of_rows(rows, at, n, used, s.ds, R, s.q, D, dk + key * D, D);
  }
}

// delta of a block of queries: the sum over its keys of P dP.
template <class scalar_t, class grad_t>
void delta_item(const HeadAttentionBackwardParams<scalar_t, grad_t>& params, const AttentionItem& item,
                Arena arena) {
  using A = accumulate_t<scalar_t>;
  const HeadAttentionParams<scalar_t>& p = params.forward;
  Rows rows = take_rows(p, arena);
  const Backward<A> s = take_backward(p, BackwardPart::kDelta, arena);
  find_rows(p, item, rows);
  pack_backward(params, rows, s);
  const i64 R = padded<A>(rows.count);
  for (i64 at = rows.begin; at < rows.most; at += kAttentionKeys) {
    const i64 n = smaller(kAttentionKeys, rows.most - at);
    backward_scores(p, item, rows, at, n, s);  // ds is P dP: s.delta is still zero
    for (i64 j = 0; j < n; ++j)
      for (i64 r = 0; r < rows.count; ++r) params.delta[rows.at[r]] += s.ds[j * R + r];
  }
}

template <class scalar_t, class grad_t>
void backward_item(const HeadAttentionBackwardParams<scalar_t, grad_t>& params, BackwardPart part,
                   AttentionItem item, Arena arena) {
  if (part == BackwardPart::kDelta) return delta_item(params, item, arena);
  using A = typename HeadAttentionParams<scalar_t>::acc_t;
  const HeadAttentionParams<scalar_t>& p = params.forward;
  const AttentionSequence& sequence = p.sequences[item.sequence];
  const i64 D = padded<A>(p.D), blocks = (sequence.T + kAttentionQueries - 1) / kAttentionQueries;
  Rows rows = take_rows(p, arena);
  const Backward<A> s = take_backward(p, part, arena);

  const bool by_keys = part == BackwardPart::kKeys, by_queries = part == BackwardPart::kQueries;
  const i64 begin = sequence.k_start + (by_keys ? item.block * kAttentionKeys : 0);
  const i64 end = by_keys ? smaller(begin + kAttentionKeys, sequence.S) : sequence.S;
  A* dq = params.dq && !by_keys ? s.dq : nullptr;
  A* dk = params.dk.data && !by_queries ? s.dk : nullptr;
  A* dv = params.dv.data && !by_queries ? s.dv : nullptr;
  for (i64 i = 0; dk && i < (end - begin) * D; ++i) dk[i] = A(0);
  for (i64 i = 0; dv && i < (end - begin) * D; ++i) dv[i] = A(0);

  const i64 first = by_queries ? item.block : 0, last = by_queries ? item.block + 1 : blocks;
  for (item.block = first; item.block < last; ++item.block) {
    find_rows(p, item, rows);
    if (rows.most <= begin || rows.begin >= end) continue;
    pack_backward(params, rows, s);
    for (i64 i = 0; dq && i < rows.count * D; ++i) dq[i] = A(0);
    backward_block(p, item, rows, begin, end, s, dq, dk, dv);
    for (i64 r = 0; dq && r < rows.count; ++r)
      for (i64 d = 0; d < p.D; ++d) narrow(dq[r * D + d] * p.scale, params.dq + rows.at[r] * p.D + d);
  }
  if (dk) unpack_keys(p, params.dk, sequence, item.group, begin, end - begin, dk, p.scale);
  if (dv) unpack_keys(p, params.dv, sequence, item.group, begin, end - begin, dv, A(1));
}

}  // namespace
}  // namespace flextron

// The launchers of head_attention.h for the instruction set this file is compiled for.
#define FLEXTRON_DEFINE_HEAD_ATTENTION(isa)                                                           \
  template <class scalar_t>                                                                           \
  void head_attention_##isa(const HeadAttentionParams<scalar_t>& p, int64_t first, int64_t last,      \
                            char* scratch) {                                                          \
    for (; first < last; ++first) forward_item(p, p.items[first], Arena{scratch}, Attend{});          \
  }                                                                                                   \
  template <class scalar_t, class grad_t>                                                             \
  void head_attention_backward_##isa(const HeadAttentionBackwardParams<scalar_t, grad_t>& p,          \
                                     BackwardPart part, int64_t first, int64_t last, char* scratch) { \
    for (; first < last; ++first) backward_item(p, part, p.forward.items[first], Arena{scratch});     \
  }                                                                                                   \
  FLEXTRON_HEAD_ATTENTION_INSTANCES(isa, float, float)                                                \
  FLEXTRON_HEAD_ATTENTION_INSTANCES(isa, double, double)                                              \
  FLEXTRON_HEAD_ATTENTION_INSTANCES(isa, bf16, bf16)                                                  \
  FLEXTRON_HEAD_ATTENTION_INSTANCES(isa, fp16, fp16)                                                  \
  FLEXTRON_HEAD_ATTENTION_BACKWARD_INSTANCE(isa, bf16, float)                                         \
  FLEXTRON_HEAD_ATTENTION_BACKWARD_INSTANCE(isa, fp16, float)

#define FLEXTRON_HEAD_ATTENTION_BACKWARD_INSTANCE(isa, scalar_t, grad_t)                            \
  template void head_attention_backward_##isa(const HeadAttentionBackwardParams<scalar_t, grad_t>&, \
                                              BackwardPart, int64_t, int64_t, char*);
#define FLEXTRON_HEAD_ATTENTION_INSTANCES(isa, scalar_t, grad_t)                                     \
  template void head_attention_##isa(const HeadAttentionParams<scalar_t>&, int64_t, int64_t, char*); \
  FLEXTRON_HEAD_ATTENTION_BACKWARD_INSTANCE(isa, scalar_t, grad_t)
