// Places the tensors of one load in a block of host memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "engine/plan.h"

namespace weightlift::engine {

// Add all tensors, then allocate the block, then call place_at(), which gives the copies their
// addresses.
class HostLayout {
 public:
  explicit HostLayout(LoadPlan& plan) : plan_(plan), first_copy_(plan.copies.size()) {}

  // Adds the tensor's copy to the plan. Returns the bytes that the tensor takes with dtype
  // `target`.
  std::uint64_t add(const StoredTensor& tensor, Dtype target);

  // The size of the block.
  [[nodiscard]] std::uint64_t bytes() const noexcept { return bytes_; }
  // The offset of the i-th tensor in the block.
  [[nodiscard]] std::uint64_t offset(std::size_t i) const { return offsets_[i]; }

  void place_at(const std::byte* block);

 private:
  LoadPlan& plan_;
  std::size_t first_copy_;
  std::vector<std::uint64_t> offsets_;
  std::uint64_t bytes_ = 0;
  std::uint64_t source_end_ = ~std::uint64_t{0};  // of the last tensor, unless it is cast
};

}  // namespace weightlift::engine
