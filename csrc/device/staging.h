// The pinned slots that every load stages through: one pool a process, small, reused, and left
// alone at exit.
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

// A slot on loan: it goes back to the pool when it dies.
class StagingSlot {
 public:
  StagingSlot(StagingSlot&& other) noexcept = default;
  StagingSlot& operator=(StagingSlot&& other) = delete;
  ~StagingSlot();

  [[nodiscard]] std::byte* data() const noexcept { return memory_.front().data(); }
  [[nodiscard]] std::size_t size() const noexcept { return memory_.front().size(); }

  // Leaves it pinned and mapped for ever: a lost device may still be reading it.
  void abandon() noexcept;

 private:
  friend class StagingPool;
  explicit StagingSlot(std::list<PinnedMemory> memory) noexcept : memory_(std::move(memory)) {}

  std::list<PinnedMemory> memory_;  // of one: it moves between lists, which needs no memory
};

// Whose turn it is where the budget is short: loads that have no slot come before those that could
// use one more.
enum class SlotClaim : std::uint8_t { kFirst, kFurther };

class StagingPool {
 public:
  [[nodiscard]] static StagingPool& instance();

  // A slot of `bytes`: a free one on the device's node, or a new one while no more than `budget`
  // bytes are pinned, or a free one on another node;
  // nothing where others hold the budget, or wait for a first slot when this is a further one. Pins
  // without holding the lock: several threads make the slots of a first load at the same time.
  //
  // What was abandoned does not count, so that a load need not wait for what never comes back, but
  // for no more than the budget once more: beyond that, and where nobody holds what could come
  // back, kDriverCallFailed says so.
  [[nodiscard]] Result<std::optional<StagingSlot>> take(Device& device, std::size_t bytes,
                                                        std::size_t budget,
                                                        SlotClaim claim = SlotClaim::kFirst);

  // Pins a slot that is left free, for a load that will take it: whether that was done. Not where
  // `wanted` of them are free on the device's node, where the budget is short, and while somebody
  // waits for a first slot.
  [[nodiscard]] Result<bool> add_free(Device& device, std::size_t bytes, std::size_t budget,
                                      std::size_t wanted);
  [[nodiscard]] std::size_t free_slots(std::size_t bytes) const;  // on any node

  // Whoever has no slot and waits for one, as long as this lives.
  class Waiting {
   public:
    explicit Waiting(StagingPool& pool);
    Waiting(const Waiting&) = delete;
    Waiting& operator=(const Waiting&) = delete;
    ~Waiting();

   private:
    StagingPool& pool_;
  };

  // How many wait.
  [[nodiscard]] unsigned waiting() const;

  // Another number whenever take() might answer differently. Asking costs nothing.
  [[nodiscard]] std::uint64_t changes() const noexcept { return changes_.load(); }

  [[nodiscard]] std::size_t pinned_bytes() const;  // what was abandoned included
  [[nodiscard]] std::size_t abandoned_bytes() const;

  void clear();  // unpins the free slots

 private:
  friend class StagingSlot;
  StagingPool() = default;

  // A new slot, whose bytes are counted already: counted back where there is an error.
  [[nodiscard]] Result<std::list<PinnedMemory>> pin(Device& device, std::size_t bytes);
  [[nodiscard]] bool fits(std::size_t bytes, std::size_t budget) const WL_REQUIRES(mutex_);
  // The first free slot of this size and node; of any, where none is named.
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
  std::size_t abandoned_bytes_ WL_GUARDED_BY(mutex_) = 0;  // of these
  std::size_t busy_bytes_ WL_GUARDED_BY(mutex_) = 0;       // of these: lent, pinned or unpinned now
  unsigned waiting_ WL_GUARDED_BY(mutex_) = 0;
  std::atomic<std::uint64_t> changes_ = 0;
};

}  // namespace weightlift::device
