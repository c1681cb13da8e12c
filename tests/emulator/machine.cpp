// Fibers, the order they run in, what they wait for, and launches.
#include "emulator/machine.h"

#include <sys/mman.h>

#include <mutex>
#include <stdexcept>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace flextron::emulator {

Thread* current = nullptr;

namespace {

// ---- switching ----

constexpr size_t kStack = 256 * 1024;

void run_thread();

#ifdef __x86_64__
// Saves what a function must preserve, changes the stack, and takes up what was saved there: a few ns.
asm(R"(
.text
.hidden flextron_switch
.globl flextron_switch
flextron_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
)");
extern "C" void flextron_switch(void** save, void* to);

void switch_stacks(Fiber& from, Fiber& to) { flextron_switch(&from.stack_pointer, to.stack_pointer); }

void prepare(Fiber& fiber) {
  auto** top = reinterpret_cast<void**>(fiber.stack + kStack);
  *--top = nullptr;  // a call leaves the stack 8 bytes off a multiple of 16
  *--top = reinterpret_cast<void*>(&run_thread);
  for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
  fiber.stack_pointer = top;
}
#else
// Other processors: the C library's contexts, slower by their signal masks.
ucontext_t& context_of(Fiber& fiber) {
  if (!fiber.stack_pointer) fiber.stack_pointer = new ucontext_t;
  return *static_cast<ucontext_t*>(fiber.stack_pointer);
}
void switch_stacks(Fiber& from, Fiber& to) { swapcontext(&context_of(from), &context_of(to)); }
void prepare(Fiber& fiber) {
  ucontext_t& context = context_of(fiber);
  getcontext(&context);
  context.uc_stack.ss_sp = fiber.stack;
  context.uc_stack.ss_size = kStack;
  context.uc_link = nullptr;
  makecontext(&context, run_thread, 0);
}
#endif

Fiber host;  // the stack that launches and schedules
#ifdef __SANITIZE_ADDRESS__
const void* host_stack = nullptr;
size_t host_stack_size = 0;
#endif

void enter(Fiber& fiber) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&host.fake_stack, fiber.stack, kStack);
#endif
  switch_stacks(host, fiber);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(host.fake_stack, nullptr, nullptr);
#endif
}

void leave(Fiber& fiber, [[maybe_unused]] bool for_good) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(for_good ? nullptr : &fiber.fake_stack, host_stack, host_stack_size);
#endif
  switch_stacks(fiber, host);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fiber.fake_stack, &host_stack, &host_stack_size);
#endif
}

// Stacks are kept: a launch makes thousands of threads.
std::vector<unsigned char*> free_stacks;

unsigned char* take_stack() {
  if (free_stacks.empty()) {
    void* memory =
        mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::runtime_error("emulator: no memory for a thread's stack");
    return static_cast<unsigned char*>(memory);
  }
  unsigned char* stack = free_stacks.back();
  free_stacks.pop_back();
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(stack, kStack);  // a thread may have been abandoned on it
#endif
  return stack;
}

// ---- what goes on ----

enum class Order { kForward, kRandom, kAhead, kBehind };

struct Machine {
  std::mutex mutex;
  Order order = Order::kForward;
  uint64_t seed = 0;
  int favoured = 0;  // the warp that runs ahead or behind, modulo the warps there are
  std::deque<std::unique_ptr<Grid>> stream;
  std::string error;
  std::vector<Counters> done;
  std::vector<std::pair<std::string, std::pair<const unsigned char*, size_t>>> watches;
};
Machine machine;

std::string triple(const uint3& v) { return text("(", v.x, ", ", v.y, ", ", v.z, ")"); }

void run_thread() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &host_stack, &host_stack_size);
#endif
  Thread& thread = *current;
  thread.block->grid->kernel();
  check_nothing_flies(thread);
  for (const Meeting& meeting : warp().meetings)
    if (meeting.mask >> thread.lane & 1)
      fail(meeting.site, text("divergent ", meeting.what, ": lane ", thread.lane, " of the mask exits"));
  thread.state = Thread::kDone;
  --thread.block->running;
  leave(thread.fiber, true);
}

// ---- the choice of who runs next ----

size_t pick(Grid& grid) {
  const size_t count = grid.ready.size();
  if (machine.order == Order::kForward) return 0;
  if (machine.order == Order::kRandom) return draw()() % count;
  const int warps = static_cast<int>(grid.cluster.front()->warps.size());
  const bool wanted = machine.order == Order::kAhead;
  for (size_t i = 0; i < count; ++i)
    if ((grid.ready[i]->warp == machine.favoured % warps) == wanted) return i;
  return 0;
}

// Lets asynchronous copies land; returns whether one did. `idle`: no thread can run.
bool land_some(Grid& grid, bool idle) {
  if (grid.flights.empty()) return false;
  const bool now = idle || machine.order == Order::kForward || machine.order == Order::kBehind ||
                   (machine.order == Order::kRandom && draw()() % 64 == 0);
  if (!now) return false;
  land(grid, machine.order == Order::kForward ? 0 : draw()() % grid.flights.size());
  return true;
}

}  // namespace

std::string Detail::text() const {
  if (!name) return "";
  return emulator::text(", ", name, number, parity < 0 ? "" : emulator::text(", parity ", parity));
}

namespace {

std::string deadlock(Grid& grid) {
  std::string report = "every thread waits";
  for (const auto& block : grid.cluster) {
    struct Group {
      std::string who;
      int count = 0;
    };
    std::map<std::string, Group> groups;
    for (const auto& thread : block->threads) {
      if (thread->state == Thread::kDone) continue;
      Group& group = groups[text(thread->what, " at ", at(thread->site), thread->detail.text())];
      if (group.count++ < 4) group.who += text(group.who.empty() ? "" : ", ", thread->number);
    }
    report += text("\n  block ", triple(block->index), ", ", block->running, " of ", block->threads.size(),
                   " threads still running");
    for (const auto& [what, group] : groups)
      report += text("\n    ", group.count, " in ", what, " (threads ", group.who,
                     group.count > 4 ? ", ..." : "", ")");
    for (const auto& [offset, barrier] : block->mbarriers)
      report += text("\n    mbarrier at ", offset, " (init at line ", barrier.line, "): phase ",
                     barrier.completed, ", ", barrier.pending, " of ", barrier.arrivals, " arrivals and ",
                     barrier.bytes, " bytes to come");
    for (size_t id = 0; id < block->barriers.size(); ++id)
      if (const NamedBarrier& barrier = block->barriers[id]; barrier.arrived > 0)
        report +=
            text("\n    barrier ", id, ": ", barrier.arrived, " of ", barrier.expected, " threads arrived");
    for (size_t w = 0; w < block->warps.size(); ++w)
      for (const Meeting& meeting : block->warps[w].meetings)
        report += text("\n    warp ", w, ", ", meeting.what, " at ", at(meeting.site), ": ",
                       __builtin_popcount(meeting.arrived), " of ", __builtin_popcount(meeting.mask),
                       " lanes arrived");
  }
  return report;
}

// ---- a grid ----

struct Free {
  void operator()(unsigned char* memory) const { std::free(memory); }
};
std::vector<std::unique_ptr<unsigned char, Free>> free_shared;  // kept from block to block

unsigned char* take_shared() {
  if (free_shared.empty()) return static_cast<unsigned char*>(std::aligned_alloc(1024, kSharedLimit));
  unsigned char* shared = free_shared.back().release();
  free_shared.pop_back();
  return shared;
}

void add_shared(Block& block, uint32_t begin, uint32_t end) {
  block.ranges.push_back({begin, end});
  block.shared_end = end;
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(block.shared + begin, end - begin);
#endif
  poison(block, begin, end - begin);
  block.cells.resize((end + 3) / 4);
}

std::unique_ptr<Block> make_block(Grid& grid, unsigned number, unsigned rank) {
  auto block = std::make_unique<Block>();
  const dim3 grid_size = grid.config.grid, size = grid.config.block;
  block->grid = &grid;
  block->rank = rank;
  block->index = {number % grid_size.x, number / grid_size.x % grid_size.y,
                  number / grid_size.x / grid_size.y};
  block->shared = take_shared();
#ifdef __SANITIZE_ADDRESS__
  __asan_poison_memory_region(block->shared, kSharedLimit);
#endif
  add_shared(*block, 0, static_cast<uint32_t>(grid.config.dynamic_shared));
  const int threads = static_cast<int>(size.x * size.y * size.z);
  block->warps.resize((threads + 31) / 32);
  block->running = threads;
  for (int t = 0; t < threads; ++t) {
    auto thread = std::make_unique<Thread>();
    const auto u = static_cast<unsigned>(t);
    thread->block = block.get();
    thread->index = {u % size.x, u / size.x % size.y, u / size.x / size.y};
    thread->number = t;
    thread->lane = t % 32;
    thread->warp = t / 32;
    thread->fiber.stack = take_stack();
    prepare(thread->fiber);
    grid.ready.push_back(thread.get());
    block->threads.push_back(std::move(thread));
  }
  ++grid.counters.blocks;
  return block;
}

void start_cluster(Grid& grid) {
  const unsigned first = grid.order.back() * grid.config.cluster;
  grid.order.pop_back();
  for (unsigned rank = 0; rank < grid.config.cluster; ++rank)
    grid.cluster.push_back(make_block(grid, first + rank, rank));
}

void end_cluster(Grid& grid) {
  for (const auto& block : grid.cluster) {
    for (const auto& thread : block->threads) {
      free_stacks.push_back(thread->fiber.stack);
#ifndef __x86_64__
      delete static_cast<ucontext_t*>(thread->fiber.stack_pointer);
#endif
    }
    free_shared.emplace_back(block->shared);
    finish_accesses(*block);
  }
  grid.cluster.clear();
  grid.ready.clear();
  grid.flights.clear();
}

void check_block_end(Block& block) {
  check_matrices(block);
  // What the block was launched with is all it can hand round.
  const int threads = static_cast<int>(block.threads.size());
  const int launched = std::min(65536 / threads / 8 * 8, 248);
  int registers = 0;
  bool asked = false;
  for (const Warp& warp : block.warps) {
    registers += 32 * (warp.registers ? warp.registers : launched);
    asked |= warp.registers != 0;
  }
  if (asked && registers > threads * launched)
    throw std::runtime_error(text("emulator: ", block.grid->name, ": warpgroups ask for ", registers,
                                  " registers in all, the block was launched with ", threads * launched));
  if (block.grid->config.programmatic) {
    bool waited = false;
    for (const auto& thread : block.threads) waited |= thread->waited_for_grid;
    if (!waited)
      throw std::runtime_error(text("emulator: ", block.grid->name, ", block ", triple(block.index),
                                    ": no thread has called grid_dependency_wait in a programmatic launch"));
  }
}

// Runs the present cluster until it ends, or until no thread of it can run and the grid is held back.
void run_cluster(Grid& grid) {
  const bool shuffled = machine.order != Order::kForward;
  if (shuffled && !grid.ready.empty()) std::shuffle(grid.ready.begin(), grid.ready.end(), draw());
  while (machine.error.empty()) {
    const bool idle = grid.ready.empty();
    if (land_some(grid, idle)) continue;
    if (idle) {
      bool running = false;
      for (const auto& block : grid.cluster) running |= block->running > 0;
      if (!running) break;
      if (!grid.released && !grid.grid_waiting.empty()) return;
      throw std::runtime_error(text("emulator: ", grid.name, ": ", deadlock(grid)));
    }
    const size_t i = pick(grid);
    current = grid.ready[i];
    if (machine.order == Order::kForward) {
      grid.ready.erase(grid.ready.begin());
    } else {
      grid.ready[i] = grid.ready.back();
      grid.ready.pop_back();
    }
    enter(current->fiber);
    current = nullptr;
  }
  if (!machine.error.empty()) throw std::runtime_error(std::exchange(machine.error, ""));
  for (const auto& block : grid.cluster) check_block_end(*block);
  end_cluster(grid);
}

// Runs the first cluster as far as it comes without what the launch ahead writes.
void run_early(Grid& grid) {
  grid.released = false;
  start_cluster(grid);
  run_cluster(grid);
}

void run_grid(Grid& grid) {
  grid.released = true;
  wake(grid.grid_waiting);
  if (!grid.cluster.empty()) run_cluster(grid);
  while (!grid.order.empty()) {
    start_cluster(grid);
    run_cluster(grid);
  }
}

}  // namespace

// ---- for the other parts ----

std::string at(const Site& site) {
  const std::string file = site.file_name();
  return text(file.substr(file.rfind('/') + 1), ":", site.line());
}

void fail(const Site& site, const std::string& message) {
  if (!current) throw std::runtime_error(text("emulator: ", at(site), ": ", message));
  machine.error = text("emulator: ", grid().name, ", block ", triple(current->block->index), ", thread ",
                       triple(current->index), ", ", at(site), ": ", message);
  leave(current->fiber, true);
  __builtin_unreachable();
}

void wait_in(Queue& queue, const char* what, const Site& site, const Detail& detail) {
  Thread& thread = *current;
  queue.push_back(&thread);
  thread.state = Thread::kWaiting;
  thread.what = what;
  thread.site = site;
  thread.detail = detail;
  leave(thread.fiber, false);
}

void wake(Queue& queue) {
  for (Thread* thread : queue) {
    thread->state = Thread::kReady;
    thread->block->grid->ready.push_back(thread);
  }
  queue.clear();
}

bool arrive(uint32_t mask, const char* what, const Site& site, void* argument, Meeting& whole) {
  Warp& w = warp();
  const Thread& me = *current;
  if (!(mask >> me.lane & 1)) fail(site, text(what, ": the mask leaves out this lane, ", me.lane));
  size_t i = 0;
  while (i < w.meetings.size() && !(w.meetings[i].mask & mask)) ++i;
  if (i == w.meetings.size()) {
    const int first = me.number - me.lane;
    for (int lane = 0; lane < 32; ++lane)
      if (mask >> lane & 1 && (first + lane >= static_cast<int>(me.block->threads.size()) ||
                               me.block->threads[static_cast<size_t>(first + lane)]->state == Thread::kDone))
        fail(site, text("divergent ", what, ": lane ", lane, " of the mask has exited"));
    w.meetings.push_back({.mask = mask, .what = what, .site = site, .arguments = {}, .waiting = {}});
  }
  Meeting& meeting = w.meetings[i];
  const auto equal = [](const char* a, const char* b) { return a == b || std::strcmp(a, b) == 0; };
  const bool same = meeting.mask == mask && equal(meeting.what, what) && meeting.site.line() == site.line() &&
                    equal(meeting.site.file_name(), site.file_name());
  if (!same)
    fail(site, text("divergent ", what, ": the warp's other lanes are in ", meeting.what, " at ",
                    at(meeting.site)));
  meeting.arrived |= 1u << me.lane;
  meeting.arguments[static_cast<size_t>(me.lane)] = argument;
  if (meeting.arrived != mask) {
    wait_in(meeting.waiting, what, site);
    return false;
  }
  whole = std::move(meeting);
  w.meetings.erase(w.meetings.begin() + static_cast<long>(i));
  return true;
}

void count_global(Grid& grid, const void* address, size_t bytes, bool writes) {
  Counters& c = grid.counters;
  (writes ? c.bytes_written : c.bytes_read) += static_cast<int64_t>(bytes);
  const auto* begin = static_cast<const unsigned char*>(address);
  for (const auto& [name, range] : machine.watches)
    if (begin >= range.first && begin < range.first + range.second) {
      auto& [read, written] = c.watched[name];
      (writes ? written : read) += static_cast<int64_t>(bytes);
    }
}

// ---- the language ----

uint3 thread_index() { return current->index; }
uint3 block_index() { return current->block->index; }
dim3 block_size() { return grid().config.block; }
dim3 grid_size() { return grid().config.grid; }

void sync_warp(uint32_t mask, const Site& site) {
  meet(mask, "__syncwarp", site, nullptr, [](auto&) {});
}

uint64_t shuffle(uint32_t mask, uint64_t bits, Shuffle kind, int argument, int width, const Site& site) {
  struct Lane {
    uint64_t bits, result;
    int source;
  };
  const int lane = current->lane, base = lane / width * width, inside = lane - base;
  int source = lane;
  if (kind == Shuffle::kIndex) source = base + argument % width;
  if (kind == Shuffle::kUp && inside - argument >= 0) source = lane - argument;
  if (kind == Shuffle::kDown && inside + argument < width) source = lane + argument;
  if (kind == Shuffle::kXor && (lane ^ argument) < base + width) source = lane ^ argument;
  if (!(mask >> source & 1))
    fail(site, text("shuffle: lane ", source, ", which is read, is not in the mask"));
  Lane mine{bits, 0, source};
  meet(mask, "shuffle", site, &mine, [](std::array<void*, 32>& lanes) {
    for (void* each : lanes)
      if (auto* to = static_cast<Lane*>(each)) to->result = static_cast<Lane*>(lanes[to->source])->bits;
  });
  return mine.result;
}

uint32_t ballot(uint32_t mask, bool predicate, const Site& site) {
  struct Lane {
    bool predicate;
    uint32_t result;
  } mine{predicate, 0};
  meet(mask, "vote", site, &mine, [](std::array<void*, 32>& lanes) {
    uint32_t votes = 0;
    for (int lane = 0; lane < 32; ++lane)
      if (lanes[lane] && static_cast<Lane*>(lanes[lane])->predicate) votes |= 1u << lane;
    for (void* each : lanes)
      if (each) static_cast<Lane*>(each)->result = votes;
  });
  return mine.result;
}

void sync_threads(const Site& site) {
  const Block& block = *current->block;
  const int threads = static_cast<int>(block.threads.size());
  if (block.running != threads)
    fail(site, text("__syncthreads: ", threads - block.running, " of the block's threads have exited"));
  const NamedBarrier& barrier = block.barriers[0];
  if (barrier.arrived > 0 && barrier.site.line() != site.line())
    fail(site, text("divergent: other threads are in __syncthreads at ", at(barrier.site)));
  named_barrier(0, threads, true, site);
}

void Index::out_of_range(int count) const {
  fail(site, text("register array: index must lie in [0, ", count, "), got ", value));
}

void* dynamic_shared(size_t bytes) {
  if (bytes > grid().config.dynamic_shared)
    fail(Site::current(), text("dynamic_shared: the launch must give at least ", bytes, " bytes, got ",
                               grid().config.dynamic_shared));
  return current->block->shared;
}

void* static_shared(const void* key, size_t bytes, size_t alignment) {
  Block& block = *current->block;
  const auto [entry, is_new] = block.statics.try_emplace(key, 0);
  if (is_new) {
    // A gap behind what is there, so that running over its end meets no other object.
    const auto begin = static_cast<uint32_t>((block.shared_end + 64 + alignment - 1) / alignment * alignment);
    if (begin + bytes > kSharedLimit)
      fail(Site::current(), "static_shared: a block has 227 KiB of shared memory");
    entry->second = begin;
    add_shared(block, begin, static_cast<uint32_t>(begin + bytes));
  }
  return block.shared + entry->second;
}

void* cluster_shared(void* shared, unsigned rank, const Site& site) {
  const uint32_t offset = shared_offset(shared, 1, site);
  const auto& cluster = grid().cluster;
  if (rank >= cluster.size())
    fail(site, text("cluster_shared: the cluster has ", cluster.size(), " blocks, got rank ", rank));
  if (cluster[rank]->running == 0)
    fail(site, text("cluster_shared: block ", rank, " of the cluster has exited"));
  return cluster[rank]->shared + offset;
}

// ---- launches and tests ----

std::string kernel_name(const char* pretty_function) {
  const std::string pretty =
      pretty_function;  // void flextron::launch(...) [with auto kernel = NAME; Args = {...}]
  const size_t begin = pretty.find("kernel = ");
  if (begin == std::string::npos) return pretty;
  std::string name = pretty.substr(begin + 9, pretty.find(';', begin) - begin - 9);
  for (const char* noise : {"flextron::", "{anonymous}::", "(anonymous namespace)::"})
    for (size_t i; (i = name.find(noise)) != std::string::npos;) name.erase(i, std::string(noise).size());
  return name;
}

void launch(const std::string& name, const Launch& config, std::function<void()> kernel) {
  const auto refuse = [&](const std::string& why) {
    throw std::runtime_error(text("emulator: launch of ", name, ": ", why));
  };
  const size_t threads = size_t{config.block.x} * config.block.y * config.block.z;
  const size_t blocks = size_t{config.grid.x} * config.grid.y * config.grid.z;
  if (threads == 0 || threads > 1024) refuse(text("threads in a block must lie in [1, 1024], got ", threads));
  if (blocks == 0 || config.grid.y > 65535 || config.grid.z > 65535 || config.grid.x > 0x7fffffff)
    refuse(text("grid must lie in [1, 2147483647] x [1, 65535] x [1, 65535], got ", config.grid.x, " x ",
                config.grid.y, " x ", config.grid.z));
  if (config.dynamic_shared > kSharedLimit)
    refuse(text("shared memory must be at most ", kSharedLimit, " bytes, got ", config.dynamic_shared));
  if (config.cluster == 0 || config.cluster > 8 || config.grid.x % config.cluster != 0)
    refuse(text("cluster must lie in [1, 8] and divide grid.x, ", config.grid.x, ", got ", config.cluster));
  const std::lock_guard lock(machine.mutex);
  auto grid = std::make_unique<Grid>();
  grid->name = grid->counters.name = name;
  grid->config = config;
  grid->kernel = std::move(kernel);
  grid->order.resize(blocks / config.cluster);
  for (size_t i = 0; i < grid->order.size(); ++i)
    grid->order[i] = static_cast<unsigned>(grid->order.size() - 1 - i);
  if (machine.order == Order::kRandom) std::shuffle(grid->order.begin(), grid->order.end(), draw());
  machine.stream.push_back(std::move(grid));
}

void synchronize() {
  const std::lock_guard lock(machine.mutex);
  struct Clean {
    ~Clean() {
      current = nullptr;
      for (const auto& grid : machine.stream) end_cluster(*grid);
      machine.stream.clear();
    }
  } clean;
  while (!machine.stream.empty()) {
    Grid& grid = *machine.stream.front();
    if (machine.stream.size() > 1 && machine.stream[1]->config.programmatic) run_early(*machine.stream[1]);
    run_grid(grid);
    machine.done.push_back(std::move(grid.counters));
    machine.stream.pop_front();
  }
}

void set_order(uint64_t seed, const std::string& order) {
  const std::map<std::string, Order> orders{{"forward", Order::kForward},
                                            {"random", Order::kRandom},
                                            {"ahead", Order::kAhead},
                                            {"behind", Order::kBehind}};
  const auto found = orders.find(order);
  if (found == orders.end())
    throw std::runtime_error(text("emulator: order must be forward, random, ahead or behind, got ", order));
  const std::lock_guard lock(machine.mutex);
  machine.order = found->second;
  machine.seed = seed;
  draw().seed(seed);
  machine.favoured = static_cast<int>(draw()() % 1024);
}

void watch(const std::string& name, const void* data, size_t bytes) {
  machine.watches.push_back({name, {static_cast<const unsigned char*>(data), bytes}});
}
void clear_watches() { machine.watches.clear(); }

std::string take_counters() {
  std::string json = "[";
  for (const Counters& c : std::exchange(machine.done, {})) {
    json += text(json.size() > 1 ? ", " : "", "{\"kernel\": \"", c.name, "\"");
    const std::pair<const char*, int64_t> numbers[] = {{"blocks", c.blocks},
                                                       {"bytes_read", c.bytes_read},
                                                       {"bytes_written", c.bytes_written},
                                                       {"shared_accesses", c.shared_accesses},
                                                       {"bank_conflicts", c.bank_conflicts},
                                                       {"mma", c.mma},
                                                       {"wgmma", c.wgmma},
                                                       {"flops", c.flops},
                                                       {"barriers", c.barriers},
                                                       {"cp_async", c.cp_async},
                                                       {"tma_loads", c.tma_loads},
                                                       {"tma_stores", c.tma_stores}};
    for (const auto& [name, value] : numbers) json += text(", \"", name, "\": ", value);
    json += ", \"watched\": {";
    for (const auto& [name, bytes] : c.watched)
      json += text(json.back() == '{' ? "" : ", ", "\"", name, "\": [", bytes.first, ", ", bytes.second, "]");
    json += "}}";
  }
  return json + "]";
}

}  // namespace flextron::emulator
