// A value the compiler must know is listed once and dispatched on the list: no switch macros, no silent
// fall-through.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace flextron {

template <class... Types>
struct TypeList {};

template <int64_t... values>
struct IntList {};

// Calls f(integral_constant<value>) for the member of the list that equals value; otherwise the error prints
// the list.
template <int64_t... values, class F>
void dispatch_int(IntList<values...>, const char* op, const char* argument, int64_t value, F&& f) {
  const bool found = ((value == values && (f(std::integral_constant<int64_t, values>{}), true)) || ...);
  if (found) return;
  std::string list;
  ((list += (list.empty() ? "" : ", ") + std::to_string(values)), ...);
  throw std::runtime_error(std::string(op) + ": " + argument + " must be one of " + list + ", got " +
                           std::to_string(value));
}

}  // namespace flextron
