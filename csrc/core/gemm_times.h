// What this machine's processor takes for GEMMs of plain weights, our own and the vendor's, and what follows.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "core/macros.h"

namespace flextron {

// Calls of so many rows are timed by one of them. The choice depends on the dtype and the number of rows
// alone, never on a width: a call's rows are all computed by one GEMM, whatever their extents.
struct RowClass {
  int64_t most, timed;
};
constexpr std::array<RowClass, 4> kRowClasses{{{8, 4}, {64, 32}, {256, 128}, {INT64_MAX, 512}}};
inline size_t class_of(int64_t rows) {
  size_t i = 0;
  while (rows > kRowClasses[i].most) ++i;
  return i;
}

// Seconds of one call, the weight a square of kTimedFeatures; nothing where it was not measured.
constexpr int64_t kTimedFeatures = 768;
struct GemmTime {
  double own, vendor;
};
using GemmTimes = std::array<std::optional<GemmTime>, kRowClasses.size()>;

// Whether our own GEMM is chosen, where `assumed` says whether it would be without a measurement. The other
// is chosen only where it is faster by so much that a second measurement would say the same; and ours, by
// which a row has the same bits whatever rows stand beside it, is given up only where the vendor's is far
// ahead. In what `trains`, gradients and the forward that keeps what they need, no row's bits are promised.
inline bool prefers_own(bool assumed, const std::optional<GemmTime>& time, bool trains = false) {
  constexpr double kSlightly = 1.03, kClearly = 1.1, kFar = 1.5;
  if (!time) return assumed;
  const double most = trains ? kSlightly : kFar;
  return assumed ? time->own <= most * time->vendor : kClearly * time->own < time->vendor;
}

// The times as lines of a file that begins with the machine's name, and back; nothing where the text is of
// another machine or damaged.
FLEXTRON_API std::string text_of(const std::string& machine, const GemmTimes& times);
FLEXTRON_API std::optional<GemmTimes> times_of(const std::string& machine, const std::string& text);

// What is known about this machine, for a reader; what was not measured yet is.
struct MachineReport {
  struct Row {
    std::string dtype;
    int64_t most;  // rows; 0: without end
    std::optional<GemmTime> time;
    bool own;  // which is chosen, for that many rows
  };
  std::string processor, isa, why;
  int64_t threads;
  std::vector<std::string> files;  // of each dtype: where its times are kept, or why they are not
  std::vector<Row> rows;
};
FLEXTRON_API MachineReport machine_report();

}  // namespace flextron
