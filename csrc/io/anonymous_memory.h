// Memory of our own, on huge pages where it is large enough for them.
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
  // Zero bytes, not yet backed; aligned to a huge page from one huge page on. kOutOfMemory where
  // the system refuses.
  [[nodiscard]] static Result<AnonymousMemory> allocate(std::size_t bytes, bool huge_pages = true);

  AnonymousMemory() = default;
  AnonymousMemory(AnonymousMemory&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}
  AnonymousMemory& operator=(AnonymousMemory&& other) noexcept;
  ~AnonymousMemory();

  [[nodiscard]] std::byte* data() const noexcept { return data_; }
  [[nodiscard]] std::size_t size() const noexcept { return bytes_; }

  // Has what is not yet backed come from this node of the machine while it has some (mbind(2),
  // MPOL_PREFERRED). A hint: of no node (-1), of one that there is not, or in a sandbox that
  // refuses the call, the pages come from where the thread runs that touches them.
  void prefer_node(int node) const noexcept;

  // Backs the pages of [offset, offset + bytes) now, by this thread.
  [[nodiscard]] Status populate(std::size_t offset, std::size_t bytes) const;

  // Has what is not yet backed of [offset, offset + bytes) backed by small pages from now on.
  void use_small_pages(std::size_t offset, std::size_t bytes) const noexcept;

  // Whether the page at `offset` is backed.
  [[nodiscard]] bool is_backed(std::size_t offset) const noexcept;

  // Cuts off what lies behind the first `bytes`, rounded up to whole huge pages, and returns it;
  // empty where there is nothing.
  [[nodiscard]] AnonymousMemory split(std::size_t bytes) noexcept;

  // Takes memory that lies right before or behind this one into it. False, and nothing is done,
  // where it lies elsewhere.
  bool join(AnonymousMemory& neighbour) noexcept;

  // Keeps the pages out of children (madvise(2) MADV_DONTFORK): a copy-on-write fault in the parent
  // after fork() would move pages away under a device that reads them.
  void keep_from_children() noexcept;

  // In a child, of pages that were kept from it: nothing of this process lies there.
  void forget() noexcept { data_ = nullptr; }

 private:
  AnonymousMemory(std::byte* data, std::size_t bytes) noexcept : data_(data), bytes_(bytes) {}

  std::byte* data_ = nullptr;
  std::size_t bytes_ = 0;
};

// Gives the whole pages inside [data, data + bytes) back to the system; they read as before (file
// mappings) or as zero (anonymous memory) if touched again.
void release_whole_pages(std::byte* data, std::size_t bytes) noexcept;

// Lets the kernel take the whole huge pages inside [data, data + bytes) where memory is short,
// until they are written to again (madvise(2) MADV_FREE). The others stay: a huge page that is
// marked in part is split.
void release_under_pressure(std::byte* data, std::size_t bytes) noexcept;

}  // namespace weightlift::io
