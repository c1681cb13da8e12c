// The GEMM over activations of eight bits: w8a8 and int4.
#include <algorithm>

#include "checks.h"
#include "kernels/elastic_gemm.h"

namespace flextron {
namespace {

struct Kernels {
  const char* name;
  void (*gemm)(const ElasticGemmParams&, int64_t, int64_t);
  void (*quantise)(const ElasticGemmParams&, int64_t, int64_t);
};

constexpr int64_t kBlocks = 2, kInputs = 160, kFeatures = 50;  // inputs of a block

// Codes [matrix][feature][block][input]; scales of a feature, or of each group of its inputs.
struct Weight {
  bool is_int4;
  int64_t matrices;
  std::vector<int> codes;
  std::vector<float> scale, least;

  int64_t at(int64_t m, int64_t n, int64_t block, int64_t k) const {
    return ((m * kFeatures + n) * kBlocks + block) * kInputs + k;
  }
};

constexpr int64_t kGroups = kInputs / kGroupInputs, kPanels = (kFeatures + kPanel - 1) / kPanel;

// Bytes of the panels, and scales beside them.
struct Packed {
  std::vector<uint8_t> bytes;
  std::vector<float> scales;
  std::vector<fp16> group_scales;
};
Packed packed(const Weight& w) {
  const int64_t words = kBlocks * kInputs / (w.is_int4 ? 8 : 4);
  Packed to;
  to.bytes.assign(kPanels * w.matrices * words * kPanel * 4, 85);
  to.scales.assign(kPanels * w.matrices * kPanel, kNan);
  to.group_scales.assign(kPanels * w.matrices * kBlocks * kGroups * 2 * kPanel, fp16(kNan));
  for (int64_t m = 0; m < w.matrices; ++m)
    for (int64_t n = 0; n < kFeatures; ++n) {
      const int64_t panel = n / kPanel * w.matrices + m;
      to.scales[panel * kPanel + n % kPanel] = w.scale[(m * kFeatures + n) * kBlocks * kGroups];
      for (int64_t block = 0; block < kBlocks; ++block)
        for (int64_t k = 0; k < kInputs; ++k) {
          const int64_t in_group = k % kGroupInputs, group = block * kGroups + k / kGroupInputs;
          const int64_t place = group_place(panel, group, kPanels * w.matrices, kBlocks * kGroups);
          const int code = w.codes[w.at(m, n, block, k)];
          if (w.is_int4) {  // a word has four inputs in its low halves of bytes, and the next four
            const int64_t word = place * 4 + in_group / 8;
            uint8_t& byte = to.bytes[(word * kPanel + n % kPanel) * 4 + in_group % 4];
            byte = in_group % 8 < 4 ? (byte & 0xF0) | code : (byte & 0x0F) | code << 4;
            fp16* const scales = &to.group_scales[place * 2 * kPanel];
            scales[n % kPanel] = fp16(w.scale[(m * kFeatures + n) * kBlocks * kGroups + group]);
            scales[kPanel + n % kPanel] = fp16(w.least[(m * kFeatures + n) * kBlocks * kGroups + group]);
          } else {
            const int64_t word = place * 8 + in_group / 4;
            to.bytes[(word * kPanel + n % kPanel) * 4 + k % 4] = static_cast<uint8_t>(code);
          }
        }
    }
  return to;
}

using Steps = std::vector<GemmGroup>;  // row, rows, inputs, features

std::vector<float> run(const Kernels& kernels, const Steps& steps, const std::vector<float>& x,
                       const Weight& w) {
  const Packed weight = packed(w);
  const int64_t rows = steps.back().row + steps.back().rows;
  std::vector<float> y(rows * kFeatures, 0.0f);
  std::vector<GemmGroup> groups;
  std::vector<int64_t> blocks{0};
  int64_t end = 0, begin = 0;
  for (const GemmGroup& step : steps)
    for (int64_t row = step.row; row < step.row + step.rows; row += kQuantisedGroupRows) {
      const int64_t count = std::min(kQuantisedGroupRows, step.row + step.rows - row);
      if (row + count - begin > kBlockRows) {
        blocks.push_back(static_cast<int64_t>(groups.size()));
        begin = row;
      }
      groups.push_back({row, count, step.inputs, step.features, end, 0});
      end += count * input_groups(step.inputs) * kBlocks;
    }
  blocks.push_back(static_cast<int64_t>(groups.size()));
  std::vector<QuantisedInputs> inputs(end + kQuantisedGroupRows - 1);
  ElasticGemmParams p{};
  p.layout = GemmLayout::kPanels;
  p.weight_dtype = w.is_int4 ? GemmDtype::kInt4 : GemmDtype::kInt8;
  p.quantised = true;
  p.a = x.data();
  p.a_row = kBlocks * kInputs;
  p.a_block = kInputs;
  p.a_input = 1;
  p.tiles = inputs.data();
  p.weight[0] = weight.bytes.data();
  p.scales = w.is_int4 ? nullptr : weight.scales.data();
  p.group_scales = weight.group_scales.data();
  p.in_blocks = kBlocks;
  p.in_stride = kInputs;
  p.out_blocks = 1;
  p.out_stride = kPanels * w.matrices;
  p.features = steps.front().features;
  p.gated = p.hidden = w.matrices == 2;
  p.activation = Activation::kRelu;
  p.io = GemmDtype::kFloat;
  p.y = y.data();
  p.y_row = kFeatures;
  p.groups = groups.data();
  p.row_blocks = blocks.data();
  p.row_block_count = static_cast<int64_t>(blocks.size()) - 1;
  kernels.quantise(p, 0, static_cast<int64_t>(groups.size()));
  const int64_t middle = p.items() / 3;  // two threads' parts
  kernels.gemm(p, 0, middle);
  kernels.gemm(p, middle, p.items());
  return y;
}

template <class T>
std::vector<double> reference(const Steps& steps, const std::vector<float>& x, const Weight& w) {
  std::vector<double> y((steps.back().row + steps.back().rows) * kFeatures, 0.0);
  for (const GemmGroup& step : steps)
    for (int64_t row = step.row; row < step.row + step.rows; ++row)
      for (int64_t n = 0; n < step.features; ++n) {
        T sums[2] = {};
        for (int64_t m = 0; m < w.matrices; ++m)
          for (int64_t block = 0; block < kBlocks; ++block)
            for (int64_t k = 0; k < step.inputs; k += kGroupInputs) {
              const float* const a = &x[(row * kBlocks + block) * kInputs];
              const int64_t last = std::min(k + kGroupInputs, step.inputs);
              float most = 0;
              for (int64_t i = k; i < last; ++i) most = std::max(most, std::abs(a[i]));
              const float factor = 127.0f / most, scale = most / 127.0f;
              int products = 0, whole = 0;
              for (int64_t i = k; i < last; ++i) {
                const int q = static_cast<int>(std::nearbyint(a[i] * factor));
                whole += q;
                products += q * (w.codes[w.at(m, n, block, i)] - (w.is_int4 ? 8 : 0));
              }
              const int64_t group = ((m * kFeatures + n) * kBlocks + block) * kGroups + k / kGroupInputs;
              if (w.is_int4) {
                const T of_group = static_cast<float>(fp16(w.scale[group]));
                const T middle = static_cast<float>(fp16(w.least[group])) + 8 * of_group;
                sums[m] += T(products) * (of_group * T(scale)) + middle * (T(scale) * T(whole));
              } else {
                sums[m] += T(products) * T(scale);
              }
            }
        if (!w.is_int4)
          for (int64_t m = 0; m < w.matrices; ++m)
            sums[m] *= w.scale[(m * kFeatures + n) * kBlocks * kGroups];
        y[row * kFeatures + n] = w.matrices == 2 ? std::max(sums[0], T(0)) * sums[1] : sums[0];
      }
  return y;
}

// Values of several cases, each of length 1: a case of few rows has few large products, whose error is luck.
struct Values {
  std::vector<double> ours, loop, exact;

  void add(const std::vector<float>& y, const std::vector<double>& plain, const std::vector<double>& right) {
    const double size = length(right);
    for (size_t i = 0; i < y.size(); ++i) {
      ours.push_back(y[i] / size);
      loop.push_back(plain[i] / size);
      exact.push_back(right[i] / size);
    }
  }
};

void check(const std::vector<Kernels>& all, bool is_int4, bool gated, const Steps& steps,
           std::vector<Values>& values) {
  Weight w{is_int4, gated ? 2 : 1, {}, {}, {}};
  const int64_t rows = steps.back().row + steps.back().rows;
  for (const float value : drawn(w.matrices * kFeatures * kBlocks * kInputs))
    w.codes.push_back(is_int4 ? std::clamp(static_cast<int>(8 + 3 * value), 0, 15)
                              : std::clamp(static_cast<int>(50 * value), -127, 127));
  w.least = drawn(w.matrices * kFeatures * kBlocks * kGroups);
  for (const float value : w.least) w.scale.push_back(0.05f + 0.01f * std::abs(value));
  std::vector<float> x = drawn(rows * kBlocks * kInputs);
  const auto exact = reference<double>(steps, x, w), loop = reference<float>(steps, x, w);

  Weight spoiled = w;  // where nobody reads
  std::vector<float> used = x;
  const GemmGroup first = steps.front(), last = steps.back();
  for (int64_t n = 0; n < w.matrices * kFeatures; ++n)
    for (int64_t block = 0; block < kBlocks; ++block) {
      const bool unused = n % kFeatures >= first.features;
      for (int64_t k = unused ? 0 : first.inputs; k < kInputs; ++k)
        spoiled.codes[(n * kBlocks + block) * kInputs + k] = 5;
      for (int64_t g = unused ? 0 : input_groups(first.inputs); g < kGroups; ++g)
        spoiled.least[(n * kBlocks + block) * kGroups + g] = kNan;
      if (unused) spoiled.scale[(n * kBlocks + block) * kGroups] = kNan;
    }
  for (const GemmGroup& step : steps)
    for (int64_t row = step.row * kBlocks; row < (step.row + step.rows) * kBlocks; ++row)
      std::fill(used.begin() + row * kInputs + step.inputs, used.begin() + (row + 1) * kInputs, kNan);
  const std::vector<float> tail(x.begin() + last.row * kBlocks * kInputs, x.end());

  const std::vector<float> expected = run(all.back(), steps, x, w);
  for (const Kernels& kernels : all) {
    const std::string what = std::string(kernels.name) + (is_int4 ? " int4 " : " w8a8 ") +
                             std::to_string(rows) + " rows" + (gated ? " gated" : "");
    const std::vector<float> y = run(kernels, steps, x, w);
    values[&kernels - all.data()].add(y, loop, exact);
    expect(y == expected, what + ": bits differ from " + all.back().name);
    expect(run(kernels, steps, used, spoiled) == y, what + ": what is beyond an extent counts");
    const std::vector<float> part = run(kernels, {{0, last.rows, last.inputs, last.features, 0, 0}}, tail, w);
    expect(std::equal(part.begin(), part.end(), y.begin() + last.row * kFeatures),
           what + ": a row's bits differ");
  }
}

}  // namespace

void check_quantised() {
  const std::vector<Kernels> all{
#ifdef __aarch64__
      {"arm_dot", elastic_gemm_quantised_arm_dot, elastic_gemm_quantise_arm_dot},
#endif
      {"baseline", elastic_gemm_quantised_cpu, elastic_gemm_quantise_cpu},
  };
  for (const bool is_int4 : {false, true})
    for (const bool gated : {false, true}) {
      std::vector<Values> values(all.size());
      for (const int64_t rows : {1, 2, 5, 8, 9, 40, 300}) {
        Steps steps{{0, rows, 150, 40, 0, 0}};
        if (rows > 2) steps = {{0, rows / 3, 155, 45, 0, 0}, {rows / 3, rows - rows / 3, 97, 23, 0, 0}};
        check(all, is_int4, gated, steps, values);
      }
      for (size_t i = 0; i < all.size(); ++i)
        expect_exact(values[i].ours, values[i].loop, values[i].exact,
                     std::string(all[i].name) + (is_int4 ? " int4" : " w8a8") + (gated ? " gated" : ""));
    }
}

}  // namespace flextron
