// The thread pool: every item once, exceptions, callers at the same time, changes of its size, sleep, fork.
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <ctime>
#include <stdexcept>
#include <thread>

#include "check.h"
#include "core/thread_pool.h"
#include "cpu/layer_gram.h"
#include "cpu/layer_merge.h"
#include "oracle.h"

namespace metagpt_fast::test {
namespace {

// Whether every item is handed out once, to a worker that is in range.
bool each_item_once(std::size_t num_items, int num_workers) {
  std::vector<std::atomic<int>> times(num_items);
  std::atomic<bool> in_range{true};
  parallel_for(num_items, num_workers, [&](std::size_t item, int worker) {
    times[item].fetch_add(1);
    if (worker < 0 || worker >= num_workers) in_range = false;
  });
  bool once = true;
  for (const std::atomic<int>& count : times) once = once && count == 1;
  return once && in_range;
}

double process_seconds() {
  timespec now{};
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

void check_exceptions(Checks& checks) {
  constexpr std::size_t kNumItems = 1'000'000'000;  // far more than can start while an exception is on its way
  std::atomic<std::size_t> num_started{0};
  checks.check_throws<std::runtime_error>(
      "the body's exception",
      [&] {
        parallel_for(kNumItems, 4, [&](std::size_t item, int) {
          ++num_started;
          if (item == 10) throw std::runtime_error("item 10");
        });
      },
      [](const std::runtime_error& error) { return std::string(error.what()) == "item 10"; });
  checks.check(num_started < kNumItems, "an exception stops the handing out of items");
  checks.check_throws<std::runtime_error>(
      "every worker throws", [] { parallel_for(64, 4, [](std::size_t, int) { throw std::runtime_error("all"); }); });
  checks.check(each_item_once(1000, 4), "the pool works after exceptions");
}

// Runs `body` in a forked process. Returns its exit status, or -1 if it was killed.
template <class Body>
int run_in_child(Body body) {
  const pid_t child = ::fork();
  if (child == 0) {
    ::alarm(60);  // a child that hangs fails the test instead of hanging it
    ::_exit(body());
  }
  int status = 0;
  ::waitpid(child, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

}  // namespace

void test_thread_pool(Checks& checks) {
  for (const std::size_t num_items : {0, 1, 2, 3, 100, 5000}) {
    for (const int num_workers : {1, 2, 3, 8, 2}) {
      checks.check(each_item_once(num_items, num_workers),
                   [&] { return describe(num_items, " items with ", num_workers, " workers"); });
    }
  }
  check_exceptions(checks);

  std::atomic<int> num_wrong{0};
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 4; ++caller) {
    callers.emplace_back([&, caller] {
      for (int i = 0; i < 50; ++i) num_wrong += !each_item_once(static_cast<std::size_t>(i), 1 + (i + caller) % 4);
    });
  }
  for (std::thread& caller : callers) caller.join();
  checks.check(num_wrong == 0, "calls from several threads at once");

  const double before = process_seconds();
  std::this_thread::sleep_for(std::chrono::milliseconds(200));
  checks.check(process_seconds() - before < 0.1, "idle workers sleep");
}

void test_threads_around_kernels(Checks& checks) {
  const OwnedLayer layer({300000, 17, 300000, 300000}, {DType::kBF16}, 2, true, Filling::kWeights, 5);
  const std::vector<double> coefficients(4 * 2, 0.3);
  std::vector<double> expected(4 * 9, 0.0);
  cpu::layer_gram(layer.layer(), expected.data());
  const OwnedOutput expected_merge(layer, DType::kBF16);
  std::vector<std::int64_t> num_nonfinite(4);
  cpu::layer_merge(layer.layer(), coefficients.data(), expected_merge.output(), num_nonfinite.data());

  std::atomic<bool> stop{false};
  std::thread changer([&] {  // calls in flight keep the number of threads that they began with
    for (int n = 0; !stop; ++n) set_num_threads(1 + n % 6);
  });
  std::atomic<int> num_wrong{0};
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 3; ++caller) {
    callers.emplace_back([&] {
      std::vector<std::int64_t> counts(4);
      for (int i = 0; i < 10; ++i) {
        std::vector<double> gram(expected.size(), 0.0);
        cpu::layer_gram(layer.layer(), gram.data());
        const OwnedOutput merged(layer, DType::kBF16);
        cpu::layer_merge(layer.layer(), coefficients.data(), merged.output(), counts.data());
        num_wrong += gram != expected || !merged.same_bytes(expected_merge);
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  stop = true;
  changer.join();
  checks.check(num_wrong == 0, "the number of threads changes while kernels run");
}

void test_fork(Checks& checks) {
  checks.check(each_item_once(100, 3), "before the fork");
  checks.check(run_in_child([] { return each_item_once(1000, 3) ? 0 : 1; }) == 0, "a child has a pool of its own");
  checks.check(run_in_child([] {
                 each_item_once(10, 2);
                 return run_in_child([] { return each_item_once(1000, 3) ? 0 : 1; });
               }) == 0,
               "a child of a child too");
  checks.check(each_item_once(100, 3), "the parent's pool is as it was");
}

}  // namespace metagpt_fast::test
