// A small persistent pool of threads, shared by all kernels of the core.
//
// Workers spin for some microseconds after a job, then sleep on a condition variable. Work is dealt by an atomic counter,
// so any number of threads, one included, finishes any job.
//
// Linking OpenMP would bring a second runtime beside that of the host library, whose threads spin for milliseconds after
// their work while ours wait for a processor. So where the host names its runtime, jobs run on the threads of that one.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>

namespace hyper {

// Deals [0, items) in runs of `run` consecutive items to whoever asks first.
class WorkCounter {
 public:
  WorkCounter(int64_t items, int64_t run) : items_(items), run_(run) {}

  // False when nothing is left; otherwise [*begin, *end) belongs to the caller.
  bool take(int64_t* begin, int64_t* end) {
    *begin = next_.fetch_add(run_, std::memory_order_relaxed);
    if (*begin >= items_) return false;
    *end = *begin + run_ < items_ ? *begin + run_ : items_;
    return true;
  }

 private:
  const int64_t items_;
  const int64_t run_;
  std::atomic<int64_t> next_{0};
};

// Calls job() on the calling thread and on up to threads - 1 workers, and returns when all calls have returned. Each
// call must draw its work from a shared WorkCounter. When another thread is inside, job() runs on the caller alone. An
// exception thrown by any call is rethrown here once all have ended.
void run_on_threads(int threads, const std::function<void()>& job);

constexpr int kMaxThreads = 256;

// void GOMP_parallel(void (*call)(void*), void* data, unsigned threads, unsigned flags)
using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

// Runs later jobs in teams of this runtime; null: on workers of our own. Not to be called while jobs run.
void use_openmp(GompParallel parallel);

}  // namespace hyper
