#include "device/pinned.h"

#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <exception>
#include <list>
#include <thread>
#include <utility>

#include "device/context.h"
#include "device/driver.h"
#include "io/anonymous_memory.h"
#include "mutex.h"
#include "result.h"

namespace weightlift::device {

namespace {

constexpr std::chrono::milliseconds kCaptureRetry{100};
constexpr std::chrono::seconds kPatience{10};

// The memory that was passed to release_later(). The thread lives while there is some.
struct Releases {
  Mutex mutex;
  ConditionVariable done;
  std::list<PinnedMemory> waiting WL_GUARDED_BY(mutex);
  bool running WL_GUARDED_BY(mutex) = false;
  std::thread thread WL_GUARDED_BY(mutex);

  // Only when `running` is false: the thread then takes no lock any more.
  void join() WL_REQUIRES(mutex) {
    if (thread.joinable()) thread.join();
  }
};

Releases& releases() {
  static auto* const instance = new Releases;  // outlives every other static
  return *instance;
}

void release_all(Releases& state) noexcept {
  const MutexLock lock(state.mutex);
  while (!state.waiting.empty()) {
    std::list<PinnedMemory> gone;
    gone.swap(state.waiting);
    const MutexUnlock unlocked(state.mutex);
    while (!wait_for_devices()) std::this_thread::sleep_for(kCaptureRetry);
    gone.clear();
  }
  state.running = false;
  state.done.notify_all();
}

}  // namespace

void release_later(std::list<PinnedMemory> memory) noexcept {
  if (!uses_driver()) return;  // in a child, where the mutex may stay locked for ever
  Releases& state = releases();
  {
    const MutexLock lock(state.mutex);
    state.waiting.splice(state.waiting.end(), memory);
    if (state.running) return;
    state.join();
    state.running = true;
    bool started = true;
    try {
      state.thread = std::thread([&state] { release_all(state); });
    } catch (const std::exception&) {  // no thread can be started
      started = false;
    }
    if (started) return;
  }
  release_all(state);
}

void wait_for_releases() noexcept {
  if (!uses_driver()) return;
  Releases& state = releases();
  const MutexLock lock(state.mutex);
  const auto end = std::chrono::steady_clock::now() + kPatience;
  while (state.running) {
    if (state.done.wait_until(state.mutex, end) == std::cv_status::timeout) return;
  }
  state.join();
}

Result<PinnedMemory> PinnedMemory::adopt(Device& device, io::AnonymousMemory memory) {
  const CurrentContext current(device);
  WL_RETURN_IF_ERROR(current.status());
  const Driver& table = device.driver();
  const std::size_t bytes = memory.size();
  std::byte* const own = memory.data();
  const Status registered = check(
      table, table.cuMemHostRegister(own, bytes, CU_MEMHOSTREGISTER_PORTABLE), "cuMemHostRegister");
  if (registered.ok()) return PinnedMemory(device, std::move(memory), own, bytes);

  {
    const io::AnonymousMemory gone = std::move(memory);
  }  // the two never exist at once
  void* data = nullptr;
  const Status allocated =
      check(table, table.cuMemHostAlloc(&data, bytes, CU_MEMHOSTALLOC_PORTABLE), "cuMemHostAlloc");
  if (!allocated.ok()) {
    Error error = registered.error();
    error.message += "; " + allocated.error().message +
                     "; raise the limit of pinned memory (`ulimit -l`, or the container's)";
    return error;
  }
  return PinnedMemory(device, io::AnonymousMemory(), static_cast<std::byte*>(data), bytes);
}

Result<PinnedMemory> PinnedMemory::allocate(Device& device, std::size_t bytes) {
  WL_ASSIGN_OR_RETURN(io::AnonymousMemory memory, io::AnonymousMemory::allocate(bytes));
  memory.keep_from_children();
  memory.prefer_node(device.node());
  WL_RETURN_IF_ERROR(memory.populate(0, memory.size()));
  return adopt(device, std::move(memory));
}

PinnedMemory::~PinnedMemory() {
  if (device_ == nullptr) return;
  if (!uses_driver()) {  // in a child, which has neither the driver nor the pages
    memory_.forget();
    return;
  }
  const CurrentContext current(*device_);
  // A driver that is shut down returns an error, and has unpinned the pages already.
  if (!current.ok()) return;
  if (memory_.data() != nullptr) {
    device_->driver().cuMemHostUnregister(data_);
  } else {
    device_->driver().cuMemFreeHost(data_);
  }
}

}  // namespace weightlift::device
