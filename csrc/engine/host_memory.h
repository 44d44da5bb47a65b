// Memory for tensors on the host: one block a load, on huge pages, pinned on request.
#pragma once

#include <cstddef>
#include <memory>
#include <optional>
#include <string>

#include "engine/settings.h"
#include "result.h"

namespace weightlift::engine {

class HostMemory {
 public:
  // kOutOfMemory where `bytes` are more than the process can still have (its cgroup's limit
  // counts): an error now instead of the kernel's killer later. With `pin_for`, page-locked for all
  // devices through that one, backed by the threads of `settings`; that is on huge pages, as a GPU
  // wants it. Pageable memory comes from the MemoryPool where it has some, and goes back to it.
  [[nodiscard]] static Result<std::shared_ptr<HostMemory>> allocate(std::size_t bytes,
                                                                    std::optional<int> pin_for,
                                                                    const Settings& settings);
  HostMemory(const HostMemory&) = delete;
  HostMemory& operator=(const HostMemory&) = delete;
  virtual ~HostMemory() = default;

  [[nodiscard]] std::byte* data() const noexcept { return data_; }
  [[nodiscard]] bool pinned() const noexcept { return pinned_; }

  // On which pages it lies, and why, in words; "" of a block that is too small to matter.
  [[nodiscard]] virtual std::string pages() const { return {}; }

 protected:
  HostMemory(std::byte* data, bool pinned) : data_(data), pinned_(pinned) {}

 private:
  std::byte* data_;
  bool pinned_;
};

}  // namespace weightlift::engine
