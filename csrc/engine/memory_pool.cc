#include "engine/memory_pool.h"

#include <pthread.h>

#include <cstddef>
#include <exception>
#include <iterator>
#include <optional>
#include <utility>

#include "io/anonymous_memory.h"
#include "mutex.h"

namespace weightlift::engine {

// Never destroyed: tensors may be deleted after the static objects.
MemoryPool& MemoryPool::instance() {
  static auto* const pool = new MemoryPool;
  return *pool;
}

MemoryPool::MemoryPool() {
  ::pthread_atfork([] { instance().mutex_.lock_for_fork(); },
                   [] { instance().mutex_.unlock_after_fork(); },
                   [] { instance().mutex_.unlock_after_fork(); });
}

std::optional<io::AnonymousMemory> MemoryPool::take(std::size_t bytes) noexcept {
  const MutexLock lock(mutex_);
  auto best = blocks_.end();
  for (auto block = blocks_.begin(); block != blocks_.end(); ++block) {
    if (block->size() < bytes) continue;
    if (best == blocks_.end() || block->size() < best->size()) best = block;
  }
  if (best == blocks_.end()) return std::nullopt;
  io::AnonymousMemory memory = std::move(*best);
  *best = memory.split(bytes);
  if (best->size() == 0) blocks_.erase(best);
  stats_.kept_bytes -= memory.size();
  stats_.reused_bytes += memory.size();
  return memory;
}

void MemoryPool::keep(io::AnonymousMemory memory, std::size_t limit) noexcept {
  const std::size_t bytes = memory.size();
  if (bytes < io::kHugePageBytes || bytes > limit) return;
  io::release_under_pressure(memory.data(), bytes);
  Blocks unmapped;  // destroyed after the lock is released
  try {
    Blocks kept;
    kept.push_back(std::move(memory));
    const MutexLock lock(mutex_);
    // Merges the parts of a block that take() split.
    for (auto block = blocks_.begin(); block != blocks_.end();) {
      const auto next = std::next(block);
      if (kept.front().join(*block)) blocks_.erase(block);
      block = next;
    }
    blocks_.splice(blocks_.end(), kept);
    stats_.kept_bytes += bytes;
    while (stats_.kept_bytes > limit) {
      stats_.kept_bytes -= blocks_.front().size();
      unmapped.splice(unmapped.end(), blocks_, blocks_.begin());
    }
  } catch (const std::exception&) {
    return;  // no memory for the list: unmaps the block
  }
}

void MemoryPool::clear() noexcept {
  Blocks unmapped;
  const MutexLock lock(mutex_);
  unmapped.swap(blocks_);
  stats_.kept_bytes = 0;
}

MemoryPool::Stats MemoryPool::stats() noexcept {
  const MutexLock lock(mutex_);
  return stats_;
}

}  // namespace weightlift::engine
