// Barriers of every kind, cp.async, and TMA.
#include "emulator/machine.h"
#include "kernels/device/tensor_map.h"

namespace flextron::emulator {

// ---- named barriers ----

void named_barrier(int id, int threads, bool waits, const Site& site) {
  Block& block = *current->block;
  if (id < 0 || id > 15) fail(site, text("barrier: id must lie in [0, 15], got ", id));
  if (threads <= 0 || (threads % 32 != 0 && threads != static_cast<int>(block.threads.size())))
    fail(site, text("barrier ", id, ": threads must be a multiple of 32, got ", threads));
  NamedBarrier& barrier = block.barriers[id];
  if (barrier.arrived > 0 && barrier.expected != threads)
    fail(site, text("barrier ", id, ": others wait for ", barrier.expected, " threads (", at(barrier.site),
                    "), this one for ", threads));
  barrier.expected = threads;
  if (barrier.arrived == 0) barrier.site = site;
  if (++barrier.arrived == threads) {
    barrier.arrived = 0;
    ++grid().counters.barriers;
    wake(barrier.waiting);
  } else if (waits) {
    wait_in(barrier.waiting, id == 0 ? "__syncthreads" : "named barrier", site, {"id ", id});
  }
}

// ---- mbarriers ----

namespace {

Mbarrier& find(Block& block, uint32_t offset, const Site& site) {
  const auto found = block.mbarriers.find(offset);
  if (found == block.mbarriers.end())
    fail(site, text("mbarrier at ", offset, ": mbarrier_init has not been called"));
  return found->second;
}

uint32_t place(const void* barrier, const Site& site) {
  if (reinterpret_cast<uintptr_t>(barrier) % 8 != 0)
    fail(site, "mbarrier: the address must be a multiple of 8");
  return shared_offset(barrier, 8, site);
}

void complete_if_done(Grid& grid, Mbarrier& barrier) {
  if (barrier.pending > 0 || barrier.bytes != 0) return;
  ++barrier.completed;
  barrier.pending = barrier.arrivals;
  ++grid.counters.barriers;
  wake(barrier.waiting);
}

void arrive(Block& block, uint32_t offset, int64_t bytes, const Site& site) {
  Mbarrier& barrier = find(block, offset, site);
  if (barrier.pending == 0)
    fail(site, text("mbarrier at ", offset, ": more than its ", barrier.arrivals, " arrivals in phase ",
                    barrier.completed, ", ", barrier.bytes, " bytes still to come"));
  barrier.bytes += bytes;
  --barrier.pending;
  complete_if_done(*block.grid, barrier);
}

// TMA and other blocks see an initialised barrier only behind a fence.
void check_fenced(const Mbarrier& barrier, uint32_t offset, const Site& site) {
  if (barrier.unfenced)
    fail(site, text("mbarrier at ", offset, ": thread ", barrier.unfenced->number,
                    " has not called fence_mbarrier_init after its init at line ", barrier.line));
}

Block& other_block(unsigned rank, const char* what, const Site& site) {
  auto& cluster = grid().cluster;
  if (rank >= cluster.size())
    fail(site, text(what, ": the cluster has ", cluster.size(), " blocks, got rank ", rank));
  if (cluster[rank]->running == 0) fail(site, text(what, ": block ", rank, " of the cluster has exited"));
  return *cluster[rank];
}

}  // namespace

void mbarrier_init(void* barrier, int arrivals, const Site& site) {
  const uint32_t offset = place(barrier, site);
  if (arrivals < 1 || arrivals > (1 << 20) - 1)
    fail(site, text("mbarrier_init: arrivals must lie in [1, 1048575], got ", arrivals));
  Mbarrier fresh;
  fresh.arrivals = fresh.pending = arrivals;
  fresh.line = site.line();
  fresh.unfenced = current;
  current->block->mbarriers[offset] = fresh;
}

void fence_mbarrier_init(const Site&) {
  for (auto& [offset, barrier] : current->block->mbarriers)
    if (barrier.unfenced == current) barrier.unfenced = nullptr;
}

void mbarrier_arrive(void* barrier, int expected_bytes, const Site& site) {
  arrive(*current->block, place(barrier, site), expected_bytes, site);
}

void mbarrier_arrive_cluster(void* barrier, unsigned rank, const Site& site) {
  const uint32_t offset = place(barrier, site);
  Block& other = other_block(rank, "mbarrier_arrive_cluster", site);
  check_fenced(find(other, offset, site), offset, site);
  arrive(other, offset, 0, site);
}

void mbarrier_wait(void* address, unsigned parity, const Site& site) {
  const uint32_t offset = place(address, site);
  if (parity > 1) fail(site, text("mbarrier_wait: parity must be 0 or 1, got ", parity));
  Mbarrier& barrier = find(*current->block, offset, site);
  // The phase that this parity names: the last completed, or the one under way.
  const bool passes = (barrier.completed & 1) != static_cast<int64_t>(parity);
  const int64_t phase = passes ? barrier.completed - 1 : barrier.completed;
  const auto [seen, is_first] = current->awaited.try_emplace(&barrier, phase);
  if (!is_first && seen->second >= phase)
    fail(site,
         text("wrong phase: this thread has waited for phase ", seen->second, " of the mbarrier at ", offset,
              " before, parity ", parity, " names it again; the barrier is in phase ", barrier.completed));
  seen->second = phase;
  if (passes) return;
  wait_in(barrier.waiting, "mbarrier_wait", site, {"mbarrier at ", offset, parity});
  if (barrier.completed > phase + 1)
    fail(site, text("wrong phase: the mbarrier at ", offset, " has completed phase ", barrier.completed - 1,
                    " before this thread, waiting for ", phase, ", could see it"));
}

// ---- clusters and dependent launches ----

unsigned cluster_rank(const Site&) { return current->block->rank; }

void cluster_arrive(const Site& site) {
  Grid& g = grid();
  if (current->cluster_phase == g.cluster_completed)
    fail(site, "cluster_arrive: this thread has arrived before, without cluster_wait");
  current->cluster_phase = g.cluster_completed;
  if (++g.cluster_arrived < static_cast<int>(g.cluster.size() * g.cluster.front()->threads.size())) return;
  g.cluster_arrived = 0;
  ++g.cluster_completed;
  ++g.counters.barriers;
  wake(g.cluster_waiting);
}

void cluster_wait(const Site& site) {
  if (current->cluster_phase < 0) fail(site, "cluster_wait: cluster_arrive comes first");
  if (current->cluster_phase == grid().cluster_completed)
    wait_in(grid().cluster_waiting, "cluster_wait", site);
}

void grid_dependency_wait(const Site& site) {
  current->waited_for_grid = true;
  if (!grid().released) wait_in(grid().grid_waiting, "grid_dependency_wait", site);
}

void grid_launch_dependents(const Site&) {}

void set_registers(int count, const Site& site) {
  if (count % 8 != 0 || count < 24 || count > 256)
    fail(site, text("registers must be a multiple of 8 in [24, 256], got ", count));
  meet(~0u, "setmaxnreg", site, nullptr, [&](auto&) { warp().registers = count; });
}

// ---- cp.async ----

// From the request until the wait the bytes are on their way: poison to whoever reads them, and read from
// global memory only at the wait, as late as it can be.
void cp_async_16(void* shared, const void* global, int bytes, const Site& site) {
  Block& block = *current->block;
  if (bytes < 0 || bytes > 16) fail(site, text("cp.async: bytes must lie in [0, 16], got ", bytes));
  if (reinterpret_cast<uintptr_t>(shared) % 16 != 0)
    fail(site, "cp.async: the shared address must be a multiple of 16");
  if (bytes > 0 && reinterpret_cast<uintptr_t>(global) % 16 != 0)
    fail(site, "cp.async: the global address must be a multiple of 16");
  const uint32_t to = shared_offset(shared, 16, site);
  if (block.cells[to / 4].kind == Cell::kFlying)
    fail(site, text("cp.async: the copy of line ", block.cells[to / 4].line,
                    " to the same place is still on its way"));
  count_shared(to, 16, site, __builtin_return_address(0));
  if (bytes > 0) count_global(grid(), global, static_cast<size_t>(bytes), false);
  ++grid().counters.cp_async;
  poison(block, to, 16);
  mark(block, to, 16, {Cell::kFlying, 0, static_cast<uint16_t>(current->number), site.line()});
  current->open_copies.push_back({to, global, bytes, site});
}

void cp_async_commit(const Site&) { current->copies.push_back(std::exchange(current->open_copies, {})); }

void cp_async_wait(int pending, const Site&) {
  Block& block = *current->block;
  while (static_cast<int>(current->copies.size()) > pending) {
    for (const Copy& copy : current->copies.front()) {
      std::memset(block.shared + copy.to, 0, 16);
      if (copy.bytes > 0) std::memcpy(block.shared + copy.to, copy.from, static_cast<size_t>(copy.bytes));
      mark(block, copy.to, 16, {Cell::kDirty, 0, static_cast<uint16_t>(current->number), copy.site.line()});
      current->dirty.push_back({copy.to, copy.to + 16});
    }
    current->copies.pop_front();
  }
}

// ---- TMA ----

namespace {

// What a TensorMap holds here.
struct Encoded {
  uint64_t magic;
  const unsigned char* data;
  uint64_t size[3], stride[3];  // elements; bytes, the first is an element's
  uint32_t box[3];
  int32_t rank;
  uint32_t swizzle;
};
static_assert(sizeof(Encoded) <= sizeof(TensorMap));
constexpr uint64_t kMagic = 0x666c657874726f6e;
constexpr uint64_t kElement = 2;  // bytes

uint32_t box_bytes(const Encoded& map) { return kElement * map.box[0] * map.box[1] * map.box[2]; }

Encoded decode(const TensorMap* map, const Site& site) {
  if (reinterpret_cast<uintptr_t>(map) % 64 != 0)
    fail(site, "tensor map: the address must be a multiple of 64");
  Encoded encoded;
  std::memcpy(&encoded, map, sizeof(encoded));
  if (encoded.magic != kMagic) fail(site, "tensor map: not one that make_tensor_map made");
  return encoded;
}

struct Box {
  Encoded map;
  int64_t at[3];
};

Box box_at(const TensorMap* map, std::initializer_list<int> at, const Site& site) {
  Box box{decode(map, site), {0, 0, 0}};
  if (static_cast<int>(at.size()) != box.map.rank)
    fail(site,
         text("tensor map: rank is ", box.map.rank, ", the instruction has ", at.size(), " coordinates"));
  std::copy(at.begin(), at.end(), box.at);
  if (box.at[0] % 8 != 0)  // seen on an H200: an illegal instruction
    fail(site,
         text("TMA: the innermost coordinate must be a multiple of 16 bytes, got ", box.at[0], " elements"));
  return box;
}

uint32_t tile_offset(const void* tile, const Encoded& map, const Site& site) {
  const uint32_t offset = shared_offset(tile, box_bytes(map), site);
  const uint32_t alignment = map.swizzle == 0 ? 128 : 8 * (swizzle_mask(Swizzle{map.swizzle}) + 16);
  if ((kSharedBase + offset) % alignment != 0)
    fail(site, text("TMA: a tile with swizzle mode ", map.swizzle, " must begin at a multiple of ", alignment,
                    " bytes of shared memory, got offset ", offset));
  return offset;
}

// Calls f(global address or null outside the tensor, offset in shared memory) for each 16 bytes of the box;
// `inside` bytes of them are in the tensor.
template <class F>
void each_piece(const Box& box, uint32_t tile, const F& f) {
  const Encoded& map = box.map;
  const uint64_t row = map.box[0] * kElement;
  for (uint32_t z = 0; z < map.box[2]; ++z)
    for (uint32_t y = 0; y < map.box[1]; ++y)
      for (uint64_t byte = 0; byte < row; byte += 16) {
        const int64_t at[3] = {box.at[0] + static_cast<int64_t>(byte / kElement), box.at[1] + y,
                               box.at[2] + z};
        const bool rows_inside = at[1] >= 0 && at[2] >= 0 && static_cast<uint64_t>(at[1]) < map.size[1] &&
                                 static_cast<uint64_t>(at[2]) < map.size[2];
        const int64_t first = std::max<int64_t>(0, -at[0]);  // elements of the piece left of the tensor
        const int64_t last = std::min<int64_t>(8, static_cast<int64_t>(map.size[0]) - at[0]);
        const uint32_t to =
            swizzled(kSharedBase + tile + static_cast<uint32_t>((z * map.box[1] + y) * row + byte),
                     Swizzle{map.swizzle}) -
            kSharedBase;
        const bool empty = !rows_inside || first >= last;
        const unsigned char* from = empty ? nullptr
                                          : map.data + at[2] * static_cast<int64_t>(map.stride[2]) +
                                                at[1] * static_cast<int64_t>(map.stride[1]) +
                                                (at[0] + first) * static_cast<int64_t>(kElement);
        f(from, to + static_cast<uint32_t>(empty ? 0 : first * kElement), to,
          static_cast<size_t>(empty ? 0 : (last - first) * kElement));
      }
}

}  // namespace

TensorMap make_tensor_map(const void* data, int rank, const uint64_t* size, const uint64_t* stride,
                          const uint32_t* box, Swizzle swizzle) {
  Encoded map{kMagic, static_cast<const unsigned char*>(data), {1, 1, 1}, {kElement, 0, 0}, {1, 1, 1},
              rank,   static_cast<uint32_t>(swizzle)};
  for (int i = 0; i < rank; ++i) {
    map.size[i] = size[i];
    map.box[i] = box[i];
    if (i > 0) map.stride[i] = stride[i - 1];
  }
  TensorMap result{};
  std::memcpy(&result, &map, sizeof(map));
  return result;
}

void check_tensor_map(const TensorMap* map, const Site& site) { decode(map, site); }

void tma_load(void* tile, const TensorMap* map, void* barrier, std::initializer_list<int> at_,
              uint16_t blocks, const Site& site) {
  const Box box = box_at(map, at_, site);
  const uint32_t offset = tile_offset(tile, box.map, site), barrier_offset = place(barrier, site);
  std::vector<Block*> targets;
  if (blocks == 0) targets.push_back(current->block);
  for (unsigned rank = 0; rank < 16; ++rank)
    if (blocks >> rank & 1) targets.push_back(&other_block(rank, "multicast", site));
  for (Block* target : targets) {
    check_fenced(find(*target, barrier_offset, site), barrier_offset, site);
    for (uint32_t i = offset / 4; i < (offset + box_bytes(box.map)) / 4; ++i) {
      const Cell& cell = target->cells[i];
      if (cell.kind == Cell::kFlying)
        fail(site, text("the copy of line ", cell.line, " to offset ", 4 * i, " is still on its way"));
      if (cell.kind == Cell::kDirty)
        fail(site, text("shared memory at offset ", 4 * i, " was written at line ", cell.line, " by thread ",
                        cell.writer, ", which has not called fence_proxy_async since"));
    }
    poison(*target, offset, box_bytes(box.map));
    mark(*target, offset, box_bytes(box.map),
         {Cell::kFlying, 0, static_cast<uint16_t>(current->number), site.line()});
  }
  Grid& g = grid();
  ++g.counters.tma_loads;
  const auto land = [=, &g] {
    each_piece(box, offset, [&](const unsigned char* from, uint32_t to, uint32_t piece, size_t bytes) {
      if (bytes > 0) count_global(g, from, bytes, false);
      for (Block* target : targets) {
        std::memset(target->shared + piece, 0, 16);
        if (bytes > 0) std::memcpy(target->shared + to, from, bytes);
      }
    });
    for (Block* target : targets) {
      mark(*target, offset, box_bytes(box.map),
           {Cell::kLanded, static_cast<uint8_t>(box.map.swizzle), 0, site.line()});
      Mbarrier& landed = target->mbarriers.at(barrier_offset);
      landed.bytes -= box_bytes(box.map);
      complete_if_done(g, landed);
    }
  };
  g.flights.push_back({land, current, g.next_flight++, targets, site});
}

void tma_store(const TensorMap* map, const void* tile, std::initializer_list<int> at_, const Site& site) {
  const Box box = box_at(map, at_, site);
  for (const int64_t at : box.at)
    if (at < 0)  // seen on an H200: an illegal instruction, where a load reads zeros
      fail(site, text("TMA: a store's coordinates must not be negative, got ", at));
  Block& block = *current->block;
  const uint32_t offset = tile_offset(tile, box.map, site), size = box_bytes(box.map);
  check_async_read(block, offset, size, site);
  const std::vector<unsigned char> held(block.shared + offset, block.shared + offset + size);
  Grid& g = grid();
  ++g.counters.tma_stores;
  const auto land = [=, &g, &block] {
    if (std::memcmp(held.data(), block.shared + offset, size) != 0)
      fail(site, "shared memory was overwritten while TMA was reading it");
    each_piece(box, offset, [&](const unsigned char* to, uint32_t from, uint32_t, size_t bytes) {
      if (bytes == 0) return;
      count_global(g, to, bytes, true);
      std::memcpy(const_cast<unsigned char*>(to), block.shared + from, bytes);
    });
  };
  current->open_stores.push_back(g.next_flight);
  g.flights.push_back({land, current, g.next_flight++, {}, site});
}

void tma_store_commit(const Site&) { current->stores.push_back(std::exchange(current->open_stores, {})); }

void tma_store_wait(int pending, const Site&) {
  Grid& g = grid();
  while (static_cast<int>(current->stores.size()) > pending) {
    for (const int64_t number : current->stores.front())
      for (size_t i = 0; i < g.flights.size(); ++i)
        if (g.flights[i].number == number) {
          land(g, i);
          break;
        }
    current->stores.pop_front();
  }
}

void land(Grid& grid, size_t i) {
  const Flight flight = std::move(grid.flights[i]);
  grid.flights.erase(grid.flights.begin() + static_cast<long>(i));
  flight.land();
}

void check_nothing_flies(Thread& thread) {
  for (const auto& group : thread.copies)
    if (!group.empty()) fail(group.front().site, "the thread ends before cp_async_wait for this copy");
  if (!thread.open_copies.empty())
    fail(thread.open_copies.front().site, "the thread ends before cp_async_commit");
  for (const Flight& flight : thread.block->grid->flights)
    if (flight.into.empty() && flight.thread == &thread)
      fail(flight.site, "the thread ends before tma_store_wait_read for this store");
  // A load that lands in shared memory its block has given back.
  if (thread.block->running > 1) return;
  for (const Flight& flight : thread.block->grid->flights)
    if (std::find(flight.into.begin(), flight.into.end(), thread.block) != flight.into.end())
      fail(flight.site, "the block ends while this copy is on its way to its shared memory");
}

}  // namespace flextron::emulator
