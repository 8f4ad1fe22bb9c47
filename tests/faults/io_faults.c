// LD_PRELOAD: makes the n-th call that changes files below a folder fail, fall short, or be the process's last.
//
// One call counts as one, whichever function and thread it comes from. `fault_arm` starts counting.

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum Mode { kOff, kError, kErrorFromThen, kShort, kKill, kPowerLoss, kUnsupported };
enum Kind { kWrite, kReserve, kCopy, kCreate, kName, kSync, kLock };

static atomic_int mode;        // enum Mode
static atomic_long countdown;  // calls until the one that is hit
static atomic_long num_calls;
static int error_code;
static char folder[PATH_MAX];

// Bytes that are written and not synced: what a power failure may lose.
struct Unsynced {
  char path[256];
  off_t offset;
  size_t nbytes;
};
static struct Unsynced unsynced[4096];
static int num_unsynced;
static atomic_flag is_busy = ATOMIC_FLAG_INIT;

static void lock_unsynced(void) {
  while (atomic_flag_test_and_set(&is_busy)) {
  }
}

static void unlock_unsynced(void) { atomic_flag_clear(&is_busy); }

static void* next(const char* name) { return dlsym(RTLD_NEXT, name); }
#define NEXT(name, type) ((type)next(name))

static int is_below(const char* path) { return folder[0] && strncmp(path, folder, strlen(folder)) == 0; }

static int path_of(int fd, char* path) {  // [PATH_MAX]
  char link[64];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  const ssize_t size = readlink(link, path, PATH_MAX - 1);
  if (size < 0) return 0;
  path[size] = 0;
  return is_below(path);
}

static void lose_power(void) {
  typedef ssize_t (*Pwrite)(int, const void*, size_t, off_t);
  static const char garbage[1 << 16];
  lock_unsynced();  // for good: no other thread writes any more
  for (int i = 0; i < num_unsynced; ++i) {
    if (i % 3 == 2) continue;  // some of it has reached the disk
    const int fd = open(unsynced[i].path, O_WRONLY | O_CLOEXEC);
    if (fd < 0) continue;
    for (size_t done = 0; done < unsynced[i].nbytes; done += sizeof garbage) {
      const size_t left = unsynced[i].nbytes - done;
      NEXT("pwrite64", Pwrite)(fd, garbage, left < sizeof garbage ? left : sizeof garbage, unsynced[i].offset + done);
    }
  }
}

static void die(void) {
  if (atomic_load(&mode) == kPowerLoss) lose_power();
  kill(getpid(), SIGKILL);
  for (;;) pause();
}

// Counts a call. Returns the errno that it is to fail with, 0 to go on, -1 to fall short.
static int count(enum Kind kind) {
  const int now = atomic_load(&mode);
  if (now == kOff) return 0;
  if (now == kUnsupported) return kind == kReserve || kind == kCopy || kind == kLock ? error_code : 0;
  if (now == kShort && kind != kWrite && kind != kCopy) return 0;
  atomic_fetch_add(&num_calls, 1);
  const long left = atomic_fetch_sub(&countdown, 1) - 1;
  if (now == kErrorFromThen) return left <= 0 && kind <= kCreate ? error_code : 0;
  if (left != 0) return 0;
  if (now == kKill || now == kPowerLoss) die();
  return now == kShort ? -1 : error_code;
}

void fault_arm(const char* below, int new_mode, long call, int code) {
  snprintf(folder, sizeof folder, "%s", below);
  atomic_store(&countdown, call);
  atomic_store(&num_calls, 0);
  error_code = code;
  num_unsynced = 0;
  atomic_store(&mode, new_mode);
}

long fault_num_calls(void) { return atomic_load(&num_calls); }

static void wrote(const char* path, off_t offset, ssize_t nbytes) {
  if (nbytes <= 0 || atomic_load(&mode) != kPowerLoss) return;
  lock_unsynced();
  if (num_unsynced < (int)(sizeof unsynced / sizeof unsynced[0])) {
    struct Unsynced* entry = &unsynced[num_unsynced++];
    snprintf(entry->path, sizeof entry->path, "%s", path);
    entry->offset = offset;
    entry->nbytes = (size_t)nbytes;
  }
  unlock_unsynced();
}

static void synced(const char* path) {
  lock_unsynced();
  int kept = 0;
  for (int i = 0; i < num_unsynced; ++i)
    if (strcmp(unsynced[i].path, path) != 0) unsynced[kept++] = unsynced[i];
  num_unsynced = kept;
  unlock_unsynced();
}

static size_t half(size_t nbytes) { return nbytes > 1 ? nbytes / 2 : nbytes; }

ssize_t write(int fd, const void* buffer, size_t nbytes) {
  typedef ssize_t (*Write)(int, const void*, size_t);
  char path[PATH_MAX];
  if (!path_of(fd, path)) return NEXT("write", Write)(fd, buffer, nbytes);
  const int fault = count(kWrite);
  if (fault > 0) return errno = fault, -1;
  const off_t offset = lseek(fd, 0, SEEK_CUR);
  const ssize_t done = NEXT("write", Write)(fd, buffer, fault < 0 ? half(nbytes) : nbytes);
  wrote(path, offset, done);
  return done;
}

ssize_t pwrite64(int fd, const void* buffer, size_t nbytes, off64_t offset) {
  typedef ssize_t (*Pwrite)(int, const void*, size_t, off64_t);
  char path[PATH_MAX];
  if (!path_of(fd, path)) return NEXT("pwrite64", Pwrite)(fd, buffer, nbytes, offset);
  const int fault = count(kWrite);
  if (fault > 0) return errno = fault, -1;
  const ssize_t done = NEXT("pwrite64", Pwrite)(fd, buffer, fault < 0 ? half(nbytes) : nbytes, offset);
  wrote(path, offset, done);
  return done;
}

ssize_t pwrite(int fd, const void* buffer, size_t nbytes, off_t offset) { return pwrite64(fd, buffer, nbytes, offset); }

ssize_t copy_file_range(int in, off64_t* in_offset, int out, off64_t* out_offset, size_t nbytes, unsigned flags) {
  typedef ssize_t (*Copy)(int, off64_t*, int, off64_t*, size_t, unsigned);
  char path[PATH_MAX];
  if (!path_of(out, path)) return NEXT("copy_file_range", Copy)(in, in_offset, out, out_offset, nbytes, flags);
  const int fault = count(kCopy);
  if (fault > 0) return errno = fault, -1;
  const off64_t offset = out_offset ? *out_offset : 0;
  const size_t wanted = fault < 0 ? half(nbytes) : nbytes;
  const ssize_t done = NEXT("copy_file_range", Copy)(in, in_offset, out, out_offset, wanted, flags);
  wrote(path, offset, done);
  return done;
}

int posix_fallocate64(int fd, off64_t offset, off64_t nbytes) {
  typedef int (*Reserve)(int, off64_t, off64_t);
  char path[PATH_MAX];
  const int fault = path_of(fd, path) ? count(kReserve) : 0;
  return fault > 0 ? fault : NEXT("posix_fallocate64", Reserve)(fd, offset, nbytes);
}

int posix_fallocate(int fd, off_t offset, off_t nbytes) { return posix_fallocate64(fd, offset, nbytes); }

#define ON_FD(name, kind, after)                                                 \
  int name(int fd) {                                                             \
    char path[PATH_MAX];                                                         \
    const int is_ours = path_of(fd, path);                                       \
    const int fault = is_ours ? count(kind) : 0;                                 \
    if (fault > 0) return errno = fault, -1;                                     \
    const int result = NEXT(#name, int (*)(int))(fd);                            \
    if (is_ours && result == 0 && atomic_load(&mode) == kPowerLoss) after(path); \
    return result;                                                               \
  }

ON_FD(fsync, kSync, synced)
ON_FD(fdatasync, kSync, synced)

#define ON_FD_SIZE(name)                                    \
  int name(int fd, off_t nbytes) {                          \
    char path[PATH_MAX];                                    \
    const int fault = path_of(fd, path) ? count(kName) : 0; \
    if (fault > 0) return errno = fault, -1;                \
    return NEXT(#name, int (*)(int, off_t))(fd, nbytes);    \
  }

ON_FD_SIZE(ftruncate)
ON_FD_SIZE(ftruncate64)

int flock(int fd, int operation) {
  char path[PATH_MAX];
  const int fault = path_of(fd, path) ? count(kLock) : 0;
  if (fault > 0) return errno = fault, -1;
  return NEXT("flock", int (*)(int, int))(fd, operation);
}

static int name_fault(enum Kind kind, const char* path) { return is_below(path) ? count(kind) : 0; }

int rename(const char* from, const char* to) {
  const int fault = name_fault(kName, to);
  if (fault > 0) return errno = fault, -1;
  return NEXT("rename", int (*)(const char*, const char*))(from, to);
}

int renameat2(int from_folder, const char* from, int to_folder, const char* to, unsigned flags) {
  typedef int (*Rename)(int, const char*, int, const char*, unsigned);
  const int fault = name_fault(kName, to);
  if (fault > 0) return errno = fault, -1;
  return NEXT("renameat2", Rename)(from_folder, from, to_folder, to, flags);
}

int mkdir(const char* path, mode_t permissions) {
  const int fault = name_fault(kCreate, path);
  if (fault > 0) return errno = fault, -1;
  return NEXT("mkdir", int (*)(const char*, mode_t))(path, permissions);
}

#define OPEN(name)                                                                \
  int name(const char* path, int flags, ...) {                                    \
    va_list rest;                                                                 \
    va_start(rest, flags);                                                        \
    const mode_t permissions = flags & O_CREAT ? va_arg(rest, mode_t) : 0;        \
    va_end(rest);                                                                 \
    const int fault = flags & O_CREAT ? name_fault(kCreate, path) : 0;            \
    if (fault > 0) return errno = fault, -1;                                      \
    return NEXT(#name, int (*)(const char*, int, ...))(path, flags, permissions); \
  }

OPEN(open)
OPEN(open64)

// Deletions are points to be killed at; they do not fail.
#define ON_PATH(name)                                                        \
  int name(const char* path) {                                               \
    const int now = atomic_load(&mode);                                      \
    if ((now == kKill || now == kPowerLoss) && is_below(path)) count(kName); \
    return NEXT(#name, int (*)(const char*))(path);                          \
  }

ON_PATH(unlink)
ON_PATH(rmdir)

int unlinkat(int at, const char* path, int flags) {
  const int now = atomic_load(&mode);
  char parent[PATH_MAX];
  if ((now == kKill || now == kPowerLoss) && (is_below(path) || (at >= 0 && path_of(at, parent)))) count(kName);
  return NEXT("unlinkat", int (*)(int, const char*, int))(at, path, flags);
}
