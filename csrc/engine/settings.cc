#include "engine/settings.h"

#include <algorithm>
#include <cstddef>

#include "io/anonymous_memory.h"
#include "io/machine.h"

namespace weightlift::engine {

std::size_t Settings::device_read_bytes() const noexcept {
  return std::min(read_bytes, chunk_bytes / 8);
}

// Direct reads have no read-ahead: only the reads that threads wait for are in flight. A drive
// array of 28 GB/s whose reads take 0.6 ms needs 16 MiB in flight. This fills half of the slots, so
// that the others can be copied meanwhile.
unsigned Settings::reads_in_flight(unsigned direct_devices) const noexcept {
  constexpr std::size_t kUsual = 8;
  constexpr std::size_t kMost = 64;
  if (io_depth != 0) return io_depth;
  const std::size_t of_one = pinned_bytes / 2 / device_read_bytes();
  return static_cast<unsigned>(std::clamp(direct_devices * of_one, kUsual, kMost));
}

unsigned Settings::thread_count() const {
  constexpr unsigned kMost = 256;
  if (threads != 0) return std::min(threads, kMost);
  // Read once: the quota is in several files, and reading them takes longer than loading a small
  // tensor.
  static const unsigned cpus = io::usable_cpus();
  return std::clamp(cpus, 1U, kMost);
}

Settings Settings::resolved() const {
  constexpr std::size_t kKiB = 1024;
  constexpr std::size_t kMiB = 1024 * kKiB;
  Settings result = *this;
  result.io_depth = std::min(result.io_depth, 256U);
  // 1 MiB mostly stays in a core's second-level cache between the read and the cast.
  if (read_bytes == 0) result.read_bytes = kMiB;
  result.read_bytes =
      std::clamp(result.read_bytes, 64 * kKiB, 64 * kMiB) / io::kPageBytes * io::kPageBytes;
  // Reading one more page from the page cache costs less than another system call.
  if (hole_bytes == 0) result.hole_bytes = io::kPageBytes;
  result.hole_bytes = std::min(result.hole_bytes, kMiB);
  // 4 MiB copies reach 96 % of the pinned peak of PCIe 5 x16 (DeepSpeed pull request 8283).
  if (chunk_bytes == 0) result.chunk_bytes = 4 * kMiB;
  result.chunk_bytes =
      std::clamp(result.chunk_bytes, 256 * kKiB, 64 * kMiB) / io::kPageBytes * io::kPageBytes;
  if (streams == 0) result.streams = 2;
  result.streams = std::min(result.streams, 16U);
  // Slots that stay in the last-level cache fill faster, and pinning takes time.
  if (pinned_bytes == 0) result.pinned_bytes = 32 * kMiB;
  result.pinned_bytes = std::max(result.pinned_bytes, result.chunk_bytes);
  return result;
}

}  // namespace weightlift::engine
