// The pinned slots through which all loads stage: one small pool for the process, whose slots are
// reused and never freed at exit.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <list>
#include <optional>
#include <utility>

#include "device/pinned.h"
#include "mutex.h"
#include "result.h"

namespace weightlift::device {

// A slot lent by the pool. The destructor returns it.
class StagingSlot {
 public:
  StagingSlot(StagingSlot&& other) noexcept = default;
  StagingSlot& operator=(StagingSlot&& other) = delete;
  ~StagingSlot();

  [[nodiscard]] std::byte* data() const noexcept { return memory_.front().data(); }
  [[nodiscard]] std::size_t size() const noexcept { return memory_.front().size(); }

  // Leaves the slot pinned and mapped until the process ends: a lost device may still read it.
  void abandon() noexcept;

 private:
  friend class StagingPool;
  explicit StagingSlot(std::list<PinnedMemory> memory) noexcept : memory_(std::move(memory)) {}

  std::list<PinnedMemory> memory_;  // one element: moving it between lists needs no memory
};

// The priority when the budget is short: loads without a slot come before loads that could use one
// more.
enum class SlotClaim : std::uint8_t { kFirst, kFurther };

class StagingPool {
 public:
  [[nodiscard]] static StagingPool& instance();

  // Returns a slot of `bytes`: a free one on the device's node; else a new one while at most
  // `budget` bytes are pinned; else a free one on another node. Returns nothing if others hold the
  // budget, or if this is a further slot and another load waits for its first. Pins without holding
  // the lock, so that several threads can make the slots of the first load at the same time.
  //
  // Abandoned slots never come back, so up to `budget` bytes of them do not count as pinned.
  // kDriverCallFailed if more are abandoned and no lent slot can come back.
  [[nodiscard]] Result<std::optional<StagingSlot>> take(Device& device, std::size_t bytes,
                                                        std::size_t budget,
                                                        SlotClaim claim = SlotClaim::kFirst);

  // Pins a slot for a load that will take it, and leaves it free. Returns whether it did: not if
  // `wanted` such slots are free on the device's node or being made by other calls, the budget is
  // used up, or somebody waits for a first slot.
  [[nodiscard]] Result<bool> add_free(Device& device, std::size_t bytes, std::size_t budget,
                                      std::size_t wanted);
  [[nodiscard]] std::size_t free_slots(std::size_t bytes) const;  // on any node

  // Its owner has no slot and waits for one, as long as the object lives.
  class Waiting {
   public:
    explicit Waiting(StagingPool& pool);
    Waiting(const Waiting&) = delete;
    Waiting& operator=(const Waiting&) = delete;
    ~Waiting();

   private:
    StagingPool& pool_;
  };

  // The number of Waiting objects.
  [[nodiscard]] unsigned waiting() const;

  // A counter that changes whenever take() might return something else. Takes no lock.
  [[nodiscard]] std::uint64_t changes() const noexcept { return changes_.load(); }

  [[nodiscard]] std::size_t pinned_bytes() const;  // including abandoned slots
  [[nodiscard]] std::size_t abandoned_bytes() const;

  void clear();  // unpins the free slots

 private:
  friend class StagingSlot;
  StagingPool() = default;

  // Makes a slot whose bytes are already reserved. An error undoes the reservation.
  [[nodiscard]] Result<std::list<PinnedMemory>> pin(Device& device, std::size_t bytes);
  [[nodiscard]] bool fits(std::size_t bytes, std::size_t budget) const WL_REQUIRES(mutex_);
  // The first free slot of this size, on `node` if one is given.
  [[nodiscard]] std::list<PinnedMemory>::iterator find_free(std::size_t bytes,
                                                            std::optional<int> node)
      WL_REQUIRES(mutex_);
  void unpin_a_free_slot() WL_REQUIRES(mutex_);
  [[nodiscard]] std::optional<Error> why_nothing_comes_back(std::size_t budget) const
      WL_REQUIRES(mutex_);

  mutable Mutex mutex_;
  std::list<PinnedMemory> free_ WL_GUARDED_BY(mutex_);
  std::list<PinnedMemory> abandoned_ WL_GUARDED_BY(mutex_);
  std::size_t pinned_bytes_ WL_GUARDED_BY(mutex_) = 0;
  std::size_t abandoned_bytes_ WL_GUARDED_BY(mutex_) = 0;  // of pinned_bytes_
  std::size_t busy_bytes_ WL_GUARDED_BY(mutex_) =
      0;  // of pinned_bytes_: lent, being pinned or unpinned
  unsigned waiting_ WL_GUARDED_BY(mutex_) = 0;
  std::size_t adding_ WL_GUARDED_BY(mutex_) = 0;  // calls of add_free() that pin, on any node
  std::atomic<std::uint64_t> changes_ = 0;
};

}  // namespace weightlift::device
