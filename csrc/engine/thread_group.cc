#include "engine/thread_group.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <thread>

#include "mutex.h"

namespace weightlift::engine {
namespace {

std::atomic<unsigned> busy_threads{0};

}  // namespace

unsigned ThreadGroup::busy() noexcept {
  return busy_threads.load();
}

void ThreadGroup::count_busy(int change) noexcept {
  busy_threads += static_cast<unsigned>(change);
}

void ThreadGroup::enter() {
  const MutexLock lock(mutex_);
  ++working_;
}

void ThreadGroup::leave() {
  const MutexLock lock(mutex_);
  if (--working_ != 0) return;
  at_end_();
  ended_.notify_all();
}

bool ThreadGroup::ended() {
  const MutexLock lock(mutex_);
  return working_ == 0;
}

bool ThreadGroup::wait(std::chrono::milliseconds limit) {
  const auto end = std::chrono::steady_clock::now() + limit;
  const MutexLock lock(mutex_);
  while (working_ != 0) {
    if (ended_.wait_until(mutex_, end) == std::cv_status::timeout) return working_ == 0;
  }
  return true;
}

void ThreadGroup::join() noexcept {
  for (std::thread& thread : threads_) thread.join();
  threads_.clear();
}

}  // namespace weightlift::engine
