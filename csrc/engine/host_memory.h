// Memory for tensors on the host: one block a load, on huge pages, pinned on request.
#pragma once

#include <cstddef>
#include <memory>
#include <optional>

#include "result.h"

namespace weightlift::engine {

class HostMemory {
 public:
  // kOutOfMemory where `bytes` are more than the process can still have (its cgroup's limit
  // counts): an error now instead of the kernel's killer later. With `pin_for`, page-locked for all
  // devices through that one, backed by `threads` threads.
  [[nodiscard]] static Result<std::shared_ptr<HostMemory>> allocate(std::size_t bytes,
                                                                    std::optional<int> pin_for,
                                                                    unsigned threads);
  HostMemory(const HostMemory&) = delete;
  HostMemory& operator=(const HostMemory&) = delete;
  virtual ~HostMemory() = default;

  [[nodiscard]] std::byte* data() const noexcept { return data_; }
  [[nodiscard]] bool pinned() const noexcept { return pinned_; }

 protected:
  HostMemory(std::byte* data, bool pinned) : data_(data), pinned_(pinned) {}

 private:
  std::byte* data_;
  bool pinned_;
};

}  // namespace weightlift::engine
