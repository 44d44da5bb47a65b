// How much of a file is in the page cache.
#pragma once

#include <cstdint>
#include <optional>

#include "io/file.h"

namespace weightlift::io {

// How much of [offset, offset + bytes) is in the page cache, 0 to 1, by cachestat(2) (Linux 6.5);
// nothing where the kernel cannot tell. Large ranges are sampled: the call walks every page, which
// takes as long as mapping them. mincore(2) is no substitute: since Linux 5.2 it reports pages of
// files that the caller may not write as resident, and under cgroups none at all.
[[nodiscard]] std::optional<double> resident_share(const File& file, std::uint64_t offset,
                                                   std::uint64_t bytes) noexcept;

// The same, counted in bytes and never sampled.
[[nodiscard]] std::optional<std::uint64_t> resident_bytes(const File& file, std::uint64_t offset,
                                                          std::uint64_t bytes) noexcept;

// Drops clean pages from the page cache (posix_fadvise(2), DONTNEED), for measurements.
void drop_from_page_cache(const File& file) noexcept;

}  // namespace weightlift::io
