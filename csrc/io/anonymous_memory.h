// Anonymous memory, on huge pages if it is large enough for them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

#include "result.h"

namespace weightlift::io {

inline constexpr std::size_t kPageBytes = 4096;
inline constexpr std::size_t kHugePageBytes = std::size_t{2} << 20;

class AnonymousMemory {
 public:
  // Zeroed memory, not yet backed by pages. From the size of a huge page on it is aligned to one.
  // kOutOfMemory if the system refuses.
  [[nodiscard]] static Result<AnonymousMemory> allocate(std::size_t bytes, bool huge_pages = true);

  AnonymousMemory() = default;
  AnonymousMemory(AnonymousMemory&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}
  AnonymousMemory& operator=(AnonymousMemory&& other) noexcept;
  ~AnonymousMemory();

  [[nodiscard]] std::byte* data() const noexcept { return data_; }
  [[nodiscard]] std::size_t size() const noexcept { return bytes_; }

  // Takes pages that are not yet backed from this NUMA node while it has free ones (mbind(2),
  // MPOL_PREFERRED). A hint: if `node` is -1 or does not exist, or a sandbox refuses the call,
  // pages come from the node of the thread that touches them first.
  void prefer_node(int node) const noexcept;

  // Backs the pages of [offset, offset + bytes) now, on the calling thread. Changes no byte, so
  // other threads may write meanwhile.
  [[nodiscard]] Status populate(std::size_t offset, std::size_t bytes) const;

  // The pages of [offset, offset + bytes) that are not yet backed will be small ones.
  void use_small_pages(std::size_t offset, std::size_t bytes) const noexcept;

  // Whether the page at `offset` is backed.
  [[nodiscard]] bool is_backed(std::size_t offset) const noexcept;

  // Keeps the first `bytes`, rounded up to whole huge pages, and returns the rest, which may be
  // empty.
  [[nodiscard]] AnonymousMemory split(std::size_t bytes) noexcept;

  // Merges `neighbour`, which lies right before or after this memory, into it. Returns false and
  // does nothing if it lies elsewhere.
  bool join(AnonymousMemory& neighbour) noexcept;

  // Keeps the pages out of child processes (madvise(2) MADV_DONTFORK): after fork(), a
  // copy-on-write fault in the parent would replace pages that a device reads.
  void keep_from_children() noexcept;

  // Call in a child process for pages that were kept from it: the address range is not this memory
  // there, and must not be unmapped.
  void forget() noexcept { data_ = nullptr; }

 private:
  AnonymousMemory(std::byte* data, std::size_t bytes) noexcept : data_(data), bytes_(bytes) {}

  std::byte* data_ = nullptr;
  std::size_t bytes_ = 0;
};

// Backs all pages of [data, data + bytes) by one system call, and changes no byte. A hint: where
// the kernel does not know it (before Linux 5.14), the pages are backed when they are touched.
void back_pages(std::byte* data, std::size_t bytes) noexcept;

// Returns the whole pages inside [data, data + bytes) to the system. If they are touched again,
// they have the file's bytes (file mappings) or zeros (anonymous memory).
void release_whole_pages(std::byte* data, std::size_t bytes) noexcept;

// Allows the kernel to take the whole huge pages inside [data, data + bytes) when memory is short,
// until they are written to again (madvise(2) MADV_FREE). Huge pages that are only partly inside
// are left out, because the kernel would split them.
void release_under_pressure(std::byte* data, std::size_t bytes) noexcept;

}  // namespace weightlift::io
