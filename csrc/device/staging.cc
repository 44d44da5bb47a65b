#include "device/staging.h"

#include <algorithm>
#include <utility>

namespace weightlift::device {

StagingPool& StagingPool::instance() {
  static auto* const pool = new StagingPool;  // CUDA calls after main are not allowed
  return *pool;
}

StagingSlot::~StagingSlot() {
  StagingPool& pool = StagingPool::instance();
  const std::lock_guard lock(pool.mutex_);
  pool.free_.splice(pool.free_.end(), memory_);
}

void StagingSlot::abandon() noexcept {
  StagingPool& pool = StagingPool::instance();
  const std::lock_guard lock(pool.mutex_);
  pool.abandoned_.splice(pool.abandoned_.end(), memory_);
}

Result<std::optional<StagingSlot>> StagingPool::take(Device& device, std::size_t bytes,
                                                     std::size_t budget) {
  std::list<PinnedMemory> memory;
  {
    std::unique_lock lock(mutex_);
    while (true) {
      const auto found =
          std::find_if(free_.begin(), free_.end(),
                       [bytes](const PinnedMemory& slot) { return slot.size() == bytes; });
      if (found != free_.end()) {
        memory.splice(memory.end(), free_, found);
        lock.unlock();  // the slot takes it when it dies
        return std::optional(StagingSlot(std::move(memory)));
      }
      if (pinned_bytes_ + bytes <= budget) break;
      // Those of other sizes make room, and count until they are unpinned.
      if (free_.empty()) return std::optional<StagingSlot>();
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
  // Counted back, whichever way this ends without a slot.
  struct Reserved {
    StagingPool& pool;
    std::size_t bytes;
    ~Reserved() {
      const std::lock_guard lock(pool.mutex_);
      pool.pinned_bytes_ -= bytes;
    }
  } reserved{*this, bytes};
  WL_ASSIGN_OR_RETURN(PinnedMemory made, PinnedMemory::allocate(device, bytes));
  memory.push_back(std::move(made));
  reserved.bytes = 0;
  return std::optional(StagingSlot(std::move(memory)));
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
