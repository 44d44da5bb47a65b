// How much of a file is in the page cache.
#pragma once

#include <cstdint>
#include <optional>

#include "io/file.h"

namespace weightlift::io {

struct Residency {
  std::optional<double> share;  // 0 to 1; empty if the kernel does not say
  int refusal = 0;              // then errno of cachestat(2)
};

// How much of [offset, offset + bytes) is in the page cache, by cachestat(2) (Linux 6.5). Large
// ranges are sampled, because the call walks every page, which takes as long as mapping them. For a
// file of another user that this process may not write, it fails with EPERM; then a few bytes are
// read without waiting for the disk (preadv2(2), RWF_NOWAIT). mincore(2) is no substitute: since
// Linux 5.2 it reports all pages of such files as resident, and under cgroups none.
[[nodiscard]] Residency resident_share(const File& file, std::uint64_t offset,
                                       std::uint64_t bytes) noexcept;

// The same in bytes, and never sampled; empty if cachestat(2) fails.
[[nodiscard]] std::optional<std::uint64_t> resident_bytes(const File& file, std::uint64_t offset,
                                                          std::uint64_t bytes) noexcept;

// Drops the file's clean pages from the page cache (posix_fadvise(2), DONTNEED), for measurements.
void drop_from_page_cache(const File& file) noexcept;

}  // namespace weightlift::io
