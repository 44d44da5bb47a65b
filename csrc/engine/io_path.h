// How the bytes of one file are read, with the reason for the report.
#pragma once

#include <cstdint>
#include <string>

#include "engine/settings.h"
#include "io/file.h"

namespace weightlift::engine {

enum class IoRoute : std::uint8_t {
  kMapped,     // zero copy
  kPageCache,  // resident: reads are memory copies
  kBuffered,   // from the disk through the page cache, so that the next start is warm
  kDirect,     // from the disk without the page cache
};
[[nodiscard]] const char* io_route_name(IoRoute route) noexcept;

struct IoChoice {
  IoRoute route = IoRoute::kPageCache;
  std::string reason;
  bool cold = false;  // then more reads in flight are faster
};

// Chooses for `bytes` of `file` between offsets `begin` and `end`.
[[nodiscard]] IoChoice choose_io(const io::File& file, std::uint64_t begin, std::uint64_t end,
                                 std::uint64_t bytes, const Settings& settings);

}  // namespace weightlift::engine
