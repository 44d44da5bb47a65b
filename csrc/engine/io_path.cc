#include "engine/io_path.h"

#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>

#include "engine/settings.h"
#include "io/file.h"
#include "io/machine.h"
#include "io/residency.h"

namespace weightlift::engine {
namespace {

// With a smaller share in the page cache, a load waits for the disk.
constexpr double kResidentShare = 0.9;

std::string gibibytes(std::uint64_t bytes) {
  char text[32];
  std::snprintf(text, sizeof text, "%.1f GiB", static_cast<double>(bytes) / (1U << 30));
  return text;
}

}  // namespace

const char* io_route_name(IoRoute route) noexcept {
  switch (route) {
    case IoRoute::kMapped:
      return "mapped";
    case IoRoute::kPageCache:
      return "page cache";
    case IoRoute::kBuffered:
      return "buffered";
    case IoRoute::kDirect:
      return "direct";
  }
  return "unknown";
}

IoChoice choose_io(const io::File& file, std::uint64_t begin, std::uint64_t end,
                   std::uint64_t bytes, const Settings& settings) {
  if (settings.io_path == IoPath::kDirect) {
    return {.route = IoRoute::kDirect, .reason = "forced by Settings.io_path", .cold = true};
  }
  const auto [share, refusal] = io::resident_share(file, begin, end - begin);
  if (!share) {
    const std::string why =
        refusal == ENOSYS ? "no cachestat" : std::string("cachestat: ") + std::strerror(refusal);
    return {.route = IoRoute::kBuffered,
            .reason = "the kernel does not say what is in the page cache (" + why + ")",
            .cold = true};
  }
  char percent[32];
  std::snprintf(percent, sizeof percent, "%.0f %% resident", *share * 100);
  if (*share >= kResidentShare) {
    return {.route = IoRoute::kPageCache, .reason = percent, .cold = false};
  }
  const std::uint64_t headroom = io::memory_headroom();
  if (settings.io_path == IoPath::kAuto && bytes > headroom / 2) {
    return {.route = IoRoute::kDirect,
            .reason = std::string(percent) + ", and larger than half of the " +
                      gibibytes(headroom) + " by which the page cache can grow",
            .cold = true};
  }
  return {.route = IoRoute::kBuffered,
          .reason = std::string(percent) + "; read through the page cache for the next start",
          .cold = true};
}

}  // namespace weightlift::engine
