#include "isa.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace metagpt_fast::cpu {
namespace {

bool processor_has_avx2() {
#if defined(__x86_64__)
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  const bool has_f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c;  // Clang cannot be asked for F16C
#else
  return false;
#endif
}

bool processor_has_avx512() {
#if defined(__x86_64__)
  return processor_has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#else
  return false;
#endif
}

std::vector<const KernelTable*> supported_tables() {
  std::vector<const KernelTable*> tables{scalar_kernels()};
  if (avx2_kernels() != nullptr && processor_has_avx2()) tables.push_back(avx2_kernels());
  if (avx512_kernels() != nullptr && processor_has_avx512()) tables.push_back(avx512_kernels());
  if (neon_kernels() != nullptr) tables.push_back(neon_kernels());  // part of every 64-bit Arm processor
  return tables;
}

const KernelTable* find_table(const std::string& name, const std::string& where) {
  std::string supported;
  for (const KernelTable* table : supported_tables()) {
    if (name == table->isa) return table;
    supported += (supported.empty() ? "" : ", ") + std::string(table->isa);
  }
  throw std::invalid_argument(where + ": got '" + name + "', expected one of " + supported + " on this machine");
}

std::atomic<const KernelTable*> g_chosen{nullptr};

}  // namespace

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const KernelTable* table : supported_tables()) names.emplace_back(table->isa);
  return names;
}

const KernelTable& kernels() {
  const KernelTable* table = g_chosen.load();
  if (table == nullptr) {
    const char* name = std::getenv("METAGPT_FAST_ISA");
    const bool forced = name != nullptr && *name != '\0' && std::string(name) != "auto";
    table = forced ? find_table(name, "METAGPT_FAST_ISA") : supported_tables().back();
    g_chosen.store(table);
  }
  return *table;
}

void set_isa(const std::string& name) { g_chosen.store(name == "auto" ? nullptr : find_table(name, "isa")); }

}  // namespace metagpt_fast::cpu
