// Parallel loops of an op that runs many short ones: torch's threads stay together from the first to the
// last.
//
// A decode step runs five loops a layer, and each entry into torch's pool has its price. Here the pool is
// entered once: the calling thread leads, and the others wait, spinning, for the parts of its loops (a decode
// step of SmolLM2-135M on two cores takes 2 to 6 % less). Parts are claimed, not dealt out: a thread that
// comes late, or never, holds nobody up.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <thread>

namespace flextron {

// Work of fewer elementary operations (parallel_for's) than this is one thread's. On a core of an AMD EPYC
// (Zen 4) a GEMM of 1 row then takes up to 8 us where its weights are in the caches, and some 45 from memory,
// of which a core reads 12 GB/s. Where other processes have the cores, a second thread costs milliseconds: a
// loop ends when the last of its threads has had its turn.
constexpr int64_t kOneThreadsWork = int64_t{1} << 17;

class Team {
 public:
  // The one that the calling thread leads.
  static Team*& led() {
    thread_local Team* team = nullptr;
    return team;
  }

  // body() on the calling thread, whose parallel_for the other threads of the pool serve until it returns;
  // `cost` is that of all its loops together.
  template <class Body>
  static void lead(int64_t cost, const Body& body) {
    const int64_t threads = torch::stable::get_num_threads();
    if (cost < kOneThreadsWork || threads == 1 || led()) return body();
    Team team(threads);
    std::exception_ptr failed;  // torch's C face would lose what it says
    torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t) {
      if (begin != 0) return team.serve();
      const Lead lead(team);
      try {
        body();
      } catch (...) {
        failed = std::current_exception();
      }
    });
    if (failed) std::rethrow_exception(failed);
  }

  // f(begin, end) over [0, count) in as many parts as there are threads, none of less than `grain`.
  template <class F>
  void share(int64_t count, int64_t grain, const F& f) {
    const int64_t parts = std::min(threads_, (count + grain - 1) / grain);
    if (parts <= 1) return f(int64_t{0}, count);
    call_ = [](const void* g, int64_t begin, int64_t end) { (*static_cast<const F*>(g))(begin, end); };
    f_ = &f, count_ = count, parts_ = parts;
    done_.store(0, std::memory_order_relaxed);
    const int64_t loop = open_.load(std::memory_order_relaxed) / kParts + 1;
    open_.store(loop * kParts + parts, std::memory_order_release);
    try {
      while (take()) {
      }
    } catch (...) {  // f stays until whoever has a part of it is done; nobody gets another
      join(parts - open_.exchange(loop * kParts, std::memory_order_acq_rel) % kParts);
      throw;
    }
    join(parts);
  }

 private:
  static constexpr int64_t kParts = int64_t{1} << 20;  // more than a machine has threads

  // Spins for about as long as a loop of a decode step takes; then lets others have the core.
  class Wait {
   public:
    void operator()() {
      if (++spins_ > kSpins) return std::this_thread::yield();
#if defined(__x86_64__)
      __builtin_ia32_pause();
#elif defined(__aarch64__)
      asm volatile("yield");
#endif
    }

   private:
    static constexpr int kSpins = 10000;
    int spins_ = 0;
  };

  class Lead {
   public:
    explicit Lead(Team& team) : team_(team) { led() = &team; }
    ~Lead() {
      led() = nullptr;
      team_.open_.store(kEnd, std::memory_order_release);
    }
    Lead(const Lead&) = delete;

   private:
    Team& team_;
  };

  explicit Team(int64_t threads) : threads_(threads) {}

  void join(int64_t parts) const {
    for (Wait wait; done_.load(std::memory_order_acquire) != parts;) wait();
  }

  void serve() {
    for (Wait wait;;) {
      if (take()) {
        wait = {};
      } else if (open_.load(std::memory_order_relaxed) == kEnd) {
        return;
      } else {
        wait();
      }
    }
  }

  // Runs a part that nobody has claimed; false where there is none. Until all parts of a loop are done the
  // leader leaves its fields alone, so those read before a claim that succeeds are the loop's.
  bool take() {
    for (int64_t open = open_.load(std::memory_order_acquire); open != kEnd && open % kParts > 0;) {
      const auto call = call_.load(std::memory_order_relaxed);
      const void* const f = f_.load(std::memory_order_relaxed);
      const int64_t count = count_.load(std::memory_order_relaxed),
                    parts = parts_.load(std::memory_order_relaxed), part = parts - open % kParts;
      if (!open_.compare_exchange_weak(open, open - 1, std::memory_order_acq_rel, std::memory_order_acquire))
        continue;
      const Done done(done_);
      call(f, count * part / parts, count * (part + 1) / parts);
      return true;
    }
    return false;
  }

  // Counted also where the part throws: torch hands the exception on when all threads have left.
  class Done {
   public:
    explicit Done(std::atomic<int64_t>& count) : count_(count) {}
    ~Done() { count_.fetch_add(1, std::memory_order_release); }
    Done(const Done&) = delete;

   private:
    std::atomic<int64_t>& count_;
  };

  static constexpr int64_t kEnd = -1;

  int64_t threads_;
  alignas(64) std::atomic<int64_t> open_{0};  // loop * kParts + how many of its parts nobody has claimed
  std::atomic<void (*)(const void*, int64_t, int64_t)> call_{nullptr};
  std::atomic<const void*> f_{nullptr};
  std::atomic<int64_t> count_{0}, parts_{0};
  alignas(64) std::atomic<int64_t> done_{0};
};

}  // namespace flextron
