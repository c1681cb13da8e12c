// The table of what is held.
#include "ops/decoder/held.h"

#include <map>
#include <mutex>
#include <utility>

namespace flextron::decoder {
namespace {

struct Table {
  using Entries = std::map<int64_t, std::shared_ptr<const Held>>;

  std::mutex mutex;
  Entries entries;
  int64_t last = 0;

  // Never torn down: a call may outlive the library's statics.
  static Table& get() {
    static auto* const table = new Table;
    return *table;
  }

  Entries::iterator at(const char* op, int64_t number) {
    const auto entry = entries.find(number);
    if (entry == entries.end())
      fail(op, ": held must come from decoder_hold and not be dropped, got ", number);
    return entry;
  }
};

}  // namespace

void Held::check_places(const char* op) const {
  const Place* place = places_.data();
  for (const Tensor& t : model.weights.all()) {
    if (t.const_data_ptr() != place->data || t.numel() != place->count)
      fail(op, ": held must have weights that stayed where they were, got a moved one");
    ++place;
  }
}

int64_t keep(std::shared_ptr<const Held> held) {
  Table& table = Table::get();
  const std::lock_guard lock(table.mutex);
  table.entries.emplace(++table.last, std::move(held));
  return table.last;
}

std::shared_ptr<const Held> find(const char* op, int64_t number) {
  Table& table = Table::get();
  const std::lock_guard lock(table.mutex);
  return table.at(op, number)->second;
}

std::shared_ptr<const Held> take(const char* op, int64_t number) {
  Table& table = Table::get();
  const std::lock_guard lock(table.mutex);
  const auto entry = table.at(op, number);
  std::shared_ptr<const Held> held = std::move(entry->second);
  table.entries.erase(entry);
  return held;  // the caller lets go of it behind the lock
}

}  // namespace flextron::decoder
