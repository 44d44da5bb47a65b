// Page-locked host memory from which every device can copy.
#pragma once

#include <cstddef>
#include <list>
#include <utility>

#include "device/context.h"
#include "io/anonymous_memory.h"
#include "result.h"

namespace weightlift::device {

class PinnedMemory {
 public:
  // Huge pages on the device's node, backed by the calling thread and registered for all devices.
  // cudf issue 23457 reports 97 ms/GiB for this and 492 ms/GiB for cuMemHostAlloc, which is the
  // fallback if the driver refuses to register.
  [[nodiscard]] static Result<PinnedMemory> allocate(Device& device, std::size_t bytes);

  // The same for existing, backed memory. If the driver refuses to register it, cuMemHostAlloc's
  // memory takes its place.
  [[nodiscard]] static Result<PinnedMemory> adopt(Device& device, io::AnonymousMemory memory);

  PinnedMemory(PinnedMemory&& other) noexcept
      : device_(std::exchange(other.device_, nullptr)),
        memory_(std::move(other.memory_)),
        data_(std::exchange(other.data_, nullptr)),
        bytes_(other.bytes_) {}
  PinnedMemory& operator=(PinnedMemory&& other) = delete;
  // Copies from or to the memory must have ended; if that is unknown, call wait_for_devices()
  // first.
  ~PinnedMemory();

  [[nodiscard]] std::byte* data() const noexcept { return data_; }
  [[nodiscard]] std::size_t size() const noexcept { return bytes_; }
  // The node of the device for which it was made.
  [[nodiscard]] int node() const noexcept { return device_->node(); }

 private:
  PinnedMemory(Device& device, io::AnonymousMemory memory, std::byte* data, std::size_t bytes)
      : device_(&device), memory_(std::move(memory)), data_(data), bytes_(bytes) {}

  Device* device_;
  io::AnonymousMemory memory_;  // empty if the driver owns the pages
  std::byte* data_;
  std::size_t bytes_;
};

// Frees memory from which torch may still be copying without an event: a separate thread first
// waits for every device in use. The thread that deletes the last tensor neither waits nor
// synchronises a device. Needs no memory, because the list brings its node.
void release_later(std::list<PinnedMemory> memory) noexcept;

// Waits until all such memory is freed, but at most 10 s, because a device may never finish.
void wait_for_releases() noexcept;

}  // namespace weightlift::device
