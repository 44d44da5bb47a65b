// A thread's buffers, kept from task to task, so that pieces need no allocation.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "io/anonymous_memory.h"
#include "result.h"

namespace weightlift::engine {

class Scratch {
 public:
  // A buffer for `count` bytes between a file and their targets.
  [[nodiscard]] Result<std::byte*> bytes(std::size_t count);
  // The same as the target of a direct read: from half a huge page on, a whole one. In the drive's
  // request each small page is a segment of its own, and virtual drives are slow for many segments.
  [[nodiscard]] Result<std::byte*> for_direct_read(std::size_t count);
  // A buffer for an index into a tensor of `rank` dimensions.
  [[nodiscard]] std::span<std::uint64_t> index(std::size_t rank) {
    if (index_.size() < rank) index_.resize(rank);
    return std::span(index_).first(rank);
  }

 private:
  io::AnonymousMemory memory_;
  std::vector<std::uint64_t> index_;
};

}  // namespace weightlift::engine
