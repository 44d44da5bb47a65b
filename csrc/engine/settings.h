// What a user may set about how bytes move. Zero means "decide for this machine".
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

#include "convert/cast.h"

namespace weightlift::engine {

// How the bytes of a file are read. kAuto looks at each file: see io_path.h.
enum class IoPath : std::uint8_t { kAuto, kBuffered, kDirect };

// Where casts run. kAuto: narrowing on the host, where it halves the bytes on the bus; everything
// else on the device.
enum class CastPlace : std::uint8_t { kAuto, kHost, kDevice };

// On which pages memory for tensors lies. kAuto: see page_choice.h.
enum class HugePages : std::uint8_t { kAuto, kAlways, kNever };

struct Settings {
  unsigned threads = 0;          // that read and cast; 0: the processors this process may use
  unsigned io_depth = 0;         // reads in flight on a cold or direct file; 0: reads_in_flight()
  std::size_t read_bytes = 0;    // of one read; 0: 1 MiB; at most an eighth of a slot
  std::size_t hole_bytes = 0;    // between parts that are read along; 0: 4 KiB; at most 1 MiB
  std::size_t chunk_bytes = 0;   // of one staging slot, one copy to a device; 0: 4 MiB
  std::size_t pinned_bytes = 0;  // staging slots of one device at the most; 0: 32 MiB
  unsigned streams = 0;          // that copy to one device, by turns of the slots; 0: 2
  std::size_t pool_bytes = 0;    // of dead tensors on the host, kept for later loads: memory_pool.h
  IoPath io_path = IoPath::kAuto;
  CastPlace cast_place = CastPlace::kAuto;
  HugePages huge_pages = HugePages::kAuto;
  bool kernels = true;       // false: as on a device without the CUDA kernels
  bool batch_copies = true;  // false: as with a driver without cuMemcpyBatchAsync
  convert::Fp8Rules fp8 = {};

  // Memory on small pages, as set, is not mixed with the pool's.
  [[nodiscard]] std::size_t kept_bytes() const noexcept {
    return huge_pages == HugePages::kNever ? 0 : pool_bytes;
  }

  // Of those that are resolved. Of one read for a device: several threads fill one slot.
  [[nodiscard]] std::size_t device_read_bytes() const noexcept;
  // On files that come from their disk, where the slots of so many devices are filled past the page
  // cache.
  [[nodiscard]] unsigned reads_in_flight(unsigned direct_devices) const noexcept;

  // The same with every zero but io_depth replaced and every size brought within bounds.
  [[nodiscard]] Settings resolved() const;
};

}  // namespace weightlift::engine
