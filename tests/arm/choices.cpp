// route and prefix_gate.
#include <algorithm>

#include "checks.h"
#include "kernels/prefix_gate.h"
#include "kernels/route.h"

namespace flextron {
namespace {

template <class T>
void check_route(bool noisy, const std::string& what) {
  constexpr int64_t kTokens = 300, kChoices = 5;
  std::vector<T> logits;
  for (const float value : drawn(kTokens * kChoices)) logits.push_back(std::round(2 * value));  // many equals
  for (int64_t t = 0; t < kTokens; t += 7) logits[t * kChoices + t % kChoices] = kNan;
  for (int64_t c = 0; c < kChoices; ++c) logits[3 * kChoices + c] = kNan;
  std::vector<int64_t> choice(kTokens, -1), order(kTokens, -1), offsets(kChoices + 1, -1);
  const RouteParams<T> p{logits.data(), choice.data(), order.data(),  offsets.data(), nullptr,
                         kTokens,       kChoices,      0x123456789AB, noisy};
  route_choices_cpu(p, 0, 100);
  route_choices_cpu(p, 100, kTokens);
  route_order_cpu(p);
  std::vector<int64_t> sorted(kTokens);
  for (int64_t t = 0; t < kTokens; ++t) {
    sorted[t] = t;
    int64_t best = 0;
    double most = -std::numeric_limits<double>::infinity();
    for (int64_t c = 0; c < kChoices; ++c) {
      double score = logits[t * kChoices + c];
      if (noisy) {
        const double u = (static_cast<double>(philox(p.seed, t, c) >> 9) + 0.5) / 8388608.0;
        score -= std::log(-std::log(u));
      }
      if (score > most) most = score, best = c;
    }
    expect(choice[t] == best, what + ": choice of token " + std::to_string(t));
  }
  std::stable_sort(sorted.begin(), sorted.end(), [&](int64_t a, int64_t b) { return choice[a] > choice[b]; });
  expect(order == sorted, what + ": order");
  for (int64_t i = 0; i <= kChoices; ++i) {
    const auto before =
        std::count_if(choice.begin(), choice.end(), [&](int64_t c) { return c > kChoices - 1 - i; });
    expect(offsets[i] == before, what + ": offset " + std::to_string(i));
  }
}

// Random123's own vectors of Philox4x32-10: counters and keys of zeros, and of ones.
void check_philox() { expect(philox(0, 0, 0) == 0x6627e8d5u, "philox of zeros"); }

template <class scalar_t>
void check_gate(const std::string& dtype) {
  constexpr int64_t kTokens = 5, kWidth = 300;
  const std::vector<int64_t> width{0, 300, 131, -3, 400};
  std::vector<scalar_t> x, dy, y(kTokens * kWidth, scalar_t(kNan));
  for (const float value : drawn(kTokens * kWidth)) x.push_back(scalar_t(value));
  for (const float value : drawn(kTokens * kWidth)) dy.push_back(scalar_t(value));
  const std::vector<float> gate = drawn(kTokens);
  for (int64_t t = 0; t < kTokens; ++t)
    for (int64_t n = std::max<int64_t>(width[t], 0); n < kWidth; ++n)
      x[t * kWidth + n] = dy[t * kWidth + n] = scalar_t(kNan);
  prefix_gate_cpu(PrefixGateParams<scalar_t>{x.data(), gate.data(), width.data(), y.data(), kTokens, kWidth},
                  0, kTokens);
  std::vector<float> dgate(kTokens, kNan);
  prefix_gate_backward_cpu(
      PrefixGateBackwardParams<scalar_t>{dy.data(), x.data(), width.data(), dgate.data(), kTokens, kWidth}, 0,
      kTokens);
  bool right = true;
  std::vector<double> exact, loop;
  for (int64_t t = 0; t < kTokens; ++t) {
    double sum = 0;
    float plain = 0;
    for (int64_t n = 0; n < kWidth; ++n) {
      const int64_t at = t * kWidth + n;
      const float value = n < width[t] ? gate[t] * static_cast<float>(x[at]) : 0.0f;
      right = right && static_cast<float>(y[at]) == static_cast<float>(scalar_t(value));
      if (n >= width[t]) continue;
      sum += double(static_cast<float>(dy[at])) * static_cast<float>(x[at]);
      plain += static_cast<float>(dy[at]) * static_cast<float>(x[at]);
    }
    exact.push_back(sum);
    loop.push_back(plain);
  }
  expect(right, "prefix_gate " + dtype + ": values");
  expect_exact({dgate.begin(), dgate.end()}, loop, exact, "prefix_gate " + dtype + " gradient of the gate");
}

}  // namespace

void check_routes() {
  check_philox();
  for (const bool noisy : {false, true}) {
    check_route<float>(noisy, noisy ? "route float32 noisy" : "route float32");
    check_route<double>(noisy, noisy ? "route float64 noisy" : "route float64");
  }
}

void check_prefix_gate() {
  check_gate<float>("float32");
  check_gate<bf16>("bfloat16");
  check_gate<fp16>("float16");
}

}  // namespace flextron
