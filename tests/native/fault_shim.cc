// Preloaded (ld.so(8), LD_PRELOAD). The n-th call of a function of the C library fails, in any
// thread, if it comes from one of the libraries under test.
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#include <unwind.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <cstdarg>
#include <cstddef>
#include <cstdint>
#include <string_view>

namespace {

// Means "do less than requested"; other values are errno.
constexpr int kShort = -1;

struct Range {
  std::uintptr_t begin = 0;
  std::uintptr_t end = 0;
};

std::atomic<bool> armed = false;
std::array<char, 32> wanted{};
std::atomic<std::int64_t> left = 0;
int error = 0;
std::atomic<std::int64_t> calls = 0;
Range callers;    // whose calls count
Range passed_by;  // the standard library

bool within(const Range& range, std::uintptr_t at) {
  return range.begin <= at && at < range.end;
}

// The first caller that is not the standard library, which throws and starts threads for other
// code.
_Unwind_Reason_Code find_caller(_Unwind_Context* context, void* found) {
  const std::uintptr_t at = _Unwind_GetIP(context);
  if (within(passed_by, at)) return _URC_NO_REASON;
  *static_cast<std::uintptr_t*>(found) = at;
  return _URC_END_OF_STACK;
}

bool strikes(std::string_view function, const void* caller) {
  if (!armed.load(std::memory_order_acquire) || function != wanted.data()) return false;
  auto at = reinterpret_cast<std::uintptr_t>(caller);
  if (within(passed_by, at)) {
    // From the caller on: the frames below it are this library's.
    struct Search {
      std::uintptr_t from;
      std::uintptr_t found;
    };
    Search search{at, 0};
    _Unwind_Backtrace(
        [](_Unwind_Context* context, void* given) {
          auto& wanted_frame = *static_cast<Search*>(given);
          const std::uintptr_t frame = _Unwind_GetIP(context);
          if (wanted_frame.from != 0) {
            if (frame == wanted_frame.from) wanted_frame.from = 0;
            return _URC_NO_REASON;
          }
          return find_caller(context, &wanted_frame.found);
        },
        &search);
    at = search.found;
  }
  if (!within(callers, at)) return false;
  ++calls;
  return left.fetch_sub(1) == 1;
}

template <typename Function>
Function* real(Function* /*own*/, const char* name) {
  return reinterpret_cast<Function*>(::dlsym(RTLD_NEXT, name));
}

}  // namespace

#define WL_CALLER __builtin_return_address(0)
#define WL_REAL(name) static auto* const next = real(&::name, #name)

extern "C" {

// From now on, calls of `function` from the library `from` count, also through `by`; the n-th
// fails.
void fault_arm(const char* function, std::int64_t n, int with_error, Range from, Range by) {
  wanted.fill('\0');
  std::string_view(function).copy(wanted.data(), wanted.size() - 1);
  callers = from;
  passed_by = by;
  error = with_error;
  calls = 0;
  left = n;
  armed = true;
}

// The number of calls since then.
std::int64_t fault_disarm() {
  armed = false;
  return calls;
}

int open(const char* path, int flags, ...) {
  WL_REAL(open);
  va_list arguments;
  va_start(arguments, flags);
  const mode_t mode = va_arg(arguments, mode_t);
  va_end(arguments);
  if (strikes("open", WL_CALLER)) {
    errno = error;
    return -1;
  }
  return next(path, flags, mode);
}

// Linux has released the descriptor whatever close(2) returns.
int close(int fd) {
  WL_REAL(close);
  const bool struck = strikes("close", WL_CALLER);
  const int result = next(fd);
  if (!struck) return result;
  errno = error;
  return -1;
}

int fstat(int fd, struct stat* status) noexcept {
  WL_REAL(fstat);
  if (strikes("fstat", WL_CALLER)) {
    errno = error;
    return -1;
  }
  return next(fd, status);
}

int statx(int folder, const char* path, int flags, unsigned mask, struct statx* status) noexcept {
  WL_REAL(statx);
  if (strikes("statx", WL_CALLER)) {
    errno = error;
    return -1;
  }
  return next(folder, path, flags, mask, status);
}

void* mmap(void* at, std::size_t bytes, int access, int flags, int fd, off_t offset) noexcept {
  WL_REAL(mmap);
  if (strikes("mmap", WL_CALLER)) {
    errno = error;
    return MAP_FAILED;
  }
  return next(at, bytes, access, flags, fd, offset);
}

int madvise(void* at, std::size_t bytes, int advice) noexcept {
  WL_REAL(madvise);
  if (strikes("madvise", WL_CALLER)) {
    errno = error;
    return -1;
  }
  return next(at, bytes, advice);
}

int posix_fadvise(int fd, off_t offset, off_t bytes, int advice) noexcept {
  WL_REAL(posix_fadvise);
  if (strikes("posix_fadvise", WL_CALLER)) return error;
  return next(fd, offset, bytes, advice);
}

ssize_t pread(int fd, void* target, std::size_t bytes, off_t offset) {
  WL_REAL(pread);
  if (strikes("pread", WL_CALLER)) {
    if (error == kShort) return next(fd, target, std::max<std::size_t>(bytes / 3, 1), offset);
    errno = error;
    return -1;
  }
  return next(fd, target, bytes, offset);
}

ssize_t write(int fd, const void* source, std::size_t bytes) {
  WL_REAL(write);
  if (strikes("write", WL_CALLER)) {
    if (error == kShort) return next(fd, source, std::max<std::size_t>(bytes / 3, 1));
    errno = error;
    return -1;
  }
  return next(fd, source, bytes);
}

// Where the C library has no function of its own: cachestat(2).
long syscall(long number, ...) noexcept {
  WL_REAL(syscall);
  va_list arguments;
  va_start(arguments, number);
  std::array<long, 6> given{};
  for (long& one : given) one = va_arg(arguments, long);
  va_end(arguments);
  if (strikes("syscall", WL_CALLER)) {
    errno = error;
    return -1;
  }
  return next(number, given[0], given[1], given[2], given[3], given[4], given[5]);
}

int sched_getaffinity(pid_t process, std::size_t bytes, cpu_set_t* set) noexcept {
  WL_REAL(sched_getaffinity);
  if (strikes("sched_getaffinity", WL_CALLER)) {
    errno = error;
    return -1;
  }
  return next(process, bytes, set);
}

int pthread_create(pthread_t* thread, const pthread_attr_t* attributes, void* (*body)(void*),
                   void* argument) noexcept {
  WL_REAL(pthread_create);
  if (strikes("pthread_create", WL_CALLER)) return error;
  return next(thread, attributes, body, argument);
}

}  // extern "C"
