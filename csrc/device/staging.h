// The pinned slots that every load stages through: one pool a process, small, reused, and left
// alone at exit.
#pragma once

#include <cstddef>
#include <cstdint>
#include <list>
#include <mutex>
#include <optional>
#include <utility>

#include "device/pinned.h"
#include "result.h"

namespace weightlift::device {

// A slot on loan: it goes back to the pool when it dies.
class StagingSlot {
 public:
  StagingSlot(StagingSlot&& other) = default;
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

class StagingPool {
 public:
  [[nodiscard]] static StagingPool& instance();

  // A slot of `bytes`: a free one, or a new one while no more than `budget` bytes are pinned;
  // nothing where others hold the budget. Pins without holding the lock: several threads make the
  // slots of a first load at the same time.
  [[nodiscard]] Result<std::optional<StagingSlot>> take(Device& device, std::size_t bytes,
                                                        std::size_t budget);

  [[nodiscard]] std::size_t pinned_bytes() const;

  void clear();  // unpins the free slots

 private:
  friend class StagingSlot;
  StagingPool() = default;

  mutable std::mutex mutex_;
  std::list<PinnedMemory> free_;
  std::list<PinnedMemory> abandoned_;
  std::size_t pinned_bytes_ = 0;
};

}  // namespace weightlift::device
