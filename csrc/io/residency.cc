#include "io/residency.h"

#include <fcntl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>

#include "io/anonymous_memory.h"

namespace weightlift::io {
namespace {

// As in <linux/mman.h> since Linux 6.5; the headers of older distributions lack them.
constexpr long kCachestatCall = 451;
struct CachestatRange {
  std::uint64_t offset;
  std::uint64_t length;
};
struct Cachestat {
  std::uint64_t cached;
  std::uint64_t dirty;
  std::uint64_t writeback;
  std::uint64_t evicted;
  std::uint64_t recently_evicted;
};

}  // namespace

std::optional<std::uint64_t> resident_bytes(const File& file, std::uint64_t offset,
                                            std::uint64_t bytes) noexcept {
  if (bytes == 0) return 0;
  CachestatRange range{.offset = offset, .length = bytes};
  Cachestat answer{};
  if (::syscall(kCachestatCall, file.descriptor(), &range, &answer, 0U) != 0) return std::nullopt;
  return std::min(answer.cached * kPageBytes, bytes);
}

void drop_from_page_cache(const File& file) noexcept {
  ::posix_fadvise(file.descriptor(), 0, 0, POSIX_FADV_DONTNEED);
}

}  // namespace weightlift::io
