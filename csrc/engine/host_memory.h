// Memory for tensors on the host: one block for each load, on huge pages, pinned on request.
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
  // kOutOfMemory if `bytes` exceed what the process can still allocate (its cgroup's limit counts),
  // because otherwise the kernel would kill it later. With `pin_for`, the memory is page-locked for
  // all devices through that device; `settings.threads` threads back it with huge pages. Pageable
  // memory comes from the MemoryPool if that has a block, and returns to it.
  [[nodiscard]] static Result<std::shared_ptr<HostMemory>> allocate(std::size_t bytes,
                                                                    std::optional<int> pin_for,
                                                                    const Settings& settings);
  HostMemory(const HostMemory&) = delete;
  HostMemory& operator=(const HostMemory&) = delete;
  virtual ~HostMemory() = default;

  [[nodiscard]] std::byte* data() const noexcept { return data_; }
  [[nodiscard]] bool pinned() const noexcept { return pinned_; }

  // The kind of its pages and the reason, as text; "" for a block that is too small to matter.
  [[nodiscard]] virtual std::string pages() const { return {}; }

  // Whether [begin, end) lies in it and gets small pages where it is not backed yet. Any thread.
  [[nodiscard]] virtual bool gives_small_pages(const std::byte* begin,
                                               const std::byte* end) const noexcept {
    static_cast<void>(begin);
    static_cast<void>(end);
    return false;
  }

 protected:
  HostMemory(std::byte* data, bool pinned) : data_(data), pinned_(pinned) {}

 private:
  std::byte* data_;
  bool pinned_;
};

}  // namespace weightlift::engine
