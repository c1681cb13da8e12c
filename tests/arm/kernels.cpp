// The CPU's GEMM and activations, and all other checks of its kernels. Built for ARM and run on an emulated
// processor by run.sh.
#include "checks.h"
#include "kernels/elastic_gemm.h"
#include "kernels/elastic_mlp.h"

using namespace flextron;

namespace {

Stored stored(GemmDtype dtype, const std::vector<float>& values) {
  if (dtype == GemmDtype::kBf16) return stored_as<bf16>(values);
  if (dtype == GemmDtype::kFp16) return stored_as<fp16>(values);
  if (dtype == GemmDtype::kFloat) return stored_as<float>(values);
  Stored s{std::vector<char>(values.size()), values};
  for (size_t i = 0; i < values.size(); ++i) {
    const int value = std::isnan(values[i]) ? 127 : static_cast<int>(std::lround(20 * std::tanh(values[i])));
    s.bytes[i] = static_cast<char>(value);
    s.floats[i] = static_cast<float>(value);
  }
  return s;
}
int64_t size_of(GemmDtype dtype) {
  return dtype == GemmDtype::kFloat ? 4 : dtype == GemmDtype::kInt8 ? 1 : 2;
}

// One GEMM: y[row][feature] = bias + sum over a group's inputs; weights [features][inputs].
struct Case {
  GemmLayout layout;
  GemmDtype dtype;
  int64_t inputs, features;        // of the weight
  std::vector<GemmGroup> extents;  // row, rows, inputs, features: steps, of which groups are made
  bool gated = false;
};

// The kernels of one instruction set, and what they take.
struct Kernels {
  const char* name;
  void (*gemm)(const ElasticGemmParams&, int64_t, int64_t);
  void (*tiles)(const ElasticGemmParams&, int64_t, int64_t);  // null: not of pairs
  int64_t dot_rows;  // of a plain weight: up to so many are dot products; 0: it takes panels alone
};

std::vector<float> panels_of(const std::vector<float>& weight, int64_t features, int64_t inputs,
                             int64_t together, int64_t matrices) {
  const int64_t panels = (features + kPanel - 1) / kPanel, words = (inputs + together - 1) / together;
  std::vector<float> to(panels * matrices * words * kPanel * together, 0.0f);
  for (int64_t m = 0; m < matrices; ++m)
    for (int64_t n = 0; n < features; ++n)
      for (int64_t k = 0; k < inputs; ++k)
        to[(((n / kPanel * matrices + m) * words + k / together) * kPanel + n % kPanel) * together +
           k % together] = weight[(m * features + n) * inputs + k];
  return to;
}

// What a call needs, laid out.
struct Call {
  ElasticGemmParams p{};
  Stored weight;
  std::vector<float> x, scales, y;
  std::vector<GemmGroup> groups;
  std::vector<int64_t> blocks;
  std::vector<char> tiles;
};

std::vector<float> run(const Kernels& kernels, const Case& c, const std::vector<float>& x,
                       const std::vector<float>& weight, const std::vector<float>& bias) {
  Call call;
  ElasticGemmParams& p = call.p;
  const int64_t matrices = c.gated ? 2 : 1;
  p.layout = c.layout;
  p.weight_dtype = c.dtype;
  p.a = x.data();
  p.a_row = c.inputs;
  p.a_input = 1;
  p.in_blocks = p.out_blocks = 1;
  p.gated = p.hidden = c.gated;
  p.activation = Activation::kSilu;
  p.features = c.extents.front().features;
  p.pairs = kernels.tiles != nullptr;
  const int64_t together = 4 / size_of(c.dtype), rows = c.extents.back().row + c.extents.back().rows;
  if (c.layout == GemmLayout::kPanels) {
    call.weight = stored(c.dtype, panels_of(weight, c.features, c.inputs, together, matrices));
    p.in_stride = (c.inputs + together - 1) / together * together;
    p.out_stride = (c.features + kPanel - 1) / kPanel * matrices;
    if (c.dtype == GemmDtype::kInt8) {
      call.scales.assign(p.out_stride * kPanel, 0.05f);
      p.scales = call.scales.data();
    }
  } else if (c.layout == GemmLayout::kRows) {
    call.weight = stored(c.dtype, weight);
    p.weight_stride = p.in_stride = c.inputs;
    p.out_stride = c.features;
  } else {
    std::vector<float> turned(weight.size());
    for (int64_t n = 0; n < c.features; ++n)
      for (int64_t k = 0; k < c.inputs; ++k) turned[k * c.features + n] = weight[n * c.inputs + k];
    call.weight = stored(c.dtype, turned);
    p.weight_stride = p.out_stride = c.features;
    p.in_stride = c.inputs;
  }
  p.weight[0] = call.weight.bytes.data();
  p.weight[1] = c.gated ? call.weight.bytes.data() + c.features * c.inputs * size_of(c.dtype) : nullptr;
  if (c.layout != GemmLayout::kRows) p.weight[1] = nullptr;
  for (int m = 0; m < matrices; ++m) p.bias[m] = bias.data() + m * c.features;
  p.io = GemmDtype::kFloat;
  call.y.assign(rows * c.features, 0.0f);
  p.y = call.y.data();
  p.y_row = c.features;

  const int64_t most = p.pairs ? kPairsGroupRows : gemm_group_rows(16);
  const int64_t block_rows = p.pairs ? kPairsBlockTiles * 16 : kBlockRows;
  call.blocks = {0};
  int64_t begin = 0, tile = 0;
  for (const GemmGroup& step : c.extents)
    for (int64_t row = step.row; row < step.row + step.rows; row += most) {
      GemmGroup group{row, std::min(most, step.row + step.rows - row), step.inputs, step.features, tile, 0};
      if (!call.groups.empty()) group.row_tile = call.groups.back().row_tile + row_tiles(call.groups.back());
      if (row + group.rows - begin > block_rows || group.row_tile + row_tiles(group) > kPairsBlockTiles) {
        call.blocks.push_back(static_cast<int64_t>(call.groups.size()));
        begin = row;
        group.row_tile = 0;
      }
      tile += row_tiles(group) * input_tiles(group.inputs);
      call.groups.push_back(group);
    }
  call.blocks.push_back(static_cast<int64_t>(call.groups.size()));
  p.groups = call.groups.data();
  p.row_blocks = call.blocks.data();
  p.row_block_count = static_cast<int64_t>(call.blocks.size()) - 1;
  p.dots = c.layout == GemmLayout::kRows && rows <= kernels.dot_rows;
  if (p.pairs) {
    call.tiles.resize(tile * 1024 + 64);
    p.tiles = call.tiles.data() + (64 - reinterpret_cast<uintptr_t>(call.tiles.data()) % 64);
    kernels.tiles(p, 0, static_cast<int64_t>(call.groups.size()));
  }
  const int64_t middle = p.items() / 3;  // two threads' parts
  kernels.gemm(p, 0, middle);
  kernels.gemm(p, middle, p.items());
  return call.y;
}

double silu(double x) { return x / (1 + std::exp(-x)); }

template <class T>
std::vector<double> reference(const Case& c, const std::vector<float>& x, const std::vector<float>& weight,
                              const std::vector<float>& bias, bool pairs) {
  const Stored w = stored(c.dtype, weight);
  const std::vector<float> a = pairs ? stored_as<bf16>(x).floats : x;
  const int64_t rows = c.extents.back().row + c.extents.back().rows;
  const T scale = static_cast<T>(c.dtype == GemmDtype::kInt8 ? 0.05f : 1.0f);
  std::vector<double> y(rows * c.features, 0.0);
  for (const GemmGroup& step : c.extents)
    for (int64_t row = step.row; row < step.row + step.rows; ++row)
      for (int64_t n = 0; n < step.features; ++n) {
        const auto sum = [&](int64_t m) {
          T s = 0;
          for (int64_t k = 0; k < step.inputs; ++k)
            s += static_cast<T>(a[row * c.inputs + k]) *
                 static_cast<T>(w.floats[(m * c.features + n) * c.inputs + k]);
          return s * scale + static_cast<T>(bias[m * c.features + n]);
        };
        y[row * c.features + n] =
            c.gated ? static_cast<double>(static_cast<T>(silu(sum(0))) * sum(1)) : sum(0);
      }
  return y;
}

void check_gemm(const Kernels& kernels, const Case& c) {
  static const char* const layouts[] = {"panels", "rows", "columns"};
  static const char* const dtypes[] = {"float32", "bfloat16", "float16", "int8"};
  const int64_t rows = c.extents.back().row + c.extents.back().rows, matrices = c.gated ? 2 : 1;
  const std::string what = std::string(kernels.name) + " " + layouts[int(c.layout)] + " " +
                           dtypes[int(c.dtype)] + " " + std::to_string(rows) + " rows" +
                           (c.gated ? " gated" : "");
  std::vector<float> x = drawn(rows * c.inputs), weight = drawn(matrices * c.features * c.inputs);
  const std::vector<float> bias = drawn(matrices * c.features);
  const std::vector<float> y = run(kernels, c, x, weight, bias);
  const std::vector<double> ours(y.begin(), y.end());
  const bool pairs = kernels.tiles != nullptr;
  const auto exact = reference<double>(c, x, weight, bias, pairs),
             loop = reference<float>(c, x, weight, bias, pairs);
  expect_exact(ours, loop, exact, what);

  // The last step's rows alone; beyond the extents there is nothing to read.
  const GemmGroup last = c.extents.back();
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t k = c.extents.front().inputs; k < c.inputs; ++k) x[row * c.inputs + k] = kNan;
  for (int64_t n = 0; n < matrices * c.features; ++n)
    for (int64_t k = 0; k < c.inputs; ++k)
      if (n % c.features >= c.extents.front().features || k >= c.extents.front().inputs)
        weight[n * c.inputs + k] = kNan;
  expect(run(kernels, c, x, weight, bias) == y, what + ": what is beyond an extent counts");
  Case alone = c;
  alone.extents = {{0, last.rows, last.inputs, last.features, 0, 0}};
  const bool other_sums = (rows <= kernels.dot_rows) != (last.rows <= kernels.dot_rows);
  if (other_sums && c.layout == GemmLayout::kRows) return;
  const std::vector<float> tail(x.begin() + last.row * c.inputs, x.end());
  const std::vector<float> part = run(kernels, alone, tail, weight, bias);
  expect(std::equal(part.begin(), part.end(), y.begin() + last.row * c.features),
         what + ": a row's bits differ");
}

void check_gemms(const Kernels& kernels) {
  for (const GemmLayout layout : {GemmLayout::kPanels, GemmLayout::kRows, GemmLayout::kColumns})
    for (const GemmDtype dtype : {GemmDtype::kFloat, GemmDtype::kBf16, GemmDtype::kFp16, GemmDtype::kInt8}) {
      const bool is_panels = layout == GemmLayout::kPanels, is_bf16 = dtype == GemmDtype::kBf16;
      if (dtype == GemmDtype::kInt8 && !is_panels) continue;
      if (kernels.dot_rows == 0 && !is_panels) continue;
      if (kernels.tiles && !is_bf16 && dtype != GemmDtype::kInt8) continue;
      for (const int64_t rows : {1, 2, 5, 8, 9, 40, 300}) {
        std::vector<GemmGroup> steps{{0, rows, 300, 40, 0, 0}};
        if (rows > 2) steps = {{0, rows / 3, 310, 45, 0, 0}, {rows / 3, rows - rows / 3, 277, 23, 0, 0}};
        check_gemm(kernels, {layout, dtype, 320, 50, steps});
        if (layout != GemmLayout::kColumns && rows < 300)
          check_gemm(kernels, {layout, dtype, 320, 50, steps, true});
      }
    }
}

void check_activations() {
  constexpr int64_t kWidth = 37;
  for (const Activation activation :
       {Activation::kRelu, Activation::kRelu2, Activation::kGelu, Activation::kGeluTanh, Activation::kSilu}) {
    std::vector<float> g = drawn(kWidth), u = drawn(kWidth), h(kWidth), dh = drawn(kWidth), dg(kWidth),
                       du(kWidth);
    g[0] = -200, g[1] = 200, g[2] = 0;
    const int64_t width = kWidth;
    ElasticMlpParams<float, float> p{.g = g.data(),
                                     .u = u.data(),
                                     .dh = nullptr,
                                     .h = h.data(),
                                     .dg = nullptr,
                                     .du = nullptr,
                                     .gate = nullptr,
                                     .dgate = nullptr,
                                     .choices = &width,
                                     .R = 1,
                                     .d = kWidth,
                                     .C = 1,
                                     .gate_stride = 0,
                                     .in_stride = kWidth,
                                     .out_stride = kWidth,
                                     .activation = activation};
    elastic_mlp_cpu(p, 0, 1);
    const auto near = [](float x, double y) { return std::abs(x - y) <= 4e-6 * (1 + std::abs(y)); };
    const std::string what = "activation " + std::to_string(int(activation));
    for (int64_t i = 0; i < kWidth; ++i)
      expect(near(h[i], activate<double>(activation, g[i]) * u[i]), what + ": value " + std::to_string(i));
    p.dh = dh.data(), p.dg = dg.data(), p.du = du.data();
    elastic_mlp_backward_cpu(p, 0, 1);
    for (int64_t i = 0; i < kWidth; ++i) {
      expect(near(du[i], activate<double>(activation, g[i]) * dh[i]), what + ": gradient of u");
      expect(near(dg[i], activate_derivative<double>(activation, g[i]) * u[i] * dh[i]),
             what + ": gradient of g");
    }
  }
}

}  // namespace

int main() {
  check_gemms({"baseline", elastic_gemm_cpu, nullptr, kDotRows});
#ifdef __aarch64__
  check_gemms({"arm_bf16", elastic_gemm_arm_bf16, elastic_gemm_tiles_arm_bf16, 0});
#endif
  check_activations();
  check_quantised();
  check_attention();
  check_decoder();
  check_routes();
  check_prefix_gate();
  std::printf("%d passed, %d failed\n", checks - failures, failures);
  return failures != 0;
}
