#include "device_memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>

namespace weightlift::simulated {
namespace {

constexpr std::uint64_t kAlignment = 512;  // torch's caching allocator gives no more
constexpr std::uint64_t kGuard = 4096;     // at least so much between two allocations
constexpr std::uint64_t kPage = 4096;
constexpr std::uint64_t kSmallestRange = std::uint64_t{16} << 30;
constexpr std::uint64_t kWorthReturning = 64 * 1024;
constexpr std::uint64_t kKeptPages = std::uint64_t{16} << 20;  // from one run to the next
constexpr int kFresh = 0xCD;
constexpr int kFreed = 0xDD;

std::uint64_t round_up(std::uint64_t value, std::uint64_t unit) {
  return (value + unit - 1) / unit * unit;
}

void* map(std::uint64_t bytes, int rights) {
  void* address = mmap(nullptr, bytes, rights, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (address == MAP_FAILED) {
    std::perror("simulated driver: address space");
    std::abort();
  }
  return address;
}

}  // namespace

DeviceMemory::~DeviceMemory() {
  unmap();
}

void DeviceMemory::unmap() {
  if (size_ == 0) return;
  munmap(reinterpret_cast<void*>(base_), size_);
  munmap(shadow_, size_);
  base_ = size_ = 0;
  shadow_ = nullptr;
}

void DeviceMemory::reset(std::uint64_t bytes) {
  release_all(true);
  release_all(false);
  peak_ = client_peak_ = 0;
  limit_ = bytes;
  if (next_ - base_ > kKeptPages) {
    madvise(shadow(base_ + kKeptPages), size_ - kKeptPages, MADV_DONTNEED);
    next_ = base_;
  }
}

std::optional<std::uint64_t> DeviceMemory::allocate(std::uint64_t bytes, bool external) {
  if (bytes > limit_ || used() + bytes > limit_) return std::nullopt;
  if (size_ == 0 || (live_.empty() && size_ < 2 * limit_)) {
    unmap();
    size_ = std::max(kSmallestRange, round_up(2 * limit_, kPage));
    base_ = reinterpret_cast<std::uint64_t>(map(size_, PROT_NONE));
    shadow_ = static_cast<std::byte*>(map(size_, PROT_READ | PROT_WRITE));
    next_ = base_;
  }
  // Next fit: reuses freed addresses as late as possible, so that late accesses to them are found.
  const std::uint64_t need = round_up(std::max<std::uint64_t>(bytes, 1), kAlignment) + kGuard;
  std::uint64_t at = next_;
  bool wrapped = false;
  for (;;) {
    if (at + need > base_ + size_) {
      if (wrapped) return std::nullopt;
      wrapped = true;
      at = base_;
    }
    auto after = live_.lower_bound(at);
    if (after != live_.begin()) {
      const auto& [start, allocation] = *std::prev(after);
      const std::uint64_t end = round_up(start + allocation.bytes, kAlignment) + kGuard;
      if (end > at) {
        at = end;
        continue;
      }
    }
    if (after == live_.end() || after->first >= at + need) break;
    at = round_up(after->first + after->second.bytes, kAlignment) + kGuard;
  }
  next_ = at + need;
  live_.emplace(at, Allocation{bytes, external});
  std::memset(shadow(at), kFresh, bytes);
  (external ? external_bytes_ : client_bytes_) += bytes;
  (external ? external_count_ : client_count_) += 1;
  peak_ = std::max(peak_, used());
  client_peak_ = std::max(client_peak_, client_bytes_);
  return at;
}

void DeviceMemory::forget(std::map<std::uint64_t, Allocation>::iterator allocation) {
  const auto [address, is] = *allocation;
  const std::uint64_t first = round_up(address, kPage);
  const std::uint64_t last = (address + is.bytes) / kPage * kPage;
  if (last > first && last - first >= kWorthReturning) {
    madvise(shadow(first), last - first, MADV_DONTNEED);
  } else {
    std::memset(shadow(address), kFreed, is.bytes);
  }
  (is.external ? external_bytes_ : client_bytes_) -= is.bytes;
  (is.external ? external_count_ : client_count_) -= 1;
  live_.erase(allocation);
}

std::optional<Allocation> DeviceMemory::release(std::uint64_t address) {
  const auto found = live_.find(address);
  if (found == live_.end()) return std::nullopt;
  const Allocation allocation = found->second;
  forget(found);
  return allocation;
}

void DeviceMemory::release_all(bool external) {
  for (auto each = live_.begin(); each != live_.end();) {
    const auto current = each++;
    if (current->second.external == external) forget(current);
  }
}

const std::pair<const std::uint64_t, Allocation>* DeviceMemory::find(std::uint64_t address,
                                                                     std::uint64_t bytes) const {
  auto after = live_.upper_bound(address);
  if (after == live_.begin()) return nullptr;
  const auto& entry = *std::prev(after);
  const std::uint64_t offset = address - entry.first;
  if (offset > entry.second.bytes || bytes > entry.second.bytes - offset) return nullptr;
  return &entry;
}

}  // namespace weightlift::simulated
