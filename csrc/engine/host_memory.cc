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
#include "engine/memory_pool.h"
#include "engine/page_choice.h"
#include "engine/settings.h"
#include "io/anonymous_memory.h"
#include "io/machine.h"
#include "result.h"

namespace weightlift::engine {
namespace {

// For smaller requests, reading the limits would cost too much.
constexpr std::size_t kCheckedBytes = std::size_t{64} << 20;

// Smaller blocks get huge pages without a probe, which would cost as much as it could save.
constexpr std::size_t kWatchedBytes = std::size_t{16} << 20;

class PageableMemory final : public HostMemory {
 public:
  PageableMemory(io::AnonymousMemory memory, const Settings& settings, bool used_again)
      : HostMemory(memory.data(), false),
        memory_(std::move(memory)),
        pool_bytes_(settings.kept_bytes()) {
    const bool large = memory_.size() >= kWatchedBytes;
    if (used_again) {
      if (large) pages_ = "used again, from tensors that are dead";
    } else if (settings.huge_pages == HugePages::kNever) {
      small_from_ = 0;
      if (large) pages_ = "small pages, as set";
    } else if (large) {
      choose_pages(settings.huge_pages);
    }
  }
  ~PageableMemory() override {
    watch_.reset();
    if (pool_bytes_ != 0) MemoryPool::instance().keep(std::move(memory_), pool_bytes_);
  }

  [[nodiscard]] std::string pages() const override { return watch_ ? watch_->reason() : pages_; }

  [[nodiscard]] bool gives_small_pages(const std::byte* begin,
                                       const std::byte* end) const noexcept override {
    const std::size_t from = watch_ ? watch_->small_from() : small_from_;
    return from < memory_.size() && begin >= memory_.data() + from &&
           end <= memory_.data() + memory_.size();
  }

 private:
  void choose_pages(HugePages set) {
    if (!io::gives_huge_pages()) {
      small_from_ = 0;
      pages_ = "small pages: transparent huge pages are off";
    } else if (set == HugePages::kAlways) {
      pages_ = "huge pages, as set";
    } else {
      watch_.emplace(memory_);
    }
  }

  io::AnonymousMemory memory_;
  std::size_t pool_bytes_;
  std::size_t small_from_ = ~std::size_t{0};  // without a watch
  std::string pages_;
  std::optional<PageWatch> watch_;
};

class PageLockedMemory final : public HostMemory {
 public:
  explicit PageLockedMemory(std::list<device::PinnedMemory> memory)
      : HostMemory(memory.front().data(), true), memory_(std::move(memory)) {}
  ~PageLockedMemory() override { device::release_later(std::move(memory_)); }

 private:
  std::list<device::PinnedMemory>
      memory_;  // one element: moving it to another list needs no memory
};

Status populate(const io::AnonymousMemory& memory, unsigned threads) {
  const std::size_t share =
      (memory.size() / std::max(threads, 1U) / io::kHugePageBytes + 1) * io::kHugePageBytes;
  const std::size_t parts = (memory.size() + share - 1) / share;
  std::vector<Status> results(parts);
  std::vector<std::thread> helpers;
  helpers.reserve(parts);  // nothing may throw while a thread runs
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
    } catch (const std::exception&) {  // no thread can be started
      part(i);
    }
  }
  if (parts != 0) part(0);
  for (std::thread& helper : helpers) helper.join();
  for (Status& result : results) WL_RETURN_IF_ERROR(std::move(result));
  return {};
}

Status check_headroom(std::size_t bytes) {
  if (bytes < kCheckedBytes || bytes <= io::memory_headroom()) return {};
  MemoryPool::instance().clear();
  device::wait_for_releases();  // deleted pinned memory may not be free yet
  const std::uint64_t headroom = io::memory_headroom();
  if (bytes <= headroom) return {};
  return Error{.code = ErrorCode::kOutOfMemory,
               .message = "the tensors need " + std::to_string(bytes) +
                          " bytes of memory, but only " + std::to_string(headroom) +
                          " can be had (by the limits of the machine and the cgroup): load fewer "
                          "tensors, or use a smaller dtype or mode=\"map\""};
}

// Allocates new memory. If that fails, it empties the pool and tries again.
Result<io::AnonymousMemory> allocate_fresh(std::size_t bytes, bool huge_pages) {
  auto memory = io::AnonymousMemory::allocate(bytes, huge_pages);
  if (memory.ok() || MemoryPool::instance().stats().kept_bytes == 0) return memory;
  MemoryPool::instance().clear();
  return io::AnonymousMemory::allocate(bytes, huge_pages);
}

Result<std::shared_ptr<HostMemory>> allocate_pageable(std::size_t bytes, const Settings& settings) {
  // Also for a block of the pool: the kernel may have taken its pages, which then count as free.
  WL_RETURN_IF_ERROR(check_headroom(bytes));
  const bool huge_pages = settings.huge_pages != HugePages::kNever;
  if (huge_pages && bytes >= io::kHugePageBytes) {
    if (auto kept = MemoryPool::instance().take(bytes)) {
      return std::shared_ptr<HostMemory>(new PageableMemory(*std::move(kept), settings, true));
    }
  }
  WL_ASSIGN_OR_RETURN(io::AnonymousMemory memory, allocate_fresh(bytes, huge_pages));
  return std::shared_ptr<HostMemory>(new PageableMemory(std::move(memory), settings, false));
}

Result<std::shared_ptr<HostMemory>> allocate_pinned(std::size_t bytes, int device_ordinal,
                                                    unsigned threads) {
  WL_RETURN_IF_ERROR(check_headroom(bytes));
  WL_ASSIGN_OR_RETURN(io::AnonymousMemory memory, allocate_fresh(bytes, true));
  WL_ASSIGN_OR_RETURN(device::Device * device, device::Device::get(device_ordinal));
  memory.keep_from_children();
  WL_RETURN_IF_ERROR(populate(memory, threads));
  WL_ASSIGN_OR_RETURN(device::PinnedMemory pinned,
                      device::PinnedMemory::adopt(*device, std::move(memory)));
  std::list<device::PinnedMemory> owned;
  owned.push_back(std::move(pinned));
  return std::shared_ptr<HostMemory>(new PageLockedMemory(std::move(owned)));
}

}  // namespace

Result<std::shared_ptr<HostMemory>> HostMemory::allocate(std::size_t bytes,
                                                         std::optional<int> pin_for,
                                                         const Settings& settings) {
  if (pin_for && bytes != 0) return allocate_pinned(bytes, *pin_for, settings.thread_count());
  return allocate_pageable(bytes, settings);
}

}  // namespace weightlift::engine
