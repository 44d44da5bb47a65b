// The look-up table of an Index. Internal to format/.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string_view>
#include <vector>

#include "format/index.h"

namespace weightlift::format {

// Open addressing with linear probing over positions in tensors(). The hash is keyed with random
// bytes because the names come from the file: if the hash could be computed in advance, a file of
// colliding names would make every insertion walk over all earlier ones.
struct Index::ByName {
  explicit ByName(std::size_t count);

  // Returns the position of an earlier tensor of the same name. A valid file has none.
  std::optional<std::uint32_t> insert(std::span<const TensorInfo> tensors, std::uint32_t position);
  [[nodiscard]] std::optional<std::uint32_t> find(std::span<const TensorInfo> tensors,
                                                  std::string_view name) const noexcept;

 private:
  // Half of the hash is kept beside the position, so that most probes of other names need not read
  // the name.
  struct Slot {
    std::uint32_t hash = 0;
    std::uint32_t position = kFree;
  };
  static constexpr std::uint32_t kFree = 0xffff'ffff;

  // The slot of `name`, or the free slot for it.
  [[nodiscard]] std::size_t locate(std::span<const TensorInfo> tensors, std::string_view name,
                                   std::uint64_t hash) const noexcept;

  std::vector<Slot> slots_;  // a power of two, at most half full: locate() always ends
};

}  // namespace weightlift::format
