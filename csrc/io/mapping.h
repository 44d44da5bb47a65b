// A whole file, mapped private and writable: writes stay in this process, unwritten pages are the
// page cache's.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "io/file.h"
#include "result.h"

namespace weightlift::io {

class Mapping {
 public:
  // MAP_NORESERVE, so that a file larger than the memory can be mapped: its pages come and go.
  [[nodiscard]] static Result<std::shared_ptr<Mapping>> map(
      const std::shared_ptr<const File>& file);

  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;
  ~Mapping();

  [[nodiscard]] std::byte* data() const noexcept { return data_; }  // null for an empty file

  // Reads the pages of [offset, offset + bytes) in and maps them (madvise(2) MADV_POPULATE_READ). A
  // truncated file or a bad disk is an error here, where a touch would raise SIGBUS. Returns false
  // if the kernel is older than 5.14, a sandbox refuses the advice, or the File no longer exists.
  [[nodiscard]] Result<bool> populate(std::uint64_t offset, std::uint64_t bytes) const;

  // Whether faults read forwards from the page (madvise(2), MADV_SEQUENTIAL). Without this they
  // read as much before the page as after it, in small folios (mm/filemap.c,
  // do_sync_mmap_readahead), so that a tensor that does not follow the last one arrives late.
  // Switch it off at the end, because the kernel reclaims such pages first.
  void read_forwards(bool whether) const noexcept;

  // From now on a fault reads 4 MiB in folios of 2 MiB, the second half while the first is used
  // (madvise(2), MADV_HUGEPAGE; mm/filemap.c, do_sync_mmap_readahead, since Linux 5.18). Otherwise
  // the pages of a tensor that does not follow the last one are read one by one, which takes most
  // of a processor. Reads too much where the tensors that are needed lie far apart.
  void read_in_large_folios(bool whether) const noexcept;

 private:
  Mapping(const std::shared_ptr<const File>& file, std::byte* data)
      : file_(file), bytes_(file->size()), data_(data) {}

  // Weak, because a mapping needs no open file (mmap(2)): a model of a thousand mapped shards would
  // hold a thousand descriptors for as long as it lives.
  std::weak_ptr<const File> file_;
  std::size_t bytes_;
  std::byte* data_;
};

}  // namespace weightlift::io
