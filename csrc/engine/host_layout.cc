#include "engine/host_layout.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "dtype.h"
#include "engine/plan.h"

namespace weightlift::engine {
namespace {

// A cache line, and the alignment of torch's CPU allocator.
constexpr std::uint64_t kTensorAlignment = 64;

}  // namespace

std::uint64_t HostLayout::add(const StoredTensor& tensor, Dtype target) {
  const bool casts = target != tensor.dtype;
  const std::uint64_t item = std::max<std::uint64_t>(dtype_bits(target) / 8, 1);
  // Neighbours in the file stay neighbours in the block, so that one read fills many small tensors.
  const bool neighbour = !casts && tensor.offset == source_end_ && bytes_ % item == 0;
  if (!neighbour) bytes_ = (bytes_ + kTensorAlignment - 1) / kTensorAlignment * kTensorAlignment;
  source_end_ = casts ? ~std::uint64_t{0} : tensor.offset + tensor.bytes;
  offsets_.push_back(bytes_);
  Copy copy = copy_of(tensor, target);
  copy.target = bytes_;
  const std::uint64_t size = copy.elements * copy.target_item();
  plan_.add_copy(copy);
  bytes_ += size;
  return size;
}

void HostLayout::place_at(const std::byte* block) {
  const auto base = reinterpret_cast<std::uintptr_t>(block);
  for (std::size_t i = first_copy_; i < plan_.copies.size(); ++i) plan_.copies[i].target += base;
}

}  // namespace weightlift::engine
