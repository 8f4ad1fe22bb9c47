// What the tests of the kernels share: counting checks, random numbers that are the same everywhere, hashing.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <iostream>
#include <sstream>
#include <string>

namespace metagpt_fast::test {

// One test's checks. A failing check prints what it was about; the test goes on.
class Checks {
 public:
  void check(bool passed, const std::function<std::string()>& describe) {
    ++(passed ? num_passed_ : num_failed_);
    constexpr int kMaxPrinted = 20;
    if (!passed && num_failed_ <= kMaxPrinted) std::cerr << "FAILED: " << describe() << std::endl;
  }
  void check(bool passed, const char* what) {
    check(passed, [what] { return std::string(what); });
  }

  // The call must throw an Error for which `is_expected` holds.
  template <class Error, class Call, class Predicate>
  void check_throws(const char* what, Call call, Predicate is_expected) {
    std::string got = "nothing thrown";
    bool passed = false;
    try {
      call();
    } catch (const Error& error) {
      got = error.what();
      passed = is_expected(error);
    } catch (const std::exception& error) {
      got = std::string("another exception: ") + error.what();
    }
    check(passed, [&] { return std::string(what) + ": " + got; });
  }
  template <class Error, class Call>
  void check_throws(const char* what, Call call) {
    check_throws<Error>(what, call, [](const Error&) { return true; });
  }

  int num_passed() const { return num_passed_; }
  int num_failed() const { return num_failed_; }

 private:
  int num_passed_ = 0;
  int num_failed_ = 0;
};

// Joins the parts into one text: describe(a, " = ", b).
template <class... Parts>
std::string describe(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

// SplitMix64: integer arithmetic only, so that every machine draws the same numbers.
class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed) {}
  std::uint64_t bits() {
    std::uint64_t z = (state_ += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  std::uint64_t below(std::uint64_t bound) { return bits() % bound; }

 private:
  std::uint64_t state_;
};

// FNV-1a over 64-bit words.
class Hash {
 public:
  void add(std::uint64_t word) {
    for (int shift = 0; shift < 64; shift += 8) value_ = (value_ ^ ((word >> shift) & 0xff)) * 0x100000001b3u;
  }
  std::uint64_t value() const { return value_; }

 private:
  std::uint64_t value_ = 0xcbf29ce484222325u;
};

void test_layer_gram(Checks& checks);
void test_layer_merge(Checks& checks);
void test_layer_nonfinite(Checks& checks);
void test_layer_arguments(Checks& checks);
void test_golden_bits(Checks& checks);
void test_float_bits(Checks& checks);
void test_crc32c(Checks& checks);
void test_file_operands(Checks& checks);
void test_changing_input(Checks& checks);
void test_mapped_files(Checks& checks);
void test_thread_pool(Checks& checks);
void test_threads_around_kernels(Checks& checks);
void test_fork(Checks& checks);

}  // namespace metagpt_fast::test
