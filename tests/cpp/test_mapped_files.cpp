// Mapped files that become shorter while kernels read them: the fault is remembered, and nothing ends.
#include "core/mapped_files.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>

#include <array>
#include <atomic>
#include <thread>
#include <vector>

#include "check.h"
#include "core/layer.h"
#include "core/thread_pool.h"
#include "cpu/layer_gram.h"
#include "cpu/layer_threshold.h"
#include "temporary_file.h"

namespace metagpt_fast::test {
namespace {

constexpr std::size_t kNumel = std::size_t{3} << 20;
constexpr std::size_t kNbytes = kNumel * sizeof(float);

// A file of ones, mapped.
class MappedOnes {
 public:
  MappedOnes() {
    const std::vector<float> ones(kNumel, 1.0f);
    if (::pwrite(file_.descriptor(), ones.data(), kNbytes, 0) != static_cast<ssize_t>(kNbytes)) {
      throw std::runtime_error("cannot fill the temporary file");
    }
    memory_ = ::mmap(nullptr, kNbytes, PROT_READ, MAP_SHARED, file_.descriptor(), 0);
    if (memory_ == MAP_FAILED) throw std::runtime_error("cannot map the temporary file");
  }
  ~MappedOnes() { ::munmap(memory_, kNbytes); }
  MappedOnes(const MappedOnes&) = delete;
  MappedOnes& operator=(const MappedOnes&) = delete;

  void truncate(std::size_t nbytes) const {
    if (::ftruncate(file_.descriptor(), static_cast<off_t>(nbytes)) != 0) throw std::runtime_error("cannot truncate");
  }
  std::uintptr_t address() const { return reinterpret_cast<std::uintptr_t>(memory_); }
  const volatile float* values() const { return static_cast<const volatile float*>(memory_); }

 private:
  TemporaryFile file_;
  void* memory_;
};

double squared_norm(std::uintptr_t address) {
  const std::array<std::uint64_t, 1> addresses{address};
  const std::array<std::int32_t, 1> files{-1};
  const std::array<std::uint8_t, 1> dtypes{static_cast<std::uint8_t>(DType::kF32)};
  const std::array<std::int64_t, 1> numels{static_cast<std::int64_t>(kNumel)};
  double gram = 0.0;
  cpu::layer_gram({1, 1, false, addresses.data(), files.data(), dtypes.data(), numels.data()}, &gram);
  return gram;
}

void check_truncated_file(Checks& checks) {
  const MappedOnes whole;
  const MappedOnes shrinking;
  const int whole_guard = guard_mapping(whole.address(), kNbytes);
  const int guard = guard_mapping(shrinking.address(), kNbytes - 5);  // a file need not end with a page
  checks.check(squared_norm(shrinking.address()) == kNumel, "a whole file is read");
  checks.check(fault_offset(guard) == -1, "no fault yet");
  constexpr std::size_t kLeft = std::size_t{1} << 20;
  shrinking.truncate(kLeft);
  for (int num_workers = 1; num_workers <= 4; num_workers *= 2) {
    set_num_threads(num_workers);
    const double gram = squared_norm(shrinking.address());
    checks.check(gram == kLeft / sizeof(float), [&] {
      return describe("what is gone reads as zeros, got ", gram, " with ", num_workers, " threads");
    });
  }
  const std::int64_t offset = fault_offset(guard);
  checks.check(offset >= static_cast<std::int64_t>(kLeft) && offset < static_cast<std::int64_t>(kNbytes),
               [&] { return describe("the fault is behind what is left, got ", offset); });
  checks.check(squared_norm(whole.address()) == kNumel, "another file is as it was");
  checks.check(fault_offset(whole_guard) == -1, "another file has no fault");
  unguard_mapping(guard);
  unguard_mapping(whole_guard);
}

void check_many_threads_at_once(Checks& checks) {
  const MappedOnes shrinking;
  const int guard = guard_mapping(shrinking.address(), kNbytes);
  shrinking.truncate(0);
  std::atomic<int> num_zeros{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < 8; ++t) {
    threads.emplace_back([&, t] {
      const std::size_t page_numel = 4096 / sizeof(float);
      const std::size_t index = (static_cast<std::size_t>(7 - t) * 96 + 1) * page_numel;
      if (shrinking.values()[index] == 0.0f) ++num_zeros;
    });
  }
  for (std::thread& thread : threads) thread.join();
  checks.check(num_zeros == 8, "every thread goes on");
  checks.check(fault_offset(guard) >= 0, "one of the faults is remembered");
  unguard_mapping(guard);
}

void check_many_guards(Checks& checks) {
  const MappedOnes file;
  std::vector<int> guards;
  for (int i = 0; i < 600; ++i) guards.push_back(guard_mapping(file.address(), kNbytes));
  for (std::size_t i = 0; i < guards.size(); ++i) {
    for (std::size_t j = i + 1; j < guards.size(); ++j) {
      if (guards[i] == guards[j]) checks.check(false, "guards have different numbers");
    }
  }
  const int freed = guards[300];
  unguard_mapping(freed);
  checks.check(guard_mapping(file.address(), kNbytes) == freed, "a guard's place is used again");
  for (const int guard : guards) unguard_mapping(guard);
  checks.check_throws<std::invalid_argument>("an unaligned address", [&] { guard_mapping(file.address() + 1, 10); });
  checks.check_throws<std::invalid_argument>("no bytes", [&] { guard_mapping(file.address(), 0); });
}

std::atomic<int> g_num_signals{0};

struct sigaction count_signals() {
  struct sigaction counting = {};
  counting.sa_handler = [](int) { ++g_num_signals; };
  struct sigaction before = {};
  ::sigaction(SIGBUS, &counting, &before);
  return before;
}

void check_other_handlers(Checks& checks) {
  const struct sigaction before = count_signals();
  const MappedOnes file;
  g_num_signals = 0;
  const int guard = guard_mapping(file.address(), kNbytes);
  ::raise(SIGBUS);
  checks.check(g_num_signals == 1, "a signal that is no fault goes to the handler from before");
  count_signals();  // on top of ours
  unguard_mapping(guard);
  ::raise(SIGBUS);
  checks.check(g_num_signals == 2, "a handler that came later stays");
  unguard_mapping(guard_mapping(file.address(), kNbytes));
  ::raise(SIGBUS);
  checks.check(g_num_signals == 3, "and is put back the next time");
  ::sigaction(SIGBUS, &before, nullptr);
}

// Two passes over memory that changes meanwhile: any result, or the error, but nothing outside of the tensor.
void check_changing_input(Checks& checks) {
  constexpr std::size_t kSize = std::size_t{1} << 17;
  std::vector<float> base(kSize, 0.0f);
  std::vector<std::atomic<float>> model(kSize);
  std::atomic<bool> is_done{false};
  std::thread writer([&] {
    for (std::uint32_t round = 0; !is_done; ++round) {
      for (std::size_t e = 0; e < kSize; ++e) {
        const auto step = static_cast<float>(round % 3 == 0 ? 0 : round % 3 == 1 ? e : kSize);
        model[e].store(1.0f + step * 0x1p-23f, std::memory_order_relaxed);
      }
    }
  });
  const std::array<std::uint64_t, 2> addresses{reinterpret_cast<std::uintptr_t>(base.data()),
                                               reinterpret_cast<std::uintptr_t>(model.data())};
  const std::array<std::int32_t, 2> files{-1, -1};
  const auto f32 = static_cast<std::uint8_t>(DType::kF32);
  const std::array<std::uint8_t, 2> dtypes{f32, f32};
  const std::array<std::int64_t, 1> numels{kSize};
  const std::array<std::int64_t, 1> columns{1};
  const std::array<std::uint64_t, 1> row_factors{0};
  const Layer layer{1, 2, true, addresses.data(), files.data(), dtypes.data(), numels.data()};
  const KeyTable table{0, columns.data(), row_factors.data()};
  int num_errors = 0;
  for (std::int64_t i = 0; i < 60; ++i) {
    const std::array<std::int64_t, 1> ranks{i * 2180};
    std::uint32_t key = 0;
    std::int64_t index = -1;
    try {
      cpu::layer_threshold(layer, table, ranks.data(), 1, &key, &index);
      checks.check(index >= 0 && index < static_cast<std::int64_t>(kSize), "an index within the tensor");
    } catch (const InputChangedError&) {
      ++num_errors;
    }
  }
  is_done = true;
  writer.join();
  checks.check(num_errors < 60, "not every pass meets a change");
}

}  // namespace

void test_mapped_files(Checks& checks) {
  check_truncated_file(checks);
  check_many_threads_at_once(checks);
  check_many_guards(checks);
  check_other_handlers(checks);
}

void test_changing_input(Checks& checks) { check_changing_input(checks); }

}  // namespace metagpt_fast::test
