// Shared memory: what every four bytes hold, which banks a warp touches; global memory: alignment and bytes.
#include <set>

#include "emulator/machine.h"

namespace flextron::emulator {

uint32_t shared_offset(const void* address, size_t bytes, const Site& site) {
  const Block& block = *current->block;
  const auto* byte = static_cast<const unsigned char*>(address);
  const auto offset = byte - block.shared;
  for (const SharedRange& range : block.ranges)
    if (offset >= range.begin && offset + static_cast<int64_t>(bytes) <= range.end)
      return static_cast<uint32_t>(offset);
  fail(site, offset >= 0 && offset < static_cast<int64_t>(kSharedLimit)
                 ? text("shared memory: ", bytes, " bytes at offset ", offset, " are outside the block's ",
                        block.ranges.front().end, " bytes")
                 : text("shared memory: the address is not in the block's shared memory"));
}

uint32_t shared_address(const void* shared, const Site& site) {
  return kSharedBase + shared_offset(shared, 1, site);
}

void mark(Block& block, uint32_t offset, size_t bytes, Cell cell) {
  for (size_t i = offset / 4; i < (offset + bytes + 3) / 4; ++i) block.cells[i] = cell;
}

void poison(Block& block, uint32_t offset, size_t bytes) {
  std::memset(block.shared + offset, kPoison, bytes);
}

void check_async_read(Block& block, uint32_t offset, size_t bytes, const Site& site, int swizzle) {
  for (size_t i = offset / 4; i < (offset + bytes + 3) / 4; ++i) {
    const Cell& cell = block.cells[i];
    const auto where = [&] { return text("shared memory at offset ", 4 * i); };
    if (cell.kind == Cell::kUnknown)
      fail(site, where() +
                     " is read asynchronously, and was written neither by TMA nor through "
                     "store_shared, stmatrix or cp.async");
    if (cell.kind == Cell::kFlying)
      fail(site, text(where(), " is read while the copy of line ", cell.line, " is still on its way"));
    if (cell.kind == Cell::kDirty)
      fail(site, text(where(), " was written at line ", cell.line, " by thread ", cell.writer,
                      ", which has not called fence_proxy_async since"));
    if (cell.kind == Cell::kLanded && swizzle >= 0 && cell.swizzle != swizzle)
      fail(site, text("swizzle: TMA wrote offset ", 4 * i, " with mode ", cell.swizzle,
                      ", the descriptor says mode ", swizzle));
  }
}

void touch_shared(const void* address, size_t bytes, bool writes, const Site& site) {
  Block& block = *current->block;
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0)
    fail(site, text("shared memory: an access of ", bytes, " bytes must be aligned to them"));
  const uint32_t offset = shared_offset(address, bytes, site);
  for (size_t i = offset / 4; i < (offset + bytes + 3) / 4; ++i)
    if (block.cells[i].kind == Cell::kFlying)
      fail(site, text("shared memory at offset ", offset, " is ", writes ? "written" : "read",
                      " while the copy of line ", block.cells[i].line, " is still on its way"));
  count_shared(offset, bytes, site);
  if (!writes) return;
  mark(block, offset, bytes, {Cell::kDirty, 0, static_cast<uint16_t>(current->number), site.line()});
  current->dirty.push_back({offset, offset + static_cast<uint32_t>(bytes)});
}

void touch_global(const void* address, size_t bytes, bool writes, const Site& site) {
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0)
    fail(site, text("global memory: an access of ", bytes, " bytes must be aligned to them"));
  count_global(grid(), address, bytes, writes);
}

void red_add(float* global, float value, const Site& site) {
  touch_global(global, sizeof(float), true, site);
  *global += value;
}

void fence_proxy_async(const Site&) {
  Block& block = *current->block;
  for (const SharedRange& range : current->dirty)
    for (size_t i = range.begin / 4; i < (range.end + 3) / 4; ++i)
      if (Cell& cell = block.cells[i]; cell.kind == Cell::kDirty && cell.writer == current->number)
        cell.kind = Cell::kOrdered;
  current->dirty.clear();
}

// ---- banks ----

// A warp's accesses of 4, 8, 16 bytes go 32, 16, 8 lanes at a time; each such group takes as many turns as
// the busiest of the 32 banks has different words.
void count_banks(Counters& counters, const Warp::Access& access) {
  const int lanes_at_once = access.bytes <= 4 ? 32 : access.bytes == 8 ? 16 : 8;
  std::array<std::set<uint32_t>, 32> words[4];
  for (const auto& [lane, offset] : access.lanes)
    for (uint32_t word = offset / 4; word < (offset + access.bytes + 3) / 4; ++word)
      words[lane / lanes_at_once][word % 32].insert(word);
  for (const auto& group : words) {
    size_t turns = 0;
    for (const auto& bank : group) turns = std::max(turns, bank.size());
    if (turns == 0) continue;
    ++counters.shared_accesses;
    counters.bank_conflicts += static_cast<int64_t>(turns) - 1;
  }
}

bool counts_banks = false;

// Lanes run apart here; what they do at one site the n-th time is one instruction of the warp.
void count_shared(uint32_t offset, size_t bytes, const Site& site, const void* code) {
  if (!counts_banks) return;
  const uint64_t key = (reinterpret_cast<uint64_t>(site.file_name()) ^ reinterpret_cast<uint64_t>(code)) *
                           0x9e3779b97f4a7c15u +
                       (uint64_t{site.line()} << 16 | site.column());
  const uint32_t visit = current->visits[key]++;
  auto& accesses = warp().accesses;
  const auto entry = accesses.try_emplace({key, visit}).first;
  entry->second.bytes = bytes;
  entry->second.lanes.emplace_back(current->lane, offset);
  if (entry->second.lanes.size() < 32) return;
  count_banks(grid().counters, entry->second);
  accesses.erase(entry);
}

void finish_accesses(Block& block) {
  for (Warp& warp : block.warps)
    for (const auto& [key, access] : warp.accesses) count_banks(block.grid->counters, access);
}

}  // namespace flextron::emulator
