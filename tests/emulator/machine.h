// Inside the emulator: a grid's blocks one after another (a cluster's together), their threads as fibers, one
// running at a time; what each waits for; what every byte of shared memory holds.
#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "emulator/emulator.h"

namespace flextron::emulator {

struct Block;
struct Grid;
struct Thread;
using Queue = std::vector<Thread*>;  // threads that wait for one thing

// ---- shared memory ----

constexpr size_t kSharedLimit = 227 * 1024;  // bytes a block may have, sm_90
constexpr uint32_t kSharedBase = 1024;   // the address of the first; the emulator's choice, like the driver's
constexpr unsigned char kPoison = 0xff;  // NaN in every floating type, -1 in every integer

// What is known of four bytes of shared memory.
struct Cell {
  enum Kind : uint8_t {
    kUnknown,  // poison, or written by plain C++
    kDirty,    // written through a word by `writer`, not yet ordered towards the asynchronous proxy
    kOrdered,  // the same, and fenced by its writer
    kFlying,   // an asynchronous copy will land here
    kLanded,   // written by TMA, with `swizzle`
  };
  Kind kind = kUnknown;
  uint8_t swizzle = 0;
  uint16_t writer = 0;
  uint32_t line = 0;  // of the word
};

struct SharedRange {
  uint32_t begin, end;  // offsets
};

// ---- waiting ----

// Lanes of one warp at one collective instruction.
struct Meeting {
  uint32_t mask = 0, arrived = 0;
  const char* what = "";
  Site site;
  std::array<void*, 32> arguments{};
  Queue waiting;
};

struct NamedBarrier {
  int expected = 0, arrived = 0;
  Site site;
  Queue waiting;
};

struct Mbarrier {
  int arrivals = 0, pending = 0;     // of the phase under way
  int64_t bytes = 0;                 // expected and not yet landed
  int64_t completed = 0;             // phases
  uint32_t line = 0;                 // of its init
  const Thread* unfenced = nullptr;  // who initialised it and has not called fence_mbarrier_init since
  Queue waiting;
};

// ---- matrix instructions under way ----

struct Accumulators {        // of one warp, while wgmmas on them are under way
  int N = 0, users = 0;      // wgmmas not yet waited for
  std::vector<float> value;  // [32][N / 2]: what the registers will hold
  std::array<float*, 32> registers{};
};

struct WarpMatrix {             // one warp's part of a wgmma
  std::vector<uint32_t> reads;  // offsets of the 16-byte pieces it reads, and what they held
  std::vector<unsigned char> bytes;
  std::vector<uint32_t> a_values;  // [32][4] where A is in registers, and where those are
  std::array<const uint32_t*, 32> a_registers{};
  float* accumulators = nullptr;  // lane 0's, which name them
  Site site;
};

struct Issue {  // one wgmma: its place, shape and operands
  Site site;
  int N;
  uint64_t a, b;
  int accumulate;

  bool operator==(const Issue& other) const {
    return site.line() == other.site.line() && N == other.N && a == other.a && b == other.b &&
           accumulate == other.accumulate;
  }
  std::string text() const;
};

struct Warp {
  std::vector<Meeting> meetings;
  std::vector<WarpMatrix> open;                // wgmmas since the last commit
  std::deque<std::vector<WarpMatrix>> groups;  // committed, oldest first
  std::map<float*, Accumulators> accumulators;
  bool fenced = false;        // wgmma_fence since registers were last the thread's own
  std::vector<Issue> issued;  // to compare with the warpgroup's other warps
  int registers = 0;          // set_registers; 0: as launched
  struct Access {             // one execution of a word by the warp
    size_t bytes = 0;
    std::vector<std::pair<int, uint32_t>> lanes;  // lane, offset
  };
  std::map<std::pair<uint64_t, uint32_t>, Access> accesses;  // by site and how often each lane has been there
};

// ---- threads ----

struct Fiber {
  void* stack_pointer = nullptr;
  unsigned char* stack = nullptr;
  void* fake_stack = nullptr;  // AddressSanitizer's
};

struct Copy {  // one cp.async
  uint32_t to;
  const void* from;
  int bytes;
  Site site;
};

struct Flight {  // a bulk copy that the engine has been asked for
  std::function<void()> land;
  Thread* thread;
  int64_t number;            // of the grid's flights
  std::vector<Block*> into;  // whose shared memory; empty for a store
  Site site;
};

struct Detail {  // of what a thread waits for, in words only where a report asks: threads wait often
  const char* name = nullptr;
  int64_t number = 0, parity = -1;

  std::string text() const;
};

struct Thread {
  enum State { kReady, kWaiting, kDone };
  Fiber fiber;
  Block* block = nullptr;
  uint3 index{};
  int number = 0, lane = 0, warp = 0;
  State state = kReady;
  const char* what = "";  // it waits for
  Detail detail;
  Site site;
  std::deque<std::vector<Copy>> copies;  // cp.async groups, oldest first
  std::vector<Copy> open_copies;
  std::deque<std::vector<int64_t>> stores;  // flights of bulk store groups
  std::vector<int64_t> open_stores;
  std::vector<SharedRange> dirty;                        // what fence_proxy_async will order
  std::unordered_map<const Mbarrier*, int64_t> awaited;  // phases
  std::unordered_map<uint64_t, uint32_t> visits;         // of sites that touch shared memory
  int64_t cluster_phase = -1;                            // that it has arrived for
  bool waited_for_grid = false;
};

struct Block {
  Grid* grid = nullptr;
  uint3 index{};
  unsigned rank = 0;  // in its cluster
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<Warp> warps;
  int running = 0;  // threads
  unsigned char* shared = nullptr;
  std::vector<Cell> cells;
  std::vector<SharedRange> ranges;  // what may be touched
  std::map<const void*, uint32_t> statics;
  uint32_t shared_end = 0;
  std::array<NamedBarrier, 16> barriers;
  std::map<uint32_t, Mbarrier> mbarriers;
};

struct Counters {
  std::string name;
  int64_t blocks = 0, bytes_read = 0, bytes_written = 0;
  int64_t shared_accesses = 0, bank_conflicts = 0;  // wavefronts needed at least, and beyond that
  int64_t mma = 0, wgmma = 0, flops = 0;  // tensor-core instructions (a warp's, a warpgroup's quarter)
  int64_t barriers = 0;                   // completions, of every kind
  int64_t cp_async = 0, tma_loads = 0, tma_stores = 0;
  std::map<std::string, std::pair<int64_t, int64_t>> watched;  // bytes read, written
};

struct Grid {
  std::string name;
  Launch config;
  std::function<void()> kernel;
  Counters counters;
  std::vector<unsigned> order;                  // clusters still to run, last first
  std::vector<std::unique_ptr<Block>> cluster;  // the blocks that run now
  Queue ready;
  std::vector<Flight> flights;
  int64_t next_flight = 0;
  int cluster_arrived = 0;
  int64_t cluster_completed = 0;
  Queue cluster_waiting, grid_waiting;
  bool released = true;  // what grid_dependency_wait waits for has ended
};

// ---- what the parts use of each other ----

extern Thread* current;  // the running one; null on the host

std::string at(const Site& site);  // "elastic_linear_cuda.cu:57"
[[noreturn]] void fail(const Site& site, const std::string& message);
template <class... Parts>
std::string text(const Parts&... parts) {
  std::string result;
  const auto add = [&](const auto& part) {
    if constexpr (std::is_convertible_v<decltype(part), std::string>)
      result += part;
    else
      result += std::to_string(part);
  };
  (add(parts), ...);
  return result;
}

void wait_in(Queue& queue, const char* what, const Site& site, const Detail& detail = {});
void wake(Queue& queue);
// Lanes of `mask` meet: true for the last to come, who gets the meeting and must wake the others.
bool arrive(uint32_t mask, const char* what, const Site& site, void* argument, Meeting& whole);
// The last calls act with every lane's argument, then all go on.
template <class F>
void meet(uint32_t mask, const char* what, const Site& site, void* argument, const F& act) {
  Meeting whole;
  if (!arrive(mask, what, site, argument, whole)) return;
  act(whole.arguments);
  wake(whole.waiting);
}

inline Grid& grid() { return *current->block->grid; }
inline Warp& warp() { return current->block->warps[current->warp]; }
inline std::mt19937_64& draw() {
  static std::mt19937_64 engine;
  return engine;
}

// Offset of an address in the running block's shared memory; an error where [address, +bytes) is not all
// inside.
uint32_t shared_offset(const void* address, size_t bytes, const Site& site);
void count_global(Grid& grid, const void* address, size_t bytes, bool writes);
// For the bank conflicts. `code`: where the kernel's code goes on, which tells inlined copies of a site
// apart.
void count_shared(uint32_t offset, size_t bytes, const Site& site, const void* code = nullptr);
extern bool counts_banks;  // whether it does
void count_banks(Counters& counters, const Warp::Access& access);
void finish_accesses(Block& block);
void mark(Block& block, uint32_t offset, size_t bytes, Cell cell);
// An error unless what wgmma or TMA is about to read was written for it.
void check_async_read(Block& block, uint32_t offset, size_t bytes, const Site& site, int swizzle = -1);
void poison(Block& block, uint32_t offset, size_t bytes);

void land(Grid& grid, size_t flight);  // and forget it
void check_nothing_flies(Thread& thread);
void check_matrices(Block& block);

}  // namespace flextron::emulator
