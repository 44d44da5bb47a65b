// The pinned slots that every load stages through: one pool a process, small, reused, and left
// alone at exit.
#pragma once

#include <cstddef>
#include <cstdint>
#include <list>
#include <mutex>
#include <optional>

#include "device/pinned.h"
#include "result.h"

namespace weightlift::device {

class StagingPool {
 public:
  [[nodiscard]] static StagingPool& instance();

  // A slot of `bytes`: a free one, or a new one while no more than `budget` bytes are pinned;
  // nothing where others hold the budget. Pins without holding the lock: several threads make the
  // slots of a first load at the same time.
  [[nodiscard]] Result<std::optional<PinnedMemory>> take(Device& device, std::size_t bytes,
                                                         std::size_t budget);
  void give_back(PinnedMemory slot);
  // Leaves a slot pinned and mapped for ever: a lost device may still be reading it.
  void abandon(PinnedMemory slot);

  [[nodiscard]] std::size_t pinned_bytes() const;

  void clear();  // unpins the free slots

 private:
  StagingPool() = default;

  mutable std::mutex mutex_;
  std::list<PinnedMemory> free_;
  std::list<PinnedMemory> abandoned_;
  std::size_t pinned_bytes_ = 0;
};

}  // namespace weightlift::device
