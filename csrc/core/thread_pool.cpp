#include "thread_pool.h"

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
#include <thread>
#include <vector>

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

// Worker threads that sleep between jobs. Thread i (i >= 1) takes part in a job if i < its number of threads.
class Pool {
 public:
  ~Pool() {
    {
      const std::lock_guard lock(mutex_);
      stopping_ = true;
    }
    wake_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

  void run(Job& job, int num_threads) {
    while (static_cast<int>(threads_.size()) < num_threads - 1) {
      const int worker = static_cast<int>(threads_.size()) + 1;
      threads_.emplace_back([this, worker, seen = generation_] { loop(worker, seen); });
    }
    {
      const std::lock_guard lock(mutex_);
      job_ = &job;
      num_participants_ = num_threads;
      num_running_ = num_threads - 1;
      ++generation_;
    }
    wake_.notify_all();
    job.work(0);
    std::unique_lock lock(mutex_);
    done_.wait(lock, [this] { return num_running_ == 0; });
    job_ = nullptr;
  }

 private:
  void loop(int worker, std::size_t seen_generation) {
    for (;;) {
      Job* job = nullptr;
      {
        std::unique_lock lock(mutex_);
        wake_.wait(lock, [&] { return stopping_ || generation_ != seen_generation; });
        if (stopping_) return;
        seen_generation = generation_;
        if (worker >= num_participants_) continue;
        job = job_;
      }
      job->work(worker);
      const std::lock_guard lock(mutex_);
      if (--num_running_ == 0) done_.notify_one();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  std::condition_variable done_;
  std::vector<std::thread> threads_;
  Job* job_ = nullptr;
  int num_participants_ = 0;
  int num_running_ = 0;
  std::size_t generation_ = 0;
  bool stopping_ = false;
};

// The one pool of this process. A forked child has none of its parent's threads, and mutexes in an unknown
// state, so it leaves the parent's pool where it is and starts its own.
struct PoolState {
  std::mutex run_mutex;
  std::unique_ptr<Pool> pool = std::make_unique<Pool>();
};

std::atomic<PoolState*> g_state{nullptr};
std::atomic<int> g_num_threads{0};
std::once_flag g_fork_handler;

PoolState& state() {
  std::call_once(g_fork_handler, [] {
    pthread_atfork(nullptr, nullptr, [] { g_state.store(nullptr); });
    std::atexit([] {  // join the workers before static objects go
      PoolState* state = g_state.exchange(nullptr);
      if (state != nullptr) state->pool.reset();
    });
  });
  PoolState* current = g_state.load();
  if (current == nullptr) {
    auto fresh = std::make_unique<PoolState>();
    if (g_state.compare_exchange_strong(current, fresh.get())) current = fresh.release();
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

void parallel_for(std::size_t num_items, const std::function<void(std::size_t item, int worker)>& body) {
  if (num_items == 0) return;
  Job job;
  job.num_items = num_items;
  job.body = &body;
  const int threads = static_cast<int>(std::min<std::size_t>(num_items, static_cast<std::size_t>(num_threads())));
  if (threads == 1) {
    job.work(0);
  } else {
    PoolState& shared = state();
    const std::lock_guard lock(shared.run_mutex);
    shared.pool->run(job, threads);
  }
  if (job.error) std::rethrow_exception(job.error);
}

}  // namespace metagpt_fast
