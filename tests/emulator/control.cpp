// The emulator's face for Python, which calls it through ctypes: texts in, texts out, no exception across.
#include "core/macros.h"
#include "emulator/machine.h"

namespace flextron::emulator {
namespace {

// "=" and what f returned, or "!" and what it threw. The text lives until the thread's next call.
template <class F>
const char* answer(const F& f) {
  thread_local std::string text;
  try {
    text = "=" + f();
  } catch (const std::exception& error) {
    text = std::string("!") + error.what();
  }
  return text.c_str();
}

}  // namespace

extern "C" {

FLEXTRON_API const char* flextron_emulator_set_order(uint64_t seed, const char* order) {
  return answer([&] { return set_order(seed, order), std::string(); });
}

FLEXTRON_API const char* flextron_emulator_watch(const char* name, const void* data, size_t bytes) {
  return answer([&] { return watch(name, data, bytes), std::string(); });
}

FLEXTRON_API const char* flextron_emulator_clear_watches() {
  return answer([] { return clear_watches(), std::string(); });
}

FLEXTRON_API const char* flextron_emulator_count_banks(int on) {
  return answer([&] { return counts_banks = on != 0, std::string(); });
}

FLEXTRON_API const char* flextron_emulator_take_counters() {
  return answer([] { return take_counters(); });
}

FLEXTRON_API const char* flextron_emulator_run_fault(const char* name) {
  return answer([&] { return run_fault(name); });
}

FLEXTRON_API const char* flextron_emulator_fault_names() {
  return answer([] { return fault_names(); });
}

FLEXTRON_API const char* flextron_emulator_check_word(const char* name) {
  return answer([&] { return check_word(name), std::string(); });
}

FLEXTRON_API const char* flextron_emulator_word_names() {
  return answer([] { return word_names(); });
}

}  // extern "C"

}  // namespace flextron::emulator
