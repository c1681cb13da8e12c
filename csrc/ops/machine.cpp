#include "ops/machine.h"

#include <fcntl.h>
#include <sys/resource.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <mutex>
#include <sstream>

#include "core/build_info.h"
#include "kernels/tuning.h"
#include "ops/isa.h"
#include "ops/linear/executors.h"

namespace flextron {
namespace {

namespace fs = std::filesystem;

constexpr ScalarType kDtypes[] = {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half};
constexpr const char* kNames[] = {"float32", "bfloat16", "float16"};

// -- the machine and its file --

// The processor's name, and its numbers where it has some: processors of several kinds share a name.
std::string processor() {
  std::ifstream file("/proc/cpuinfo");
  std::string name, numbers;
  for (std::string line; std::getline(file, line) && !line.empty();) {
    const size_t colon = line.find(':');
    if (colon == std::string::npos || colon + 2 > line.size()) continue;
    const std::string key = line.substr(0, line.find_last_not_of(" \t", colon - 1) + 1);
    const std::string value = line.substr(colon + 2);
    if (key == "model name") name = value;
    if (key == "cpu family" || key == "model" || key == "CPU implementer" || key == "CPU part")
      numbers += (numbers.empty() ? "" : " ") + value;
  }
  if (name.empty()) name = "CPU";
  return numbers.empty() ? name : name + " (" + numbers + ")";
}

std::string machine_name() {
  std::ostringstream name;
  name << "flextron " << build_info().version << ", torch " << std::hex << aoti_torch_abi_version()
       << std::dec << ", " << processor() << ", " << name_of(isa()) << ", "
       << torch::stable::get_num_threads() << " threads";
  return name.str();
}

std::string plain(const std::string& text) {
  std::string result;
  for (const char c : text)
    if (std::isalnum(static_cast<unsigned char>(c)))
      result += static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
    else if (!result.empty() && result.back() != '-')
      result += '-';
  return result;
}

// Empty: nothing is kept.
fs::path folder() {
  if (const char* const named = std::getenv("FLEXTRON_CACHE")) return named;
  if (const char* const caches = std::getenv("XDG_CACHE_HOME"); caches && *caches == '/')
    return fs::path(caches) / "flextron";
  if (const char* const home = std::getenv("HOME"); home && *home == '/')
    return fs::path(home) / ".cache" / "flextron";
  return {};
}

std::optional<GemmTimes> read_times(const fs::path& file, const std::string& machine) {
  std::ifstream stream(file);
  std::ostringstream text;
  if (!stream || !(text << stream.rdbuf())) return std::nullopt;
  return times_of(machine, text.str());
}

// A new file beside `file`, which is taken away again if it was not moved.
class Draft {
 public:
  explicit Draft(const fs::path& file) : name_(file.string() + ".XXXXXX") {
    std::error_code ignored;
    fs::create_directories(file.parent_path(), ignored);
    handle_ = ::mkstemp(name_.data());
    error_ = errno;
  }
  ~Draft() {
    if (handle_ < 0) return;
    ::close(handle_);
    ::unlink(name_.c_str());
  }
  Draft(const Draft&) = delete;

  // Nothing, or why there is none.
  std::string trouble() const { return handle_ < 0 ? std::strerror(error_) : ""; }

  // Whether `file` now has this text, or another that is `good`: of a process that was sooner.
  template <class Good>
  bool becomes(const fs::path& file, const std::string& text, const Good& good) const {
    if (::write(handle_, text.data(), text.size()) != static_cast<ssize_t>(text.size())) return false;
    if (::link(name_.c_str(), file.c_str()) == 0 || good()) return true;
    return ::rename(name_.c_str(), file.c_str()) == 0;
  }

 private:
  std::string name_;
  int handle_ = -1, error_ = 0;
};

// -- the measurement --

using Clock = std::chrono::steady_clock;
double seconds_since(Clock::time_point begin) {
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

Tensor filled(ScalarType dtype, int64_t rows) {
  const std::array<int64_t, 2> shape{rows, kTimedFeatures}, strides{kTimedFeatures, 1};
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      2, shape.data(), strides.data(), static_cast<int32_t>(dtype), aoti_torch_device_type_cpu(), 0, &made));
  const Tensor t(made);
  void* const data = t.mutable_data_ptr();
  if (dtype == ScalarType::Float)
    std::fill_n(static_cast<float*>(data), t.numel(), 0.125f);
  else
    std::fill_n(static_cast<uint16_t*>(data), t.numel(),
                dtype == ScalarType::Half ? 0x3000 : 0x3E00);  // 0.125
  return t;
}

// How often the system took a core from this process.
int64_t interruptions() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return usage.ru_nivcsw;
}

// What is missing in `times`. Both take turns, and the least of each counts. All of a dtype takes kMost
// seconds at most; a class that would take longer, or that other processes disturbed, stays as it is.
void measure(ScalarType dtype, GemmTimes& times) {
  constexpr double kMost = 0.25, kEach = 0.05;
  constexpr int kTurns = 12, kLeastTurns = 3;
  constexpr int64_t kUndisturbed = 2;  // interruptions in kEach seconds
  const NoGrad guard;
  const Clock::time_point begin = Clock::now();
  const Tensor weight = filled(dtype, kTimedFeatures);
  const OptionalTensor none;
  double call = 0;  // seconds of both, with one row
  for (size_t c = 0; c < kRowClasses.size(); ++c) {
    const int64_t rows = kRowClasses[c].timed;
    if (seconds_since(begin) + (kLeastTurns + 1) * call * static_cast<double>(rows) > kMost) return;
    const Tensor x = filled(dtype, rows);
    const linear::Linear linear =
        linear::read({"elastic_linear", x, weight, none, kTimedFeatures, kTimedFeatures, none, none, 1, 1});
    const auto time = [&](const auto& run) {
      const Clock::time_point from = Clock::now();
      run(linear);
      return seconds_since(from);
    };
    time(linear::forward_on_panels), time(linear::forward_on_views);  // memory, and the vendor's plan
    GemmTime best{1e9, 1e9};
    const Clock::time_point from = Clock::now();
    const int64_t before = interruptions();
    for (int turn = 0; turn < kTurns && (turn < kLeastTurns || seconds_since(from) < kEach); ++turn) {
      best.own = std::min(best.own, time(linear::forward_on_panels));
      best.vendor = std::min(best.vendor, time(linear::forward_on_views));
    }
    if (!times[c] && interruptions() - before <= kUndisturbed) times[c] = best;
    call = (best.own + best.vendor) / static_cast<double>(rows);
  }
}

// -- what a process knows of a dtype --

struct Known {
  std::once_flag once;
  GemmTimes times;
  std::string file;  // where they are, or why nowhere
};
Known& known(size_t dtype) {
  static std::array<Known, std::size(kDtypes)> all;
  return all[dtype];
}

// `missing`: what a kept file lacks is measured, too.
void learn(size_t dtype, bool missing, Known& to) {
  const fs::path in = folder();
  if (in.empty()) {
    to.file = "not measured: FLEXTRON_CACHE is empty, or there is no home folder";
    return;
  }
  const std::string machine = machine_name();
  const fs::path file = in / (plain(machine) + "-" + kNames[dtype] + ".txt");
  const auto use = [&](const GemmTimes& times) {
    to.times = times;
    to.file = file.string();
  };
  const std::optional<GemmTimes> kept = read_times(file, machine);
  const bool whole =
      kept && std::all_of(kept->begin(), kept->end(), [](const auto& time) { return time.has_value(); });
  if (kept && (whole || !missing)) return use(*kept);
  const Draft draft(file);
  if (const std::string trouble = draft.trouble(); !trouble.empty()) {
    if (kept) return use(*kept);
    to.file = "not measured: " + file.string() + " cannot be written: " + trouble;
    return;
  }
  GemmTimes times = kept.value_or(GemmTimes{});
  measure(kDtypes[dtype], times);
  if (draft.becomes(file, text_of(machine, times), [&] { return !kept && read_times(file, machine); }))
    if (const auto now = read_times(file, machine)) return use(*now);
  to.file = "not used: " + file.string() + " could not be written";
}

const Known& of_dtype(size_t dtype, bool missing) {
  Known& which = known(dtype);
  std::call_once(which.once, [&] {
    try {
      learn(dtype, missing, which);
    } catch (const std::exception& error) {  // a full disk, no memory: the op itself goes on
      which.times = {};
      which.file = std::string("not measured: ") + error.what();
    }
  });
  return which;
}

bool is_assumed(size_t dtype, int64_t rows) {
  return cpu_prefers_own_gemm(rows, kDtypes[dtype] == ScalarType::Float ? 4 : 2);
}

}  // namespace

bool own_gemm_is_chosen(ScalarType dtype, int64_t rows, int64_t weights, bool has_extent, bool trains) {
  const size_t which =
      static_cast<size_t>(std::find(std::begin(kDtypes), std::end(kDtypes), dtype) - std::begin(kDtypes));
  const bool assumed = is_assumed(which, rows);
  if (rows * weights < kMeasuredWork || (has_extent && assumed)) return assumed;
  return prefers_own(assumed, of_dtype(which, false).times[class_of(rows)], trains);
}

std::string text_of(const std::string& machine, const GemmTimes& times) {
  std::ostringstream text;
  text << machine << '\n';
  for (size_t c = 0; c < times.size(); ++c)
    if (times[c]) text << kRowClasses[c].timed << ' ' << times[c]->own << ' ' << times[c]->vendor << '\n';
  text << "end\n";
  return text.str();
}

std::optional<GemmTimes> times_of(const std::string& machine, const std::string& text) {
  std::istringstream lines(text);
  std::string line;
  if (!std::getline(lines, line) || line != machine) return std::nullopt;
  GemmTimes times;
  while (std::getline(lines, line) && line != "end") {
    std::istringstream words(line);
    int64_t rows = 0;
    GemmTime time{};
    if (!(words >> rows >> time.own >> time.vendor) || !(time.own > 0) || !(time.vendor > 0))
      return std::nullopt;
    const auto row_class = std::find_if(kRowClasses.begin(), kRowClasses.end(),
                                        [&](const RowClass& each) { return each.timed == rows; });
    if (row_class == kRowClasses.end()) return std::nullopt;
    times[static_cast<size_t>(row_class - kRowClasses.begin())] = time;
  }
  return line == "end" ? std::optional(times) : std::nullopt;
}

MachineReport machine_report() {
  MachineReport report{.processor = processor(),
                       .isa = name_of(isa()),
                       .why = std::getenv("FLEXTRON_ISA") && *std::getenv("FLEXTRON_ISA")
                                  ? "asked for by FLEXTRON_ISA"
                                  : "the widest that this processor and this system have",
                       .threads = torch::stable::get_num_threads(),
                       .files = {},
                       .rows = {}};
  for (size_t d = 0; d < std::size(kDtypes); ++d) {
    const Known& which = of_dtype(d, true);
    report.files.push_back(std::string(kNames[d]) + ": " + which.file);
    for (const auto& [most, timed] : kRowClasses)
      report.rows.push_back({kNames[d], most == INT64_MAX ? 0 : most, which.times[class_of(timed)],
                             prefers_own(is_assumed(d, timed), which.times[class_of(timed)])});
  }
  return report;
}

}  // namespace flextron
