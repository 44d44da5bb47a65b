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

// From this size on, this many windows of this size stand for the whole.
constexpr std::uint64_t kSampledBytes = std::uint64_t{32} << 20;
constexpr std::uint64_t kWindows = 32;
constexpr std::uint64_t kWindowBytes = std::uint64_t{256} << 10;

}  // namespace

std::optional<std::uint64_t> resident_bytes(const File& file, std::uint64_t offset,
                                            std::uint64_t bytes) noexcept {
  if (bytes == 0) return 0;
  CachestatRange range{.offset = offset, .length = bytes};
  Cachestat answer{};
  if (::syscall(kCachestatCall, file.descriptor(), &range, &answer, 0U) != 0) return std::nullopt;
  return std::min(answer.cached * kPageBytes, bytes);
}

std::optional<double> resident_share(const File& file, std::uint64_t offset,
                                     std::uint64_t bytes) noexcept {
  if (bytes == 0) return 1.0;
  const std::uint64_t windows = bytes <= kSampledBytes ? 1 : kWindows;
  const std::uint64_t window = windows == 1 ? bytes : kWindowBytes;
  std::uint64_t resident = 0;
  for (std::uint64_t i = 0; i < windows; ++i) {
    // The first and the last bytes are in it: a file that is being read, or was cut off, shows.
    const std::uint64_t at = windows == 1 ? 0 : (bytes - window) / (windows - 1) * i;
    const auto found = resident_bytes(file, offset + at, window);
    if (!found) return std::nullopt;
    resident += *found;
  }
  return static_cast<double>(resident) / static_cast<double>(windows * window);
}

void drop_from_page_cache(const File& file) noexcept {
  ::posix_fadvise(file.descriptor(), 0, 0, POSIX_FADV_DONTNEED);
}

}  // namespace weightlift::io
