// Runs the tests named on the command line, or all of them. Exit status 1 if a check failed.
#include <cstring>
#include <iostream>

#include "check.h"
#include "core/thread_pool.h"
#include "cpu/isa.h"

namespace {

using namespace metagpt_fast;

struct Test {
  const char* name;
  void (*run)(test::Checks&);
};

// First those that fork, before there are threads that a sanitizer cannot follow into the child.
constexpr Test kTests[] = {
    {"fork", test::test_fork},
    {"thread_pool", test::test_thread_pool},
    {"threads_around_kernels", test::test_threads_around_kernels},
    {"float_bits", test::test_float_bits},
    {"golden_bits", test::test_golden_bits},
    {"layer_arguments", test::test_layer_arguments},
    {"layer_gram", test::test_layer_gram},
    {"layer_merge", test::test_layer_merge},
    {"layer_nonfinite", test::test_layer_nonfinite},
    {"crc32c", test::test_crc32c},
    {"file_operands", test::test_file_operands},
    {"mapped_files", test::test_mapped_files},
    {"changing_input", test::test_changing_input},
};

bool is_wanted(const Test& test, int argc, char** argv) {
  for (int i = 1; i < argc; ++i) {
    if (std::strcmp(argv[i], test.name) == 0) return true;
  }
  return argc == 1;
}

}  // namespace

int main(int argc, char** argv) {
  int num_passed = 0;
  int num_failed = 0;
  for (const Test& test : kTests) {
    if (!is_wanted(test, argc, argv)) continue;
    test::Checks checks;
    cpu::set_isa("auto");
    set_num_threads(2);
    test.run(checks);
    std::cout << test.name << ": " << checks.num_passed() << " passed, " << checks.num_failed() << " failed"
              << std::endl;
    num_passed += checks.num_passed();
    num_failed += checks.num_failed();
  }
  std::cout << "instruction sets:";
  for (const std::string& isa : cpu::supported_isas()) std::cout << ' ' << isa;
  std::cout << '\n' << num_passed << " passed, " << num_failed << " failed" << std::endl;
  return num_failed == 0 && num_passed > 0 ? 0 : 1;
}
