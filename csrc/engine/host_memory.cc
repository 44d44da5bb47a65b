#include "engine/host_memory.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <list>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "device/context.h"
#include "device/pinned.h"
#include "engine/page_choice.h"
#include "engine/settings.h"
#include "io/anonymous_memory.h"
#include "io/machine.h"
#include "result.h"

namespace weightlift::engine {
namespace {

// Smaller requests are not worth reading the limits for.
constexpr std::size_t kCheckedBytes = std::size_t{64} << 20;

// Smaller blocks take huge pages unasked: a probe would cost about what they may lose.
constexpr std::size_t kWatchedBytes = std::size_t{16} << 20;

class PageableMemory final : public HostMemory {
 public:
  PageableMemory(io::AnonymousMemory memory, HugePages huge_pages)
      : HostMemory(memory.data(), false), memory_(std::move(memory)) {
    if (memory_.size() < kWatchedBytes) return;
    if (huge_pages == HugePages::kAuto) {
      watch_.emplace(memory_);
    } else {
      pages_ = huge_pages == HugePages::kAlways ? "huge pages, as set" : "small pages, as set";
    }
  }

  [[nodiscard]] std::string pages() const override { return watch_ ? watch_->reason() : pages_; }

 private:
  io::AnonymousMemory memory_;
  std::string pages_;
  std::optional<PageWatch> watch_;  // goes before the memory
};

class PageLockedMemory final : public HostMemory {
 public:
  explicit PageLockedMemory(std::list<device::PinnedMemory> memory)
      : HostMemory(memory.front().data(), true), memory_(std::move(memory)) {}
  ~PageLockedMemory() override { device::release_later(std::move(memory_)); }

 private:
  std::list<device::PinnedMemory> memory_;  // of one: giving it away then needs no memory
};

Status populate(const io::AnonymousMemory& memory, unsigned threads) {
  const std::size_t share =
      (memory.size() / std::max(threads, 1U) / io::kHugePageBytes + 1) * io::kHugePageBytes;
  const std::size_t parts = (memory.size() + share - 1) / share;
  std::vector<Status> results(parts);
  std::vector<std::thread> helpers;
  helpers.reserve(parts);  // nothing may throw past a thread that runs
  const auto part = [&](std::size_t i) {
    try {
      results[i] = memory.populate(i * share, std::min(share, memory.size() - i * share));
    } catch (const std::bad_alloc&) {
      results[i] = Error{.code = ErrorCode::kOutOfMemory};
    }
  };
  for (std::size_t i = 1; i < parts; ++i) {
    try {
      helpers.emplace_back(part, i);
    } catch (const std::exception&) {  // no more threads to be had, or no memory for one
      part(i);
    }
  }
  if (parts != 0) part(0);
  for (std::thread& helper : helpers) helper.join();
  for (Status& result : results) WL_RETURN_IF_ERROR(std::move(result));
  return {};
}

}  // namespace

Result<std::shared_ptr<HostMemory>> HostMemory::allocate(std::size_t bytes,
                                                         std::optional<int> pin_for,
                                                         unsigned threads, HugePages huge_pages) {
  if (bytes >= kCheckedBytes) {
    std::uint64_t headroom = io::memory_headroom();
    if (bytes > headroom) {  // what others have dropped may be on its way
      device::wait_for_releases();
      headroom = io::memory_headroom();
    }
    if (bytes > headroom) {
      return Error{.code = ErrorCode::kOutOfMemory,
                   .message = "the tensors need " + std::to_string(bytes) +
                              " bytes of memory and " + std::to_string(headroom) +
                              " can be had (the machine's and the cgroup's limits): load fewer, "
                              "use a smaller dtype, or mode=\"map\""};
    }
  }
  const bool pageable = !pin_for || bytes == 0;
  WL_ASSIGN_OR_RETURN(
      io::AnonymousMemory memory,
      io::AnonymousMemory::allocate(bytes, !pageable || huge_pages != HugePages::kNever));
  if (pageable) {
    return std::shared_ptr<HostMemory>(new PageableMemory(std::move(memory), huge_pages));
  }
  WL_ASSIGN_OR_RETURN(device::Device * device, device::Device::get(*pin_for));
  memory.keep_from_children();
  WL_RETURN_IF_ERROR(populate(memory, threads));
  WL_ASSIGN_OR_RETURN(device::PinnedMemory pinned,
                      device::PinnedMemory::adopt(*device, std::move(memory)));
  std::list<device::PinnedMemory> owned;
  owned.push_back(std::move(pinned));
  return std::shared_ptr<HostMemory>(new PageLockedMemory(std::move(owned)));
}

}  // namespace weightlift::engine
