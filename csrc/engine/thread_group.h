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
  // `at_end` runs on the last thread when it has done its work.
  explicit ThreadGroup(std::function<void()> at_end) : at_end_(std::move(at_end)) {}
  ThreadGroup(const ThreadGroup&) = delete;
  ThreadGroup& operator=(const ThreadGroup&) = delete;
  ~ThreadGroup() { join(); }

  // Of all groups of this process, so that many loads at once do not make many times more.
  [[nodiscard]] static unsigned busy() noexcept;

  // A thread that runs `body`; false where there is none to be had: the system's or the cgroup's
  // limit, or no memory.
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

  // The calling thread works for the load until it leaves. Not after the last one has left.
  void enter() WL_EXCLUDES(mutex_);
  void leave() WL_EXCLUDES(mutex_);

  [[nodiscard]] bool ended() WL_EXCLUDES(mutex_);
  // Until nobody works any more, or the time is up: whether it has ended.
  [[nodiscard]] bool wait(std::chrono::milliseconds limit) WL_EXCLUDES(mutex_);
  // When it has ended, or will soon.
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
