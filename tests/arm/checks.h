// What the checks of the CPU's kernels share. Each calls kernels without torch: a result against a sum in
// double, as exact as a plain float loop; NaN beyond every extent; and a row's bits whatever stands beside
// it.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "core/types.h"

namespace flextron {

inline int failures = 0, checks = 0;
inline void expect(bool right, const std::string& what) {
  ++checks;
  if (right) return;
  ++failures;
  std::printf("wrong: %s\n", what.c_str());
}

inline std::mt19937 engine(0);
inline std::vector<float> drawn(int64_t count) {
  std::normal_distribution<float> normal;
  std::vector<float> values(count);
  for (float& value : values) value = normal(engine);
  return values;
}

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// Values in a dtype, as bytes, and as the floats that they are.
struct Stored {
  std::vector<char> bytes;
  std::vector<float> floats;
};
template <class T>
Stored stored_as(const std::vector<float>& values) {
  Stored s{std::vector<char>(values.size() * sizeof(T)), values};
  for (size_t i = 0; i < values.size(); ++i) {
    const T value(values[i]);
    std::memcpy(s.bytes.data() + i * sizeof(T), &value, sizeof(T));
    s.floats[i] = static_cast<float>(value);
  }
  return s;
}

inline double distance(const std::vector<double>& a, const std::vector<double>& b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += (a[i] - b[i]) * (a[i] - b[i]);
  return std::sqrt(sum);
}
inline double length(const std::vector<double>& a) { return distance(a, std::vector<double>(a.size(), 0.0)); }

// Whether values are as exact as those of a plain float loop.
inline void expect_exact(const std::vector<double>& ours, const std::vector<double>& loop,
                         const std::vector<double>& exact, const std::string& what) {
  expect(distance(ours, exact) <= 2 * distance(loop, exact) + 1e-7 * length(exact), what + ": values");
}

void check_quantised();
void check_attention();
void check_decoder();
void check_routes();
void check_prefix_gate();

}  // namespace flextron
