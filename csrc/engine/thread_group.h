// The threads that work for one load.
#pragma once

#include <chrono>
#include <exception>
#include <functional>
#include <thread>
#include <utility>
#include <vector>

#include "mutex.h"

namespace weightlift::engine {

class ThreadGroup {
 public:
  // `at_end` runs on the last thread that leaves.
  explicit ThreadGroup(std::function<void()> at_end) : at_end_(std::move(at_end)) {}
  ThreadGroup(const ThreadGroup&) = delete;
  ThreadGroup& operator=(const ThreadGroup&) = delete;
  ~ThreadGroup() { join(); }

  // The threads of all groups of this process, so that concurrent loads can limit their sum.
  [[nodiscard]] static unsigned busy() noexcept;

  // Starts a thread that runs `body`. Returns false if none can be started: a limit of the system
  // or the cgroup, or no memory.
  template <class Body>
  [[nodiscard]] bool spawn(Body body) WL_EXCLUDES(mutex_) {
    const MutexLock lock(mutex_);
    count_busy(1);
    try {
      threads_.emplace_back([this, body = std::move(body)] {
        body();
        count_busy(-1);
        leave();
      });
    } catch (const std::exception&) {
      count_busy(-1);
      return false;
    }
    ++working_;
    return true;
  }

  // The calling thread counts as working until it leaves. Do not enter after the last one has left.
  void enter() WL_EXCLUDES(mutex_);
  void leave() WL_EXCLUDES(mutex_);

  [[nodiscard]] bool ended() WL_EXCLUDES(mutex_);
  // Waits until no thread works or the limit has passed. Returns whether all work has ended.
  [[nodiscard]] bool wait(std::chrono::milliseconds limit) WL_EXCLUDES(mutex_);
  // Waits for all threads to end.
  void join() noexcept;

 private:
  static void count_busy(int change) noexcept;

  std::function<void()> at_end_;
  Mutex mutex_;
  ConditionVariable ended_;
  std::vector<std::thread> threads_;
  unsigned working_ WL_GUARDED_BY(mutex_) = 0;
};

}  // namespace weightlift::engine
