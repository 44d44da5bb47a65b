// Page-locked host memory that every device can copy from.
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
  // Own huge pages of the device's node, backed by the calling thread and registered for all
  // devices: 97 ms/GiB where cuMemHostAlloc takes 492 (cudf issue 23457). Where registering is
  // refused, cuMemHostAlloc.
  [[nodiscard]] static Result<PinnedMemory> allocate(Device& device, std::size_t bytes);

  // The same with memory that exists and is backed; where registering is refused, the driver's own
  // takes its place.
  [[nodiscard]] static Result<PinnedMemory> adopt(Device& device, io::AnonymousMemory memory);

  PinnedMemory(PinnedMemory&& other) noexcept
      : device_(std::exchange(other.device_, nullptr)),
        memory_(std::move(other.memory_)),
        data_(std::exchange(other.data_, nullptr)),
        bytes_(other.bytes_) {}
  PinnedMemory& operator=(PinnedMemory&& other) = delete;
  // Copies from or to it must have ended (wait_for_devices where that is not known).
  ~PinnedMemory();

  [[nodiscard]] std::byte* data() const noexcept { return data_; }
  [[nodiscard]] std::size_t size() const noexcept { return bytes_; }
  // Of the device that it was made for.
  [[nodiscard]] int node() const noexcept { return device_->node(); }

 private:
  PinnedMemory(Device& device, io::AnonymousMemory memory, std::byte* data, std::size_t bytes)
      : device_(&device), memory_(std::move(memory)), data_(data), bytes_(bytes) {}

  Device* device_;
  io::AnonymousMemory memory_;  // empty where the driver owns the pages
  std::byte* data_;
  std::size_t bytes_;
};

// Lets go of memory that others may still be copying from, for torch records no event for memory
// that is not its own: on a thread that first waits for every device in use. Whoever drops the last
// tensor need not wait, nor synchronise a device in the middle of what it does. Noexcept in all:
// the list brings its node.
void release_later(std::list<PinnedMemory> memory) noexcept;

// Until all of that has been let go of, or for ten seconds: a device may never be done.
void wait_for_releases() noexcept;

}  // namespace weightlift::device
