#include "io/anonymous_memory.h"

#include <linux/mempolicy.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <utility>

#include "result.h"

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23  // Linux 5.14
#endif

namespace weightlift::io {
namespace {

constexpr std::size_t round_up(std::size_t value, std::size_t unit) {
  return (value + unit - 1) / unit * unit;
}

void advise_whole(std::byte* data, std::size_t bytes, std::size_t unit, int advice) {
  const auto begin = reinterpret_cast<std::uintptr_t>(data);
  const std::uintptr_t first = round_up(begin, unit);
  const std::uintptr_t last = (begin + bytes) / unit * unit;
  if (first < last) ::madvise(reinterpret_cast<void*>(first), last - first, advice);
}

Error out_of_memory(std::size_t bytes, int error_number) {
  return {.code = ErrorCode::kOutOfMemory,
          .message = "cannot allocate " + std::to_string(bytes) + " bytes of memory: " +
                     std::strerror(error_number) + "; free memory, or load fewer tensors",
          .system_errno = error_number};
}

}  // namespace

Result<AnonymousMemory> AnonymousMemory::allocate(std::size_t bytes, bool huge_pages) {
  if (bytes == 0) return AnonymousMemory();
  if (bytes > (std::size_t{1} << 47)) return out_of_memory(bytes, ENOMEM);
  const bool huge = bytes >= kHugePageBytes;
  const std::size_t length = round_up(bytes, kPageBytes);
  const std::size_t reserved = huge ? length + kHugePageBytes : length;
  void* mapped =
      ::mmap(nullptr, reserved, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) return out_of_memory(bytes, errno);
  auto* data = static_cast<std::byte*>(mapped);
  if (huge) {
    const auto address = reinterpret_cast<std::uintptr_t>(data);
    const std::size_t head = round_up(address, kHugePageBytes) - address;
    if (head != 0) ::munmap(data, head);
    const std::size_t tail = reserved - head - length;
    if (tail != 0) ::munmap(data + head + length, tail);
    data += head;
    // A hint: if transparent huge pages are off, the memory gets small pages.
    ::madvise(data, length, huge_pages ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
  }
  return AnonymousMemory(data, length);
}

AnonymousMemory& AnonymousMemory::operator=(AnonymousMemory&& other) noexcept {
  if (this != &other) {
    const AnonymousMemory old(std::exchange(data_, std::exchange(other.data_, nullptr)),
                              std::exchange(bytes_, std::exchange(other.bytes_, 0)));
  }
  return *this;
}

AnonymousMemory::~AnonymousMemory() {
  if (data_ != nullptr) ::munmap(data_, bytes_);
}

void AnonymousMemory::prefer_node(int node) const noexcept {
  constexpr int kBits = 8 * sizeof(unsigned long);
  constexpr int kNodes = 1024;  // CONFIG_NODES_SHIFT is at most 10
  if (data_ == nullptr || node < 0 || node >= kNodes) return;
  std::array<unsigned long, kNodes / kBits> nodes{};
  nodes[static_cast<std::size_t>(node / kBits)] = 1UL << (node % kBits);
  // One more than the number of bits, because the kernel subtracts one.
  ::syscall(SYS_mbind, data_, bytes_, MPOL_PREFERRED, nodes.data(), kNodes + 1, 0);
}

Status AnonymousMemory::populate(std::size_t offset, std::size_t bytes) const {
  std::byte* const begin = data_ + offset / kPageBytes * kPageBytes;
  std::byte* const end = data_ + offset + bytes;
  while (begin != end &&
         ::madvise(begin, static_cast<std::size_t>(end - begin), MADV_POPULATE_WRITE) != 0) {
    if (errno == EINTR || errno == EAGAIN) continue;
    if (errno == ENOMEM || errno == EFAULT || errno == EHWPOISON) {
      return out_of_memory(bytes, errno);
    }
    // Linux before 5.14 does not know this advice, and a sandbox may refuse it: touch the pages.
    // Another thread may be writing to them, so no byte may change. A constant 0 would let the
    // compiler read instead, which backs nothing.
    const volatile unsigned char no_bits = 0;
    for (std::byte* at = begin; at < end; at += kPageBytes) {
      std::atomic_ref(*reinterpret_cast<unsigned char*>(at)).fetch_or(no_bits);
    }
    break;
  }
  return {};
}

void AnonymousMemory::use_small_pages(std::size_t offset, std::size_t bytes) const noexcept {
  const std::size_t begin = round_up(offset, kPageBytes);
  const std::size_t end = std::min(bytes_, offset + bytes) / kPageBytes * kPageBytes;
  if (begin < end) ::madvise(data_ + begin, end - begin, MADV_NOHUGEPAGE);
}

bool AnonymousMemory::is_backed(std::size_t offset) const noexcept {
  unsigned char resident = 0;
  std::byte* const page = data_ + offset / kPageBytes * kPageBytes;
  return ::mincore(page, kPageBytes, &resident) == 0 && (resident & 1) != 0;
}

AnonymousMemory AnonymousMemory::split(std::size_t bytes) noexcept {
  const std::size_t kept = round_up(bytes, kHugePageBytes);
  if (kept >= bytes_) return {};
  const std::size_t rest = std::exchange(bytes_, kept) - kept;
  return {data_ + kept, rest};
}

bool AnonymousMemory::join(AnonymousMemory& neighbour) noexcept {
  if (neighbour.data_ + neighbour.bytes_ == data_) {
    data_ = neighbour.data_;
  } else if (data_ + bytes_ != neighbour.data_) {
    return false;
  }
  bytes_ += std::exchange(neighbour.bytes_, 0);
  neighbour.data_ = nullptr;
  return true;
}

void AnonymousMemory::keep_from_children() noexcept {
  if (data_ != nullptr) ::madvise(data_, bytes_, MADV_DONTFORK);
}

void back_pages(std::byte* data, std::size_t bytes) noexcept {
  const auto begin = reinterpret_cast<std::uintptr_t>(data) / kPageBytes * kPageBytes;
  const auto end = round_up(reinterpret_cast<std::uintptr_t>(data) + bytes, kPageBytes);
  ::madvise(reinterpret_cast<void*>(begin), end - begin, MADV_POPULATE_WRITE);
}

void release_whole_pages(std::byte* data, std::size_t bytes) noexcept {
  advise_whole(data, bytes, kPageBytes, MADV_DONTNEED);
}

void release_under_pressure(std::byte* data, std::size_t bytes) noexcept {
  advise_whole(data, bytes, kHugePageBytes, MADV_FREE);
}

}  // namespace weightlift::io
