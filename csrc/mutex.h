// A mutex, locks and a condition variable with clang's thread safety annotations, so that `make
// tidy` finds a member that is used without its lock
// (https://clang.llvm.org/docs/ThreadSafetyAnalysis.html). The standard library's own types have no
// annotations.
#pragma once

#include <chrono>
#include <condition_variable>
#include <mutex>

#if defined(__clang__)
#define WL_THREAD_ANNOTATION(x) __attribute__((x))
#else
#define WL_THREAD_ANNOTATION(x)
#endif

#define WL_CAPABILITY(name) WL_THREAD_ANNOTATION(capability(name))
#define WL_SCOPED_CAPABILITY WL_THREAD_ANNOTATION(scoped_lockable)
#define WL_GUARDED_BY(mutex) WL_THREAD_ANNOTATION(guarded_by(mutex))
#define WL_REQUIRES(...) WL_THREAD_ANNOTATION(requires_capability(__VA_ARGS__))
#define WL_EXCLUDES(...) WL_THREAD_ANNOTATION(locks_excluded(__VA_ARGS__))
#define WL_ACQUIRE(...) WL_THREAD_ANNOTATION(acquire_capability(__VA_ARGS__))
#define WL_RELEASE(...) WL_THREAD_ANNOTATION(release_capability(__VA_ARGS__))
#define WL_RETURN_CAPABILITY(mutex) WL_THREAD_ANNOTATION(lock_returned(mutex))

namespace weightlift {

class WL_CAPABILITY("mutex") Mutex {
 public:
  Mutex() = default;
  Mutex(const Mutex&) = delete;
  Mutex& operator=(const Mutex&) = delete;
  ~Mutex() = default;

  void lock() WL_ACQUIRE() { mutex_.lock(); }
  void unlock() WL_RELEASE() { mutex_.unlock(); }
  // For the handlers of pthread_atfork(3): one locks, another unlocks, which the analysis cannot
  // follow.
  void lock_for_fork() { mutex_.lock(); }
  void unlock_after_fork() { mutex_.unlock(); }

 private:
  friend class ConditionVariable;
  std::mutex mutex_;
};

// Holds a mutex for a scope.
class WL_SCOPED_CAPABILITY MutexLock {
 public:
  explicit MutexLock(Mutex& mutex) WL_ACQUIRE(mutex) : mutex_(mutex) { mutex_.lock(); }
  MutexLock(const MutexLock&) = delete;
  MutexLock& operator=(const MutexLock&) = delete;
  ~MutexLock() WL_RELEASE() { mutex_.unlock(); }

 private:
  Mutex& mutex_;
};

// Unlocks a held mutex for a scope. The analysis takes the end of a scoped capability as the
// reverse of its constructor, so WL_RELEASE on the destructor means that it locks again.
class WL_SCOPED_CAPABILITY MutexUnlock {
 public:
  explicit MutexUnlock(Mutex& mutex) WL_RELEASE(mutex) : mutex_(mutex) { mutex_.unlock(); }
  MutexUnlock(const MutexUnlock&) = delete;
  MutexUnlock& operator=(const MutexUnlock&) = delete;
  ~MutexUnlock() WL_RELEASE() { mutex_.lock(); }

 private:
  Mutex& mutex_;
};

// Waits may wake up spuriously: test the condition in a loop.
class ConditionVariable {
 public:
  void wait(Mutex& mutex) WL_REQUIRES(mutex) {
    std::unique_lock lock(mutex.mutex_, std::adopt_lock);
    condition_.wait(lock);
    lock.release();
  }
  std::cv_status wait_until(Mutex& mutex, std::chrono::steady_clock::time_point end)
      WL_REQUIRES(mutex) {
    std::unique_lock lock(mutex.mutex_, std::adopt_lock);
    const std::cv_status status = condition_.wait_until(lock, end);
    lock.release();
    return status;
  }
  void notify_one() noexcept { condition_.notify_one(); }
  void notify_all() noexcept { condition_.notify_all(); }

 private:
  std::condition_variable condition_;
};

}  // namespace weightlift
