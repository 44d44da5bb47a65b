#include "device/staging.h"

#include <iterator>
#include <utility>

namespace weightlift::device {

StagingPool& StagingPool::instance() {
  static auto* const pool = new StagingPool;  // CUDA calls after main are not allowed
  return *pool;
}

Result<std::optional<PinnedMemory>> StagingPool::take(Device& device, std::size_t bytes,
                                                      std::size_t budget) {
  std::vector<PinnedMemory> unfit;  // unpinned after the lock is gone
  {
    const std::lock_guard lock(mutex_);
    std::vector<PinnedMemory> kept;
    std::optional<PinnedMemory> found;
    for (PinnedMemory& slot : free_) {
      if (slot.size() == bytes && !found) {
        found.emplace(std::move(slot));
      } else if (slot.size() != bytes && pinned_bytes_ + bytes > budget) {
        pinned_bytes_ -= slot.size();
        unfit.push_back(std::move(slot));
      } else {
        kept.push_back(std::move(slot));
      }
    }
    free_.swap(kept);
    if (found) return found;
    if (pinned_bytes_ + bytes > budget) return std::optional<PinnedMemory>();
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

std::size_t StagingPool::pinned_bytes() const {
  const std::lock_guard lock(mutex_);
  return pinned_bytes_;
}

void StagingPool::clear() {
  std::vector<PinnedMemory> gone;
  const std::lock_guard lock(mutex_);
  for (PinnedMemory& slot : free_) {
    pinned_bytes_ -= slot.size();
    gone.push_back(std::move(slot));
  }
  free_.clear();
}

}  // namespace weightlift::device
