// How kernels spread work and where they keep scratch.
//
// Tasks are handed out one by one, in order, by a counter: unequal tasks (causal rows) and unequal
// cores balance without any tuning, and since a task's result never depends on who runs it, results
// do not depend on the threads.
#pragma once

#include <cstdlib>
#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

#include "kernels/cpu/simd/elements.h"

namespace wgpt::cpu {

[[noreturn]] void throw_out_of_memory(size_t n_bytes);  // in dispatch.cpp: no std code per target

namespace WGPT_TARGET {

// While it lives, results too small for a normal float are 0. Exponentials of a softmax or a GELU can be
// that small, and x86 takes a hundred times as long for each of them.
class FlushToZero {
#if defined(__SSE2__)
 public:
  FlushToZero() : before_(_mm_getcsr()) { _mm_setcsr(before_ | _MM_FLUSH_ZERO_ON); }
  ~FlushToZero() { _mm_setcsr(before_); }
  FlushToZero(const FlushToZero&) = delete;
  FlushToZero& operator=(const FlushToZero&) = delete;

 private:
  const unsigned before_;
#endif
};

// Calls body(task) for every task in [0, n_tasks); put the longest first.
template <typename Body>
void run_tasks(const Executor& executor, int64_t n_tasks, Body&& body) {
  const int64_t n_workers =
      min_of<int64_t>(executor.n_threads > 1 ? executor.n_threads : 1, n_tasks);
  if (n_workers <= 1) {
    [[maybe_unused]] const FlushToZero flush{};
    for (int64_t task = 0; task < n_tasks; ++task) body(task);
    return;
  }
  int64_t next = 0;
  parallel_for(executor, n_workers, 1, [&](int64_t, int64_t) {
    [[maybe_unused]] const FlushToZero flush{};
    for (;;) {
      const int64_t task = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
      if (task >= n_tasks) return;
      body(task);
    }
  });
}

// A growing buffer of the calling thread, 64-byte aligned; its contents are whatever was left
// there. Under AddressSanitizer it is as large as was asked for, so that a step past it is seen.
class Scratch {
 public:
  ~Scratch() { std::free(data_); }
  void* reserve(size_t n_bytes) {
#if defined(__SANITIZE_ADDRESS__)
    constexpr size_t kGrain = 64;
    const bool fits = n_bytes <= capacity_ && capacity_ < n_bytes + kGrain;
#else
    constexpr size_t kGrain = 4096;
    const bool fits = n_bytes <= capacity_;
#endif
    if (!fits) {
      std::free(data_);
      capacity_ = (n_bytes + kGrain - 1) & ~(kGrain - 1);
      data_ = std::aligned_alloc(64, capacity_);
      if (data_ == nullptr) {
        capacity_ = 0;
        throw_out_of_memory(n_bytes);
      }
    }
    return data_;
  }

 private:
  void* data_ = nullptr;
  size_t capacity_ = 0;
};

inline void* thread_scratch(size_t n_bytes) {
  thread_local Scratch scratch;
  return scratch.reserve(n_bytes);
}

}  // namespace WGPT_TARGET
}  // namespace wgpt::cpu
