#include "thread_pool.h"

#include <condition_variable>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>

#if defined(_WIN32)
#include <process.h>
#define getpid _getpid
#else
#include <unistd.h>
#endif

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace hyper {
namespace {

constexpr int kSpins = 2000;  // about 20 microseconds

inline void relax() {
#if defined(__x86_64__) || defined(_M_X64)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Waits for done(), spinning first: most waits end within microseconds, and waking a thread costs more.
template <class Done>
void wait_until(std::mutex& mutex, std::condition_variable& signal, Done done) {
  for (int spin = 0; spin < kSpins; ++spin) {
    if (done()) return;
    relax();
  }
  std::unique_lock<std::mutex> lock(mutex);
  signal.wait(lock, done);
}

std::exception_ptr call(const std::function<void()>& job) {
  try {
    job();
    return nullptr;
  } catch (...) {
    return std::current_exception();
  }
}

class Pool {
 public:
  explicit Pool(int process) : process_(process) {}

  int process() const { return process_; }

  void run(int helpers, const std::function<void()>& job) {
    std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
    if (!turn.owns_lock()) {
      job();
      return;
    }
    helpers = ensure_workers(helpers);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      job_ = &job;
      helpers_ = helpers;
      pending_.store(helpers);
      epoch_.fetch_add(1);
    }
    wake_.notify_all();
    std::exception_ptr failure = call(job);
    wait_until(mutex_, finished_, [this] { return pending_.load() == 0; });
    if (!failure) failure = failure_;
    failure_ = nullptr;
    if (failure) std::rethrow_exception(failure);
  }

 private:
  // Workers are detached and the pool is never destroyed, so nothing has to be joined when the process ends.
  int ensure_workers(int wanted) {
    while (workers_ < wanted) {
      try {
        std::thread(&Pool::work, this, workers_, epoch_.load()).detach();
      } catch (const std::system_error&) {
        break;
      }
      ++workers_;
    }
    return wanted < workers_ ? wanted : workers_;
  }

  void work(int index, uint64_t seen) {
    for (;;) {
      wait_until(mutex_, wake_, [&] { return epoch_.load() != seen; });
      const std::function<void()>* job = nullptr;
      {
        std::lock_guard<std::mutex> lock(mutex_);
        seen = epoch_.load();
        if (index < helpers_) job = job_;
      }
      if (job == nullptr) continue;
      std::exception_ptr failure = call(*job);
      std::lock_guard<std::mutex> lock(mutex_);
      if (failure) failure_ = failure;
      if (pending_.fetch_sub(1) == 1) finished_.notify_one();
    }
  }

  const int process_;
  std::mutex turn_;  // held by the thread whose job runs
  std::mutex mutex_;
  std::condition_variable wake_, finished_;
  std::atomic<uint64_t> epoch_{0};
  std::atomic<int> pending_{0};
  const std::function<void()>* job_ = nullptr;
  std::exception_ptr failure_;
  int helpers_ = 0;
  int workers_ = 0;
};

// A forked child has the parent's memory but none of its threads: it gets a pool of its own, and the old one is left
// untouched because its mutexes may be held for ever.
Pool& pool() {
  static std::atomic<Pool*> current{nullptr};
  const int process = static_cast<int>(getpid());
  Pool* found = current.load();
  while (found == nullptr || found->process() != process) {
    Pool* fresh = new Pool(process);
    if (current.compare_exchange_strong(found, fresh)) return *fresh;
    delete fresh;
  }
  return *found;
}

std::atomic<GompParallel> openmp{nullptr};
std::atomic<int> openmp_process{0};  // OpenMP runtimes do not survive a fork

struct Team {
  const std::function<void()>& job;
  std::mutex mutex;
  std::exception_ptr failure;

  static void work(void* data) {
    Team& team = *static_cast<Team*>(data);
    if (std::exception_ptr failure = call(team.job)) {
      std::lock_guard<std::mutex> lock(team.mutex);
      team.failure = failure;
    }
  }
};

}  // namespace

void use_openmp(GompParallel parallel) {
  openmp_process.store(static_cast<int>(getpid()));
  openmp.store(parallel);
}

void run_on_threads(int threads, const std::function<void()>& job) {
  if (threads <= 1) {
    job();
    return;
  }
  if (threads > kMaxThreads) threads = kMaxThreads;
  const GompParallel parallel = openmp.load();
  if (parallel != nullptr && openmp_process.load() == static_cast<int>(getpid())) {
    Team team{job, {}, nullptr};
    parallel(Team::work, &team, static_cast<unsigned>(threads), 0);
    if (team.failure) std::rethrow_exception(team.failure);
  } else {
    pool().run(threads - 1, job);
  }
}

}  // namespace hyper
