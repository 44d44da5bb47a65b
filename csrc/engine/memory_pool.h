// Memory of dead tensors, kept for the next load: the kernel has cleared its pages already.
//
// Bounded by what each load may keep (Settings::pool_bytes). What lies here is marked MADV_FREE
// (madvise(2)): the kernel takes it where memory is short, without asking this process.
#pragma once

#include <cstddef>
#include <cstdint>
#include <list>
#include <mutex>
#include <optional>

#include "io/anonymous_memory.h"

namespace weightlift::engine {

class MemoryPool {
 public:
  struct Stats {
    std::size_t kept_bytes = 0;      // that lie here now, whether or not the kernel took pages
    std::uint64_t reused_bytes = 0;  // that were taken since the process began
  };

  [[nodiscard]] static MemoryPool& instance();

  // Memory of at least `bytes`, its content left over; nothing where no block is large enough.
  [[nodiscard]] std::optional<io::AnonymousMemory> take(std::size_t bytes) noexcept;

  // Keeps a block; the oldest go until no more than `limit` bytes are kept. A block above the
  // limit, or below one huge page, is unmapped.
  void keep(io::AnonymousMemory memory, std::size_t limit) noexcept;

  void clear() noexcept;  // unmaps all
  [[nodiscard]] Stats stats() noexcept;

 private:
  using Blocks = std::list<io::AnonymousMemory>;

  MemoryPool();

  // A plain mutex: fork() handlers lock and unlock it apart.
  std::mutex mutex_;
  Blocks blocks_;  // the oldest first
  Stats stats_;
};

}  // namespace weightlift::engine
