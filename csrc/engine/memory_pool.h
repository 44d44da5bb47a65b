// Memory of deleted tensors, kept for the next load, because the kernel has already cleared its
// pages.
//
// Bounded by Settings::pool_bytes of each load. The blocks are marked MADV_FREE (madvise(2)), so
// the kernel can take their pages when memory is short.
#pragma once

#include <cstddef>
#include <cstdint>
#include <list>
#include <optional>

#include "io/anonymous_memory.h"
#include "mutex.h"

namespace weightlift::engine {

class MemoryPool {
 public:
  struct Stats {
    std::size_t kept_bytes = 0;      // in the pool now, whether or not the kernel took pages
    std::uint64_t reused_bytes = 0;  // taken from the pool since the process began
  };

  [[nodiscard]] static MemoryPool& instance();

  // Returns memory of at least `bytes`, with arbitrary content; nothing if no block is large
  // enough.
  [[nodiscard]] std::optional<io::AnonymousMemory> take(std::size_t bytes) noexcept;

  // Keeps a block, and unmaps the oldest blocks until at most `limit` bytes are kept. Unmaps the
  // block itself if it is larger than the limit or smaller than a huge page.
  void keep(io::AnonymousMemory memory, std::size_t limit) noexcept;

  void clear() noexcept;  // unmaps all
  [[nodiscard]] Stats stats() noexcept;

 private:
  using Blocks = std::list<io::AnonymousMemory>;

  MemoryPool();

  Mutex mutex_;
  Blocks blocks_ WL_GUARDED_BY(mutex_);  // the oldest first
  Stats stats_ WL_GUARDED_BY(mutex_);
};

}  // namespace weightlift::engine
