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
