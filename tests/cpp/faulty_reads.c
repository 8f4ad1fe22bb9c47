// Loaded before libc (LD_PRELOAD): reads of chosen files fail, are cut short or are interrupted, at the n-th call.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

enum { kNone, kEio, kInterrupted, kShort, kEnd };

static _Atomic long g_countdown = 0;  // calls until the fault
static _Atomic int g_kind = kNone;
static _Atomic long g_num_faults = 0;
static _Atomic long g_num_calls = 0;
static char g_folder[4096];

// From the n-th read of a file below `folder` on, `count` reads have a fault.
static _Atomic long g_left = 0;
void faulty_reads_arm(const char* folder, int kind, long n, long count) {
  strncpy(g_folder, folder, sizeof(g_folder) - 1);
  g_num_faults = g_num_calls = 0;
  g_left = count;
  g_countdown = n;
  g_kind = kind;
}
void faulty_reads_disarm(void) { g_kind = kNone; }
long faulty_reads_num_faults(void) { return g_num_faults; }
long faulty_reads_num_calls(void) { return g_num_calls; }

static int is_chosen(int fd) {
  char link[64];
  char path[4096];
  snprintf(link, sizeof(link), "/proc/self/fd/%d", fd);
  const ssize_t length = readlink(link, path, sizeof(path) - 1);
  if (length < 0) return 0;
  path[length] = '\0';
  return strncmp(path, g_folder, strlen(g_folder)) == 0;
}

static int fault_of(int fd) {
  if (g_kind == kNone || !is_chosen(fd)) return kNone;
  ++g_num_calls;
  if (--g_countdown > 0 || g_left-- <= 0) return kNone;
  ++g_num_faults;
  return g_kind;
}

#define REAL(type, name) \
  static type real;      \
  if (real == 0) real = (type)dlsym(RTLD_NEXT, name)

typedef ssize_t (*Pread)(int, void*, size_t, off_t);
typedef ssize_t (*Preadv2)(int, const struct iovec*, int, off_t, int);
typedef ssize_t (*CopyRange)(int, off64_t*, int, off64_t*, size_t, unsigned int);

// Returns 1 if the call is over, with its result.
static int is_over(int fault, size_t* nbytes, ssize_t* result) {
  *result = fault == kEnd ? 0 : -1;
  if (fault == kEio) errno = EIO;
  if (fault == kInterrupted) errno = EINTR;
  if (fault == kShort && *nbytes > 1) *nbytes /= 2;
  return fault == kEio || fault == kInterrupted || fault == kEnd;
}

ssize_t pread64(int fd, void* buffer, size_t nbytes, off_t offset) {
  REAL(Pread, "pread64");
  ssize_t result;
  return is_over(fault_of(fd), &nbytes, &result) ? result : real(fd, buffer, nbytes, offset);
}

ssize_t pread(int fd, void* buffer, size_t nbytes, off_t offset) { return pread64(fd, buffer, nbytes, offset); }

ssize_t preadv64v2(int fd, const struct iovec* buffers, int count, off_t offset, int flags) {
  REAL(Preadv2, "preadv64v2");
  ssize_t result;
  size_t nbytes = 2;
  return is_over(fault_of(fd), &nbytes, &result) ? result : real(fd, buffers, count, offset, flags);
}

ssize_t preadv2(int fd, const struct iovec* buffers, int count, off_t offset, int flags) {
  return preadv64v2(fd, buffers, count, offset, flags);
}

ssize_t copy_file_range(int in, off64_t* in_offset, int out, off64_t* out_offset, size_t nbytes, unsigned int flags) {
  REAL(CopyRange, "copy_file_range");
  ssize_t result;
  return is_over(fault_of(in), &nbytes, &result) ? result : real(in, in_offset, out, out_offset, nbytes, flags);
}
