// The settings for how bytes move. Zero means the default for this machine.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

#include "convert/cast.h"

namespace weightlift::engine {

// How files are read. kAuto decides for each file: see io_path.h.
enum class IoPath : std::uint8_t { kAuto, kBuffered, kDirect };

// Where casts run. kAuto: casts to a smaller dtype on the host, which saves bytes on the bus; other
// casts on the device.
enum class CastPlace : std::uint8_t { kAuto, kHost, kDevice };

// The pages of memory for tensors. kAuto: see page_choice.h.
enum class HugePages : std::uint8_t { kAuto, kAlways, kNever };

struct Settings {
  unsigned threads = 0;          // that read and cast; 0: the processors this process may use
  unsigned io_depth = 0;         // reads in flight on a cold or direct file; 0: reads_in_flight()
  std::size_t read_bytes = 0;    // of one read; 0: 1 MiB; for devices at most an eighth of a slot
  std::size_t hole_bytes = 0;    // largest gap that one read includes; 0: 4 KiB; at most 1 MiB
  std::size_t chunk_bytes = 0;   // of one staging slot; 0: 4 MiB
  std::size_t pinned_bytes = 0;  // most bytes of staging slots for one device; 0: 32 MiB
  unsigned streams = 0;          // copy streams for one device; 0: 2
  std::size_t pool_bytes = 0;    // of deleted host tensors, kept for later loads: memory_pool.h
  IoPath io_path = IoPath::kAuto;
  CastPlace cast_place = CastPlace::kAuto;
  HugePages huge_pages = HugePages::kAuto;
  bool kernels = true;       // false: as on a device without the CUDA kernels
  bool batch_copies = true;  // false: as with a driver without cuMemcpyBatchAsync
  convert::Fp8Rules fp8 = {};

  // The pool keeps no memory on small pages.
  [[nodiscard]] std::size_t kept_bytes() const noexcept {
    return huge_pages == HugePages::kNever ? 0 : pool_bytes;
  }

  // These two are for resolved settings. The bytes of one read for a device: several threads fill
  // one slot.
  [[nodiscard]] std::size_t device_read_bytes() const noexcept;
  // The number of reads in flight on files that come from the disk, if direct reads fill the slots
  // of this many devices.
  [[nodiscard]] unsigned reads_in_flight(unsigned direct_devices) const noexcept;

  // `threads` within its bounds; for 0, the processors. They are counted by the first load that
  // needs their number, which a mapped one does not.
  [[nodiscard]] unsigned thread_count() const;

  // The same with defaults in place of zeros (except threads and io_depth) and sizes within their
  // bounds.
  [[nodiscard]] Settings resolved() const;
};

}  // namespace weightlift::engine
