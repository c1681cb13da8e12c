// The decoder's loops between its GEMMs and attention.
#include "kernels/decoder.h"

#include <algorithm>

#include "checks.h"

namespace flextron {
namespace {

constexpr int64_t kRows = 6;
constexpr float kEps = 1e-5f;
const char* const kKinds[] = {"rms", "rms+1", "layer", "layer+1"};

template <class scalar_t>
std::vector<scalar_t> drawn_as(int64_t count) {
  std::vector<scalar_t> values;
  for (const float value : drawn(count)) values.push_back(scalar_t(value));
  return values;
}

// norm(x), in T.
template <class T, class scalar_t>
std::vector<T> normed(NormKind kind, std::vector<T> x, const scalar_t* weight, const scalar_t* bias) {
  const bool layer = kind == NormKind::kLayer || kind == NormKind::kLayerPlusOne;
  const T n = static_cast<T>(x.size());
  T mean = 0, square = 0;
  for (const T value : x) mean += value / n;
  for (T& value : x) value -= layer ? mean : T(0);
  for (const T value : x) square += value * value / n;
  for (size_t i = 0; i < x.size(); ++i) {
    T factor = static_cast<float>(weight[i]);
    if (kind == NormKind::kRmsPlusOne) factor += 1;
    if (kind == NormKind::kLayerPlusOne)
      factor = static_cast<float>(scalar_t(1.0f + static_cast<float>(weight[i])));
    x[i] = x[i] / std::sqrt(square + T(kEps)) * factor + (bias ? T(static_cast<float>(bias[i])) : T(0));
  }
  return x;
}

template <class T>
std::vector<T> row_of(const std::vector<float>& x, int64_t at, int64_t count) {
  return {x.begin() + at, x.begin() + at + count};
}
template <class T>
void append(std::vector<double>& to, const std::vector<T>& values) {
  to.insert(to.end(), values.begin(), values.end());
}

template <class scalar_t>
void check_norm(NormKind kind, bool post, const std::string& dtype) {
  constexpr int64_t kWidth = 61, kStride = 64;
  const std::vector<int64_t> used{3, 0, 1, 5, 0, 2};
  const auto weight = drawn_as<scalar_t>(kWidth), bias = drawn_as<scalar_t>(kWidth),
             post_weight = drawn_as<scalar_t>(kWidth);
  std::vector<float> x(kRows * kStride, kNan), to(kRows * kStride, kNan), add(kRows * kWidth, kNan);
  std::vector<double> exact, loop;
  for (int64_t r = 0; r < kRows; ++r) {
    const std::vector<float> row = drawn(kWidth), more = drawn(kWidth);
    std::copy(row.begin(), row.end(), x.begin() + r * kStride);
    if (used[r] > 0) std::copy(more.begin(), more.end(), add.begin() + r * kWidth);
    const auto expected = [&]<class T>(std::vector<double>& into, T) {
      std::vector<T> value(row.begin(), row.end()), part(more.begin(), more.end());
      if (post) part = normed<T, scalar_t>(kind, part, post_weight.data(), nullptr);
      for (int64_t i = 0; i < kWidth && used[r] > 0; ++i) value[i] += T(0.7f) * part[i];
      append(into, value);
      append(into, normed(kind, value, weight.data(), bias.data()));
    };
    expected(exact, double{});
    expected(loop, float{});
  }
  DecoderNormParams<scalar_t> p{};
  p.kind = kind;
  p.norm = {weight.data(), bias.data()};
  if (post) p.post = {post_weight.data(), nullptr};
  p.x = x.data();
  p.add = add.data();
  p.used = used.data();
  p.to = to.data();
  p.K = kWidth;
  p.x_stride = kStride;
  p.scale = 0.7f;
  p.eps = kEps;
  decoder_norm_cpu(p, 0, 2);
  decoder_norm_cpu(p, 2, kRows);
  std::vector<double> ours;
  for (int64_t r = 0; r < kRows; ++r) {
    append(ours, row_of<double>(x, r * kStride, kWidth));
    append(ours, row_of<double>(to, r * kStride, kWidth));
  }
  expect_exact(ours, loop, exact,
               "decoder norm " + dtype + " " + kKinds[int(kind)] + (post ? " behind too" : ""));
}

// Norms over all heads that a row keeps: what it does not keep is NaN, and stays.
template <class scalar_t>
void check_all_heads(NormKind kind, const std::string& dtype) {
  constexpr int64_t kBlocks = 2, kUnit = 10, kBlock = 40;
  const std::vector<int64_t> kept{4, 1, 0, 3, 2, 4};
  const auto weight = drawn_as<scalar_t>(kBlocks * kBlock);
  std::vector<float> x(kRows * kBlocks * kBlock, kNan);
  std::vector<double> exact, loop, ours;
  for (int64_t r = 0; r < kRows; ++r) {
    const int64_t each = kept[r] * kUnit;
    const std::vector<float> values = drawn(kBlocks * each);
    std::vector<scalar_t> of_kept;
    for (int64_t b = 0; b < kBlocks; ++b) {
      std::copy_n(values.begin() + b * each, each, x.begin() + (r * kBlocks + b) * kBlock);
      of_kept.insert(of_kept.end(), weight.begin() + b * kBlock, weight.begin() + b * kBlock + each);
    }
    append(exact, normed<double, scalar_t>(kind, {values.begin(), values.end()}, of_kept.data(), nullptr));
    append(loop, normed<float, scalar_t>(kind, values, of_kept.data(), nullptr));
  }
  DecoderAllHeadsParams<scalar_t> p{};
  p.kind = kind;
  p.x = x.data();
  p.norm = {weight.data(), nullptr};
  p.extents = kept.data();
  p.unit = kUnit;
  p.blocks = kBlocks;
  p.block = p.norm_block = kBlock;
  p.eps = kEps;
  decoder_all_heads_cpu(p, 0, kRows);
  for (int64_t r = 0; r < kRows; ++r)
    for (int64_t b = 0; b < kBlocks; ++b)
      append(ours, row_of<double>(x, (r * kBlocks + b) * kBlock, kept[r] * kUnit));
  expect_exact(ours, loop, exact, "decoder all heads " + dtype + " " + kKinds[int(kind)]);
}

// Heads of two sequences of three tokens: bounded, normed before or after they are turned, in their dtype.
template <class scalar_t>
void check_heads(Rotation rotation, bool norm_last, const std::string& dtype) {
  constexpr int64_t kTokens = 3, kHeads = 4, kGroups = 2, kSize = 22, kTurned = 16, kRow = 100;
  const auto weight = drawn_as<scalar_t>(kHeads * kSize), cos = drawn_as<scalar_t>(kTokens * kTurned),
             sin = drawn_as<scalar_t>(kTokens * kTurned);
  std::vector<float> from(kRows * kRow, kNan);
  for (int64_t r = 0; r < kRows; ++r) {
    const std::vector<float> row = drawn(kHeads * kSize);
    std::copy(row.begin(), row.end(), from.begin() + r * kRow);
  }
  std::vector<scalar_t> to(kRows * kHeads * kSize, scalar_t(kNan));
  DecoderHeadsParams<scalar_t> p{};
  p.kind = NormKind::kRms;
  p.rotation = rotation;
  p.norm_last = norm_last;
  p.clip = 1.25f;
  p.from = from.data();
  p.from_row = kRow;
  p.from_group = kHeads / kGroups * kSize;
  p.norm = {weight.data(), nullptr};
  p.norm_group = kHeads / kGroups * kSize;
  p.norm_head = kSize;
  p.cos = cos.data();
  p.sin = sin.data();
  p.to = to.data();
  p.to_stride_b = kTokens * kHeads * kSize;
  p.to_stride_t = kHeads * kSize;
  p.to_stride_h = kSize;
  p.T = kTokens;
  p.groups = kGroups;
  p.each = kHeads / kGroups;
  p.D = kSize;
  p.R = p.table_stride = kTurned;
  p.one_table = true;
  p.eps = kEps;
  decoder_heads_cpu(p, 0, 4);
  decoder_heads_cpu(p, 4, kRows);
  const auto expected = [&]<class T>(T) {
    std::vector<double> all;
    for (int64_t r = 0; r < kRows; ++r)
      for (int64_t h = 0; h < kHeads; ++h) {
        std::vector<T> x = row_of<T>(from, r * kRow + h * kSize, kSize);
        if (!norm_last) x = normed<T, scalar_t>(p.kind, x, &weight[h * kSize], nullptr);
        for (T& value : x) value = std::clamp(value, T(-p.clip), T(p.clip));
        const std::vector<T> still = x;
        for (int64_t i = 0; i < kTurned / 2; ++i) {
          const bool halves = rotation == Rotation::kHalves;
          const int64_t a = halves ? i : 2 * i, b = halves ? i + kTurned / 2 : 2 * i + 1;
          const auto at = [&](const std::vector<scalar_t>& table, int64_t n) {
            return static_cast<T>(static_cast<float>(table[r % kTokens * kTurned + n]));
          };
          x[a] = still[a] * at(cos, a) - still[b] * at(sin, a);
          x[b] = still[b] * at(cos, b) + still[a] * at(sin, b);
        }
        if (norm_last) x = normed<T, scalar_t>(p.kind, x, &weight[h * kSize], nullptr);
        for (const T value : x)
          all.push_back(std::is_same_v<T, float> ? static_cast<float>(scalar_t(float(value)))
                                                 : double(value));
      }
    return all;
  };
  std::vector<double> ours;
  for (const scalar_t value : to) ours.push_back(static_cast<float>(value));
  expect_exact(ours, expected(float{}), expected(double{}),
               "decoder heads " + dtype + (rotation == Rotation::kHalves ? " halves" : " pairs") +
                   (norm_last ? " normed last" : ""));
}

void check_router() {
  constexpr int64_t kWidth = 61, kStride = 70, kHidden = 9, kEach = 3;
  std::vector<float> x(kRows * kStride, kNan);
  for (int64_t r = 0; r < kRows; ++r) {
    const std::vector<float> row = drawn(kWidth);
    std::copy(row.begin(), row.end(), x.begin() + r * kStride);
  }
  const std::vector<float> state = drawn(kRows / kEach * kHidden), before = drawn(kRows * kHidden);
  std::vector<float> h = before;
  decoder_router_cpu({x.data(), state.data(), h.data(), kWidth, kStride, kHidden, kHidden, kEach}, 0, kRows);
  const auto expected = [&]<class T>(T) {
    std::vector<double> all;
    for (int64_t r = 0; r < kRows; ++r) {
      T square = 0;
      for (int64_t i = 0; i < kWidth; ++i) square += T(x[r * kStride + i]) * T(x[r * kStride + i]);
      for (int64_t i = 0; i < kHidden; ++i) {
        const T size = std::sqrt(square / T(kWidth) + T(0x1p-23));
        const T sum = T(state[r / kEach * kHidden + i]) + T(before[r * kHidden + i]) / size;
        all.push_back(sum < 0 ? T(0.1) * sum : sum);
      }
    }
    return all;
  };
  expect_exact({h.begin(), h.end()}, expected(float{}), expected(double{}), "decoder router");
}

template <class scalar_t>
void check_logits(const std::string& dtype) {
  constexpr int64_t kVocabulary = 5003, kStride = 5010;
  std::vector<scalar_t> logits(kRows * kStride, scalar_t(kNan));
  for (int64_t r = 0; r < kRows; ++r) {
    const auto row = drawn_as<scalar_t>(kVocabulary);
    std::copy(row.begin(), row.end(), logits.begin() + r * kStride);
  }
  logits[1 * kStride + 4999] = logits[1 * kStride + 70] = scalar_t(9.0f);  // the first of equals
  logits[2 * kStride + 5002] = scalar_t(9.0f);
  logits[3 * kStride + 4800] = scalar_t(kNan);  // before all numbers
  logits[4 * kStride] = scalar_t(std::numeric_limits<float>::infinity());
  std::fill_n(logits.begin() + 5 * kStride, kVocabulary, scalar_t(-std::numeric_limits<float>::infinity()));
  std::vector<int64_t> best(kRows, -1);
  decoder_best_cpu(DecoderBestParams<scalar_t>{logits.data(), best.data(), kVocabulary, kStride}, 0, kRows);
  const std::vector<int64_t> special{70, 5002, 4800, 0, 0};
  expect(std::equal(special.begin(), special.end(), best.begin() + 1),
         "decoder best " + dtype + ": special rows");
  int64_t first = 0;
  for (int64_t i = 0; i < kVocabulary; ++i)
    if (static_cast<float>(logits[i]) > static_cast<float>(logits[first])) first = i;
  expect(best[0] == first, "decoder best " + dtype);

  std::vector<scalar_t> x = drawn_as<scalar_t>(37);
  std::vector<double> exact, loop, ours;
  for (const scalar_t value : x) {
    const float wide = static_cast<float>(value);
    exact.push_back(1.5 * std::tanh(wide / 1.5));
    loop.push_back(static_cast<float>(scalar_t(1.5f * std::tanh(wide / 1.5f))));
  }
  decoder_cap_cpu(DecoderCapParams<scalar_t>{x.data(), 1.5f}, 0, 20);
  decoder_cap_cpu(DecoderCapParams<scalar_t>{x.data(), 1.5f}, 20, 37);
  for (const scalar_t value : x) ours.push_back(static_cast<float>(value));
  expect_exact(ours, loop, exact, "decoder cap " + dtype);
}

template <class scalar_t>
void check_dtype(const std::string& dtype) {
  for (const NormKind kind :
       {NormKind::kRms, NormKind::kRmsPlusOne, NormKind::kLayer, NormKind::kLayerPlusOne})
    for (const bool post : {false, true}) check_norm<scalar_t>(kind, post, dtype);
  check_all_heads<scalar_t>(NormKind::kRms, dtype);
  check_all_heads<scalar_t>(NormKind::kRmsPlusOne, dtype);
  for (const Rotation rotation : {Rotation::kHalves, Rotation::kPairs})
    for (const bool norm_last : {false, true}) check_heads<scalar_t>(rotation, norm_last, dtype);
  check_logits<scalar_t>(dtype);
}

}  // namespace

void check_decoder() {
  check_dtype<float>("float32");
  check_dtype<bf16>("bfloat16");
  check_dtype<fp16>("float16");
  check_router();
}

}  // namespace flextron
