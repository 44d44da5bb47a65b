#include "device/staging.h"

#include <algorithm>
#include <cstddef>
#include <list>
#include <optional>
#include <string>
#include <utility>

#include "device/context.h"
#include "device/pinned.h"
#include "mutex.h"
#include "result.h"

namespace weightlift::device {

StagingPool& StagingPool::instance() {
  static auto* const pool = new StagingPool;  // never destroyed: CUDA may not be called after main
  return *pool;
}

StagingSlot::~StagingSlot() {
  if (memory_.empty()) return;
  StagingPool& pool = StagingPool::instance();
  const MutexLock lock(pool.mutex_);
  pool.busy_bytes_ -= size();
  pool.free_.splice(pool.free_.end(), memory_);
  ++pool.changes_;
}

void StagingSlot::abandon() noexcept {
  if (memory_.empty()) return;
  StagingPool& pool = StagingPool::instance();
  const MutexLock lock(pool.mutex_);
  pool.busy_bytes_ -= size();
  pool.abandoned_bytes_ += size();
  pool.abandoned_.splice(pool.abandoned_.end(), memory_);
  ++pool.changes_;
}

StagingPool::Waiting::Waiting(StagingPool& pool) : pool_(pool) {
  const MutexLock lock(pool_.mutex_);
  ++pool_.waiting_;
}

StagingPool::Waiting::~Waiting() {
  const MutexLock lock(pool_.mutex_);
  --pool_.waiting_;
  ++pool_.changes_;
}

Result<std::optional<StagingSlot>> StagingPool::take(Device& device, std::size_t bytes,
                                                     std::size_t budget, SlotClaim claim) {
  std::list<PinnedMemory> memory;
  {
    const MutexLock lock(mutex_);
    if (claim == SlotClaim::kFurther && waiting_ != 0) return std::optional<StagingSlot>();
    while (true) {
      const bool may_pin = fits(bytes, budget);
      auto found = find_free(bytes, device.node());
      if (found == free_.end() && !may_pin) found = find_free(bytes, std::nullopt);
      if (found != free_.end()) {
        memory.splice(memory.end(), free_, found);
        busy_bytes_ += bytes;
        break;
      }
      if (may_pin) break;
      if (free_.empty()) {
        if (auto error = why_nothing_comes_back(budget)) return *std::move(error);
        return std::optional<StagingSlot>();
      }
      unpin_a_free_slot();  // of another size
    }
    if (memory.empty()) {
      pinned_bytes_ += bytes;
      busy_bytes_ += bytes;
    }
  }
  if (memory.empty()) {
    WL_ASSIGN_OR_RETURN(memory, pin(device, bytes));
  }
  return std::optional(StagingSlot(std::move(memory)));
}

Result<bool> StagingPool::add_free(Device& device, std::size_t bytes, std::size_t budget,
                                   std::size_t wanted) {
  struct Adding {
    StagingPool& pool;
    bool counted = false;
    ~Adding() {
      if (!counted) return;
      const MutexLock lock(pool.mutex_);
      --pool.adding_;
    }
  } adding{*this};
  {
    const MutexLock lock(mutex_);
    const auto is_near = [&](const PinnedMemory& slot) {
      return slot.size() == bytes && slot.node() == device.node();
    };
    const auto there = static_cast<std::size_t>(std::count_if(free_.begin(), free_.end(), is_near));
    if (there + adding_ >= wanted || waiting_ != 0 || !fits(bytes, budget)) return false;
    adding.counted = true;
    ++adding_;
    pinned_bytes_ += bytes;
    busy_bytes_ += bytes;
  }
  WL_ASSIGN_OR_RETURN(std::list<PinnedMemory> memory, pin(device, bytes));
  const StagingSlot goes_back(std::move(memory));
  return true;
}

bool StagingPool::fits(std::size_t bytes, std::size_t budget) const {
  return pinned_bytes_ + bytes <= budget + std::min(abandoned_bytes_, budget);
}

Result<std::list<PinnedMemory>> StagingPool::pin(Device& device, std::size_t bytes) {
  // Undoes the reservation if this ends without a slot.
  struct Reserved {
    StagingPool& pool;
    std::size_t bytes;
    ~Reserved() {
      if (bytes == 0) return;
      const MutexLock lock(pool.mutex_);
      pool.pinned_bytes_ -= bytes;
      pool.busy_bytes_ -= bytes;
      ++pool.changes_;
    }
  } reserved{*this, bytes};
  WL_ASSIGN_OR_RETURN(PinnedMemory made, PinnedMemory::allocate(device, bytes));
  std::list<PinnedMemory> memory;
  memory.push_back(std::move(made));
  reserved.bytes = 0;
  return memory;
}

std::list<PinnedMemory>::iterator StagingPool::find_free(std::size_t bytes,
                                                         std::optional<int> node) {
  return std::find_if(free_.begin(), free_.end(), [bytes, node](const PinnedMemory& slot) {
    return slot.size() == bytes && (!node || slot.node() == *node);
  });
}

// Its bytes count as busy until they are unpinned. Unlocks meanwhile, because unpinning takes long.
void StagingPool::unpin_a_free_slot() {
  std::optional<PinnedMemory> unfit(std::move(free_.front()));
  free_.pop_front();
  const std::size_t room = unfit->size();
  busy_bytes_ += room;
  {
    const MutexUnlock unlocked(mutex_);
    unfit.reset();
  }
  pinned_bytes_ -= room;
  busy_bytes_ -= room;
  ++changes_;
}

std::optional<Error> StagingPool::why_nothing_comes_back(std::size_t budget) const {
  if (busy_bytes_ != 0) return std::nullopt;
  return Error{.code = ErrorCode::kDriverCallFailed,
               .message = std::to_string(abandoned_bytes_ >> 20) +
                          " MiB of pinned memory were abandoned, because waiting for copies to a "
                          "device failed, and at most " +
                          std::to_string(budget >> 20) +
                          " MiB more may be pinned: restart the process"};
}

std::size_t StagingPool::free_slots(std::size_t bytes) const {
  const MutexLock lock(mutex_);
  return static_cast<std::size_t>(
      std::count_if(free_.begin(), free_.end(),
                    [bytes](const PinnedMemory& slot) { return slot.size() == bytes; }));
}

unsigned StagingPool::waiting() const {
  const MutexLock lock(mutex_);
  return waiting_;
}

std::size_t StagingPool::pinned_bytes() const {
  const MutexLock lock(mutex_);
  return pinned_bytes_;
}

std::size_t StagingPool::abandoned_bytes() const {
  const MutexLock lock(mutex_);
  return abandoned_bytes_;
}

void StagingPool::clear() {
  const MutexLock lock(mutex_);
  while (!free_.empty()) unpin_a_free_slot();
}

}  // namespace weightlift::device
