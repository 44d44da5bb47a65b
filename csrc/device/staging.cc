#include "device/staging.h"

#include <algorithm>
#include <utility>

namespace weightlift::device {

StagingPool& StagingPool::instance() {
  static auto* const pool = new StagingPool;  // CUDA calls after main are not allowed
  return *pool;
}

Result<std::optional<PinnedMemory>> StagingPool::take(Device& device, std::size_t bytes,
                                                      std::size_t budget) {
  {
    std::unique_lock lock(mutex_);
    while (true) {
      const auto found =
          std::find_if(free_.begin(), free_.end(),
                       [bytes](const PinnedMemory& slot) { return slot.size() == bytes; });
      if (found != free_.end()) {
        std::optional<PinnedMemory> slot(std::move(*found));
        free_.erase(found);
        return slot;
      }
      if (pinned_bytes_ + bytes <= budget) break;
      // Those of other sizes make room, and count until they are unpinned.
      if (free_.empty()) return std::optional<PinnedMemory>();
      std::optional<PinnedMemory> unfit(std::move(free_.front()));
      free_.pop_front();
      const std::size_t room = unfit->size();
      lock.unlock();
      unfit.reset();
      lock.lock();
      pinned_bytes_ -= room;
    }
    pinned_bytes_ += bytes;
  }
  auto slot = PinnedMemory::allocate(device, bytes);
  if (!slot.ok()) {
    const std::lock_guard lock(mutex_);
    pinned_bytes_ -= bytes;
    return slot.error();
  }
  return std::optional<PinnedMemory>(*std::move(slot));
}

void StagingPool::give_back(PinnedMemory slot) {
  const std::lock_guard lock(mutex_);
  free_.push_back(std::move(slot));
}

void StagingPool::abandon(PinnedMemory slot) {
  const std::lock_guard lock(mutex_);
  abandoned_.push_back(std::move(slot));
}

std::size_t StagingPool::pinned_bytes() const {
  const std::lock_guard lock(mutex_);
  return pinned_bytes_;
}

void StagingPool::clear() {
  std::list<PinnedMemory> gone;
  {
    const std::lock_guard lock(mutex_);
    gone.swap(free_);
  }
  std::size_t bytes = 0;
  for (const PinnedMemory& slot : gone) bytes += slot.size();
  gone.clear();
  const std::lock_guard lock(mutex_);
  pinned_bytes_ -= bytes;
}

}  // namespace weightlift::device
