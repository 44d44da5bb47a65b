// Where tensors lie in a block of host memory that one load fills.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "engine/plan.h"

namespace weightlift::engine {

// First all tensors are added, then the block is allocated, then the copies get their addresses.
class HostLayout {
 public:
  explicit HostLayout(LoadPlan& plan) : plan_(plan), first_copy_(plan.copies.size()) {}

  // Adds the copy to the plan; returns the bytes that the tensor takes as `target`.
  std::uint64_t add(const StoredTensor& tensor, Dtype target);

  // Of the block.
  [[nodiscard]] std::uint64_t bytes() const noexcept { return bytes_; }
  // Of the i-th tensor, in the block.
  [[nodiscard]] std::uint64_t offset(std::size_t i) const { return offsets_[i]; }

  void place_at(const std::byte* block);

 private:
  LoadPlan& plan_;
  std::size_t first_copy_;
  std::vector<std::uint64_t> offsets_;
  std::uint64_t bytes_ = 0;
  std::uint64_t source_end_ = ~std::uint64_t{0};  // of the last tensor, where it is not cast
};

}  // namespace weightlift::engine
