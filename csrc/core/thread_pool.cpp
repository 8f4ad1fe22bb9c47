#include "thread_pool.h"

#include <pthread.h>
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <exception>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>

#include "float_environment.h"

namespace metagpt_fast {
namespace {

constexpr int kMaxThreads = 1024;

int usable_processors() {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return std::max(1, CPU_COUNT(&set));
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

int default_num_threads() {
  if (const char* text = std::getenv("METAGPT_FAST_THREADS")) {
    char* end = nullptr;
    const long value = std::strtol(text, &end, 10);
    if (end == text || *end != '\0' || value < 1 || value > kMaxThreads) {
      throw std::invalid_argument("METAGPT_FAST_THREADS: got '" + std::string(text) + "', expected 1 to " +
                                  std::to_string(kMaxThreads));
    }
    return static_cast<int>(value);
  }
  return usable_processors();
}

struct Job {
  std::size_t num_items = 0;
  const std::function<void(std::size_t, int)>* body = nullptr;
  std::atomic<std::size_t> next_item{0};
  std::atomic<bool> failed{false};
  std::exception_ptr error;
  std::mutex error_mutex;

  void work(int worker) {
    DefaultFloatEnvironment environment;
    while (!failed.load(std::memory_order_relaxed)) {
      const std::size_t item = next_item.fetch_add(1, std::memory_order_relaxed);
      if (item >= num_items) return;
      try {
        (*body)(item, worker);
      } catch (...) {
        const std::lock_guard lock(error_mutex);
        if (!error) error = std::current_exception();
        failed.store(true, std::memory_order_relaxed);
      }
    }
  }
};

// Worker threads that sleep between jobs. Worker i (i >= 1; the caller is worker 0) takes part in a job if
// i < its number of workers. A pool is never destroyed: when the process exits, a thread may still be in run(), and
// sleeping threads need nothing but the pool's own memory until the system ends them.
class Pool {
 public:
  void run(Job& job, int num_workers) {
    const std::lock_guard one_job_at_a_time(run_mutex_);
    num_workers = std::min(num_workers, start_workers(num_workers));
    {
      const std::lock_guard lock(mutex_);
      job_ = &job;
      num_participants_ = num_workers;
      num_running_ = num_workers - 1;
      ++generation_;
    }
    wake_.notify_all();
    job.work(0);
    std::unique_lock lock(mutex_);
    done_.wait(lock, [this] { return num_running_ == 0; });
    job_ = nullptr;
  }

 private:
  // Returns how many workers there are, the caller included: `num_workers` or more, or fewer where the system refuses.
  int start_workers(int num_workers) {
    try {
      for (; num_started_ < num_workers; ++num_started_) {
        std::thread([this, worker = num_started_, seen = generation_] { loop(worker, seen); }).detach();
      }
    } catch (const std::system_error&) {  // the container's limit on threads; the work gets done all the same
    }
    return num_started_;
  }

  [[noreturn]] void loop(int worker, std::size_t seen_generation) {
    for (;;) {
      Job* job = nullptr;
      {
        std::unique_lock lock(mutex_);
        wake_.wait(lock, [&] { return generation_ != seen_generation; });
        seen_generation = generation_;
        if (worker >= num_participants_) continue;
        job = job_;
      }
      job->work(worker);
      const std::lock_guard lock(mutex_);
      if (--num_running_ == 0) done_.notify_one();
    }
  }

  std::mutex run_mutex_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::condition_variable done_;
  int num_started_ = 1;
  Job* job_ = nullptr;
  int num_participants_ = 0;
  int num_running_ = 0;
  std::size_t generation_ = 0;
};

// The one pool of this process. A forked child has none of its parent's threads, and mutexes in an unknown
// state, so it leaves the parent's pool where it is and starts its own.
std::atomic<Pool*> g_pool{nullptr};
std::atomic<int> g_num_threads{0};
std::once_flag g_fork_handler;

Pool& pool() {
  std::call_once(g_fork_handler, [] { pthread_atfork(nullptr, nullptr, [] { g_pool.store(nullptr); }); });
  Pool* current = g_pool.load();
  if (current == nullptr) {
    auto fresh = std::make_unique<Pool>();
    if (g_pool.compare_exchange_strong(current, fresh.get())) current = fresh.release();
  }
  return *current;
}

}  // namespace

int num_threads() {
  const int chosen = g_num_threads.load();
  return chosen > 0 ? chosen : default_num_threads();
}

void set_num_threads(int num_threads) {
  if (num_threads < 0 || num_threads > kMaxThreads) {
    throw std::invalid_argument("threads: got " + std::to_string(num_threads) + ", expected 0 (default) to " +
                                std::to_string(kMaxThreads));
  }
  g_num_threads.store(num_threads);
}

void parallel_for(std::size_t num_items, int num_workers,
                  const std::function<void(std::size_t item, int worker)>& body) {
  if (num_items == 0) return;
  Job job;
  job.num_items = num_items;
  job.body = &body;
  const int useful = static_cast<int>(std::min<std::size_t>(num_items, static_cast<std::size_t>(num_workers)));
  if (useful == 1) {
    job.work(0);
  } else {
    pool().run(job, useful);
  }
  if (job.error) std::rethrow_exception(job.error);
}

}  // namespace metagpt_fast
