#include "mapped_files.h"

#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <system_error>

namespace metagpt_fast {
namespace {

struct Guard {
  std::atomic<std::uintptr_t> begin{0};  // 0: not in use
  std::atomic<std::uintptr_t> end{0};
  std::atomic<std::int64_t> fault{-1};
};

// Guards live in blocks that are never freed: the signal's handler walks through them without a lock.
constexpr int kBlockSize = 256;
struct Block {
  Guard guards[kBlockSize];
  std::atomic<Block*> next{nullptr};
};

static_assert(std::atomic<std::uintptr_t>::is_always_lock_free && std::atomic<std::int64_t>::is_always_lock_free &&
              std::atomic<Block*>::is_always_lock_free);  // what a signal's handler may use

Block g_first_block;
std::mutex g_mutex;  // over the following, and over taking and giving back guards; the handler takes no lock
int g_num_guards = 0;
struct sigaction g_replaced = {};   // what is put back when the last guard goes
struct sigaction g_forwarded = {};  // what gets the faults that are not ours
bool g_is_beneath = false;          // a handler that was installed after ours may still call it

std::uintptr_t page_nbytes() {
  static const auto nbytes = static_cast<std::uintptr_t>(::sysconf(_SC_PAGESIZE));
  return nbytes;
}

Guard& guard_at(int index) {
  Block* block = &g_first_block;
  for (; index >= kBlockSize; index -= kBlockSize) block = block->next.load(std::memory_order_acquire);
  return block->guards[index];
}

Guard* find_guard(std::uintptr_t address) {
  for (Block* block = &g_first_block; block != nullptr; block = block->next.load(std::memory_order_acquire)) {
    for (Guard& guard : block->guards) {
      const std::uintptr_t begin = guard.begin.load(std::memory_order_acquire);
      if (begin != 0 && begin <= address && address < guard.end.load(std::memory_order_relaxed)) return &guard;
    }
  }
  return nullptr;
}

// Everything from the page on, not the page alone: a truncated file has lost all of it, and a signal per page of it
// would take seconds.
bool replace_by_zeros(std::uintptr_t address) {
  Guard* guard = find_guard(address);
  if (guard == nullptr) return false;
  const std::uintptr_t begin = guard->begin.load(std::memory_order_relaxed);
  const std::uintptr_t page = address / page_nbytes() * page_nbytes();
  const std::size_t nbytes = guard->end.load(std::memory_order_relaxed) - page;
  std::int64_t none = -1;
  guard->fault.compare_exchange_strong(none, static_cast<std::int64_t>(page - begin));
  void* zeros = ::mmap(reinterpret_cast<void*>(page), nbytes, PROT_READ,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0);
  return zeros != MAP_FAILED;
}

// The signal as it would have been without us.
void forward(int signal, siginfo_t* info, void* context) {
  if ((g_forwarded.sa_flags & SA_SIGINFO) != 0) {
    g_forwarded.sa_sigaction(signal, info, context);
  } else if (g_forwarded.sa_handler != SIG_DFL && g_forwarded.sa_handler != SIG_IGN) {
    g_forwarded.sa_handler(signal);
  } else if (g_forwarded.sa_handler == SIG_DFL || info->si_code > 0) {  // the system lets no fault be ignored
    struct sigaction fatal = {};
    fatal.sa_handler = SIG_DFL;
    ::sigaction(signal, &fatal, nullptr);
    ::raise(signal);  // delivered when this handler returns
  }
}

void on_bus_error(int signal, siginfo_t* info, void* context) {
  const int saved_errno = errno;
  // A code above 0: from the kernel, with an address. Others were sent by kill.
  const bool is_handled = info->si_code > 0 && replace_by_zeros(reinterpret_cast<std::uintptr_t>(info->si_addr));
  if (!is_handled) forward(signal, info, context);
  errno = saved_errno;
}

struct sigaction current_action() {
  struct sigaction current = {};
  ::sigaction(SIGBUS, nullptr, &current);
  return current;
}

bool is_ours(const struct sigaction& action) {
  return (action.sa_flags & SA_SIGINFO) != 0 && action.sa_sigaction == &on_bus_error;
}

void install_handler() {
  page_nbytes();  // the handler must not be the first to call it
  struct sigaction action = {};
  action.sa_sigaction = &on_bus_error;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_RESTART;
  ::sigemptyset(&action.sa_mask);
  const struct sigaction current = current_action();
  if (is_ours(current)) return;
  g_replaced = current;
  if (!g_is_beneath) g_forwarded = current;  // else forwarding to it could come back to us, without end
  if (::sigaction(SIGBUS, &action, nullptr) != 0) throw std::system_error(errno, std::generic_category(), "SIGBUS");
}

void remove_handler() {
  if (is_ours(current_action())) {
    ::sigaction(SIGBUS, &g_replaced, nullptr);
  } else {
    g_is_beneath = true;
  }
}

}  // namespace

int guard_mapping(std::uintptr_t address, std::size_t nbytes) {
  if (address == 0 || address % page_nbytes() != 0 || nbytes == 0) {
    throw std::invalid_argument("guard_mapping: expected the start of a mapping, and its size");
  }
  const std::lock_guard lock(g_mutex);
  int index = 0;
  Block* block = &g_first_block;
  for (;; ++index) {
    if (index > 0 && index % kBlockSize == 0) {
      Block* next = block->next.load(std::memory_order_relaxed);
      if (next == nullptr) {
        next = std::make_unique<Block>().release();
        block->next.store(next, std::memory_order_release);
      }
      block = next;
    }
    if (block->guards[index % kBlockSize].begin.load(std::memory_order_relaxed) == 0) break;
  }
  if (g_num_guards == 0) install_handler();
  ++g_num_guards;
  Guard& guard = block->guards[index % kBlockSize];
  guard.fault.store(-1, std::memory_order_relaxed);
  guard.end.store(address + (nbytes + page_nbytes() - 1) / page_nbytes() * page_nbytes(), std::memory_order_relaxed);
  guard.begin.store(address, std::memory_order_release);
  return index;
}

void unguard_mapping(int guard) {
  const std::lock_guard lock(g_mutex);
  guard_at(guard).begin.store(0, std::memory_order_release);
  if (--g_num_guards == 0) remove_handler();
}

std::int64_t fault_offset(int guard) { return guard_at(guard).fault.load(std::memory_order_acquire); }

}  // namespace metagpt_fast
