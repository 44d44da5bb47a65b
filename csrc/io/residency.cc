#include "io/residency.h"

#include <fcntl.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <optional>

#include "io/anonymous_memory.h"
#include "io/file.h"

namespace weightlift::io {
namespace {

// These are in <linux/mman.h> since Linux 6.5; older distributions lack them.
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

// From kSampledBytes on, kWindows windows of kWindowBytes stand for the whole range.
constexpr std::uint64_t kSampledBytes = std::uint64_t{32} << 20;
constexpr std::uint64_t kWindows = 32;
constexpr std::uint64_t kWindowBytes = std::uint64_t{256} << 10;
constexpr std::uint64_t kProbeBytes = std::uint64_t{1} << 20;

// Probes one byte in each MiB, but at most kWindows of them, because each probe of a missing page
// starts a read of it.
Residency probed_share(const File& file, std::uint64_t offset, std::uint64_t bytes) noexcept {
  const auto fd = file.descriptor();
  if (!fd.ok()) return {.share = std::nullopt, .refusal = EPERM};
  const std::uint64_t probes = std::clamp<std::uint64_t>(bytes / kProbeBytes, 1, kWindows);
  std::uint64_t resident = 0;
  for (std::uint64_t i = 0; i < probes; ++i) {
    char byte = 0;
    const struct iovec target{.iov_base = &byte, .iov_len = 1};
    const std::uint64_t at = offset + (probes == 1 ? 0 : (bytes - 1) / (probes - 1) * i);
    const ssize_t got = ::preadv2((*fd)->get(), &target, 1, static_cast<off_t>(at), RWF_NOWAIT);
    if (got < 0 && errno != EAGAIN) return {.share = std::nullopt, .refusal = EPERM};
    resident += got > 0 ? 1 : 0;
  }
  return {.share = static_cast<double>(resident) / static_cast<double>(probes)};
}

}  // namespace

std::optional<std::uint64_t> resident_bytes(const File& file, std::uint64_t offset,
                                            std::uint64_t bytes) noexcept {
  if (bytes == 0) return 0;
  CachestatRange range{.offset = offset, .length = bytes};
  Cachestat answer{};
  const auto fd = file.descriptor();
  if (!fd.ok()) return std::nullopt;
  if (::syscall(kCachestatCall, (*fd)->get(), &range, &answer, 0U) != 0) return std::nullopt;
  return std::min(answer.cached * kPageBytes, bytes);
}

Residency resident_share(const File& file, std::uint64_t offset, std::uint64_t bytes) noexcept {
  if (bytes == 0) return {.share = 1.0};
  const std::uint64_t windows = bytes <= kSampledBytes ? 1 : kWindows;
  const std::uint64_t window = windows == 1 ? bytes : kWindowBytes;
  std::uint64_t resident = 0;
  for (std::uint64_t i = 0; i < windows; ++i) {
    // The windows include the first and the last bytes, so that a file that is half read or half
    // evicted is noticed.
    const std::uint64_t at = windows == 1 ? 0 : (bytes - window) / (windows - 1) * i;
    const auto found = resident_bytes(file, offset + at, window);
    if (!found) {
      if (errno == EPERM) return probed_share(file, offset, bytes);
      return {.share = std::nullopt, .refusal = errno};
    }
    resident += *found;
  }
  return {.share = static_cast<double>(resident) / static_cast<double>(windows * window)};
}

void drop_from_page_cache(const File& file) noexcept {
  const auto fd = file.descriptor();
  if (fd.ok()) ::posix_fadvise((*fd)->get(), 0, 0, POSIX_FADV_DONTNEED);
}

}  // namespace weightlift::io
