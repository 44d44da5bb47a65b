// What loads.py counts with, preloaded (ld.so(8), LD_PRELOAD): it counts allocations, and is
// callgrind's remote control.
#include <Python.h>

#include <array>
#include <atomic>
#include <cerrno>
#include <cstdarg>
#include <cstddef>
#include <cstdint>
#include <utility>

#if __has_include(<valgrind/callgrind.h>)
#include <valgrind/callgrind.h>
#endif

// What stands behind the functions below in the C library: dlsym(3) would allocate itself.
extern "C" {
void* __libc_malloc(std::size_t bytes);
void* __libc_calloc(std::size_t count, std::size_t bytes);
void* __libc_realloc(void* block, std::size_t bytes);
void* __libc_memalign(std::size_t alignment, std::size_t bytes);
}

namespace {

std::atomic<std::uint64_t> native_count = 0;
std::atomic<std::uint64_t> python_count = 0;
// What Python's allocator takes from the C library is counted as Python's. The model spares a call
// that may allocate at a thread's first use.
[[gnu::tls_model("initial-exec")]] thread_local bool in_python = false;

void count_native() {
  if (!in_python) native_count.fetch_add(1, std::memory_order_relaxed);
}

class PythonCall {
 public:
  PythonCall() { python_count.fetch_add(1, std::memory_order_relaxed); }
  PythonCall(const PythonCall&) = delete;
  PythonCall& operator=(const PythonCall&) = delete;
  ~PythonCall() { in_python = outer_; }

 private:
  bool outer_ = std::exchange(in_python, true);
};

PyMemAllocatorEx& below(void* context) {
  return *static_cast<PyMemAllocatorEx*>(context);
}

void* python_malloc(void* context, std::size_t bytes) {
  const PythonCall call;
  return below(context).malloc(below(context).ctx, bytes);
}

void* python_calloc(void* context, std::size_t count, std::size_t bytes) {
  const PythonCall call;
  return below(context).calloc(below(context).ctx, count, bytes);
}

void* python_realloc(void* context, void* block, std::size_t bytes) {
  const PythonCall call;
  return below(context).realloc(below(context).ctx, block, bytes);
}

void python_free(void* context, void* block) {
  below(context).free(below(context).ctx, block);
}

}  // namespace

extern "C" {

void* malloc(std::size_t bytes) {
  count_native();
  return __libc_malloc(bytes);
}

void* calloc(std::size_t count, std::size_t bytes) {
  count_native();
  return __libc_calloc(count, bytes);
}

void* realloc(void* block, std::size_t bytes) {
  count_native();
  return __libc_realloc(block, bytes);
}

void* memalign(std::size_t alignment, std::size_t bytes) {
  count_native();
  return __libc_memalign(alignment, bytes);
}

void* aligned_alloc(std::size_t alignment, std::size_t bytes) {
  return memalign(alignment, bytes);
}

int posix_memalign(void** block, std::size_t alignment, std::size_t bytes) {
  *block = memalign(alignment, bytes);
  return *block == nullptr ? ENOMEM : 0;
}

// From now on Python's allocations are counted.
void counters_hook_python() {
  static std::array<PyMemAllocatorEx, 2> originals;
  const std::array domains{PYMEM_DOMAIN_MEM, PYMEM_DOMAIN_OBJ};
  for (std::size_t i = 0; i < domains.size(); ++i) {
    PyMem_GetAllocator(domains[i], &originals[i]);
    PyMemAllocatorEx counting{&originals[i], python_malloc, python_calloc, python_realloc,
                              python_free};
    PyMem_SetAllocator(domains[i], &counting);
  }
}

std::uint64_t counters_native() {
  return native_count.load();
}

std::uint64_t counters_python() {
  return python_count.load();
}

// syscall(2), but that all is in the page cache where nobody answers cachestat: neither
// valgrind 3.19 nor Linux before 6.5 does, and the engine goes another way there.
long syscall(long number, ...) {
  std::array<long, 6> given;
  std::va_list list;
  va_start(list, number);
  for (long& argument : given) argument = va_arg(list, long);
  va_end(list);
  register long fourth asm("r10") = given[3];
  register long fifth asm("r8") = given[4];
  register long sixth asm("r9") = given[5];
  long result = number;
  asm volatile("syscall"
               : "+a"(result)
               : "D"(given[0]), "S"(given[1]), "d"(given[2]), "r"(fourth), "r"(fifth), "r"(sixth)
               : "rcx", "r11", "memory");
  constexpr long kCachestat = 451;
  if (number == kCachestat && result == -ENOSYS) {
    const auto* range = reinterpret_cast<const std::uint64_t*>(given[1]);
    *reinterpret_cast<std::uint64_t*>(given[2]) = range[1] / 4096 + 1;
    return 0;
  }
  if (result >= 0 || result < -4095) return result;
  errno = static_cast<int>(-result);
  return -1;
}

#ifdef CALLGRIND_START_INSTRUMENTATION
void counters_start() {
  CALLGRIND_START_INSTRUMENTATION;
}

void counters_stop() {
  CALLGRIND_STOP_INSTRUMENTATION;
}

// Writes what was counted to a file of callgrind's, under this name, and starts again at zero.
void counters_dump(const char* name) {
  CALLGRIND_DUMP_STATS_AT(name);
}
#endif
}
