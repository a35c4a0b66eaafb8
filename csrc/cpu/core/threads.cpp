#include "cpu/core/threads.h"

#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#include <pthread.h>
#include <sched.h>
#include <unistd.h>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace pymerge::cpu {

int available_threads() {
#if defined(__linux__)
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof(set), &set) == 0)
    return CPU_COUNT(&set) > 0 ? CPU_COUNT(&set) : 1;
#endif
  const unsigned count = std::thread::hardware_concurrency();
  return count > 0 ? int(count) : 1;
}

#if defined(__x86_64__)
FloatEnvironment::FloatEnvironment() : saved_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
FloatEnvironment::~FloatEnvironment() { _mm_setcsr(static_cast<unsigned>(saved_)); }
#elif defined(__aarch64__)
FloatEnvironment::FloatEnvironment() {
  __asm__ volatile("mrs %0, fpcr" : "=r"(saved_));
  __asm__ volatile("msr fpcr, %0" : : "r"(uint64_t(0)));
}
FloatEnvironment::~FloatEnvironment() { __asm__ volatile("msr fpcr, %0" : : "r"(saved_)); }
#else
FloatEnvironment::FloatEnvironment() : saved_(0) {}
FloatEnvironment::~FloatEnvironment() { static_cast<void>(saved_); }
#endif

namespace {

// One parallel_for in progress.
struct Job {
  const std::function<void(int, uint64_t)>* body;
  uint64_t tasks;
  std::atomic<uint64_t> next{0};
  std::mutex error_mutex;
  std::exception_ptr error;

  void work(int thread) {
    FloatEnvironment environment;
    try {
      for (uint64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) {
        (*body)(thread, task);
      }
    } catch (...) {
      std::lock_guard<std::mutex> lock(error_mutex);
      if (!error) error = std::current_exception();
      next.store(tasks, std::memory_order_relaxed);
    }
#if defined(__x86_64__)
    _mm_sfence();  // non-temporal stores are weakly ordered
#endif
  }
};

class Pool {
 public:
  void run(int threads, Job& job) {
    std::lock_guard<std::mutex> turn(turn_);
    while (int(workers_.size()) < threads - 1) {
      const int number = int(workers_.size()) + 1;
      try {
        workers_.emplace_back([this, number] { loop(number); });
      } catch (const std::exception&) {
        // No further thread, or no memory for one: the work is the same with fewer.
        threads = number;
      }
    }
    {
      std::lock_guard<std::mutex> lock(mutex_);
      job_ = &job;
      wanted_ = threads - 1;
      running_ = threads - 1;
      left_.store(threads - 1, std::memory_order_relaxed);
      ++generation_;
      published_.store(generation_, std::memory_order_release);
    }
    start_.notify_all();
    job.work(0);
    // The others finish their last task within microseconds of this one: spin a little before
    // sleeping.
    for (int spin = 0; spin < 2000 && left_.load(std::memory_order_acquire) != 0; ++spin) pause();
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return running_ == 0; });
    job_ = nullptr;
  }

  // Workers never end: they hold no resources but their stacks, and joining them at exit could hang
  // the exit.
  Pool() = default;

 private:
  static void pause() {
#if defined(__x86_64__)
    _mm_pause();
#endif
  }

  void loop(int number) {
    uint64_t seen = 0;
    for (;;) {
      // A selection is a few short parallel steps: wait for the next one awake for some 20 us.
      for (int spin = 0; spin < 400 && published_.load(std::memory_order_acquire) == seen; ++spin)
        pause();
      Job* job = nullptr;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        start_.wait(lock, [&] { return generation_ != seen; });
        seen = generation_;
        if (number <= wanted_) job = job_;
      }
      if (job == nullptr) continue;
      job->work(number);
      std::lock_guard<std::mutex> lock(mutex_);
      left_.store(--running_, std::memory_order_release);
      if (running_ == 0) done_.notify_one();
    }
  }

  std::mutex turn_;  // held by the caller whose job runs
  std::mutex mutex_;
  std::condition_variable start_, done_;
  std::vector<std::thread> workers_;
  Job* job_ = nullptr;
  uint64_t generation_ = 0;
  int wanted_ = 0;
  int running_ = 0;
  std::atomic<uint64_t> published_{0};
  std::atomic<int> left_{0};
};

Pool* pool = nullptr;
std::mutex pool_mutex;
pid_t pool_owner = 0;

void forget_pool() {
  // In a forked child the workers do not exist and the mutexes may be held by threads that do not
  // either.
  pool = nullptr;
  new (&pool_mutex) std::mutex;
}

Pool& get_pool() {
  static const bool registered = pthread_atfork(nullptr, nullptr, forget_pool) == 0;
  static_cast<void>(registered);
  std::lock_guard<std::mutex> lock(pool_mutex);
  if (pool == nullptr || pool_owner != getpid()) {
    pool = new Pool;
    pool_owner = getpid();
  }
  return *pool;
}

}  // namespace

void parallel_for(int threads, uint64_t tasks, const std::function<void(int, uint64_t)>& body) {
  Job job;
  job.body = &body;
  job.tasks = tasks;
  if (uint64_t(threads) > tasks) threads = int(tasks);
  if (threads <= 1) {
    job.work(0);
  } else {
    get_pool().run(threads, job);
  }
  if (job.error) std::rethrow_exception(job.error);
}

}  // namespace pymerge::cpu
