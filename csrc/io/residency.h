// How much of a file is in the page cache.
#pragma once

#include <cstdint>
#include <optional>

#include "io/file.h"

namespace weightlift::io {

struct Residency {
  std::optional<double> share;  // 0 to 1; nothing where the kernel cannot tell
  int refusal = 0;              // errno of cachestat(2) then
};

// How much of [offset, offset + bytes) is in the page cache, by cachestat(2) (Linux 6.5). Large
// ranges are sampled: the call walks every page, which takes as long as mapping them. Of a file
// that is another user's and that we may not write it says EPERM; then a few bytes are asked for
// that must not be waited for (preadv2(2), RWF_NOWAIT). mincore(2) is no substitute: since Linux
// 5.2 it reports pages of such files as resident, and under cgroups none at all.
[[nodiscard]] Residency resident_share(const File& file, std::uint64_t offset,
                                       std::uint64_t bytes) noexcept;

// The same, counted in bytes and never sampled; nothing where cachestat(2) is refused.
[[nodiscard]] std::optional<std::uint64_t> resident_bytes(const File& file, std::uint64_t offset,
                                                          std::uint64_t bytes) noexcept;

// Drops clean pages from the page cache (posix_fadvise(2), DONTNEED), for measurements.
void drop_from_page_cache(const File& file) noexcept;

}  // namespace weightlift::io
