// A whole file mapped private and writable: writes stay in this process, the page cache is shared.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "io/file.h"
#include "result.h"

namespace weightlift::io {

class Mapping {
 public:
  // MAP_NORESERVE: a file larger than the memory is no reason to refuse, its pages come and go.
  [[nodiscard]] static Result<std::shared_ptr<Mapping>> map(
      const std::shared_ptr<const File>& file);

  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;
  ~Mapping();

  [[nodiscard]] std::byte* data() const noexcept { return data_; }  // null for an empty file

  // Reads the pages of [offset, offset + bytes) in and maps them (madvise(2) MADV_POPULATE_READ):
  // a truncated file or a bad disk is an error here, where a touch would be a SIGBUS. False where
  // that cannot be done: by a kernel older than 5.14, in a sandbox that does not know the advice,
  // or when the file is gone from the program.
  [[nodiscard]] Result<bool> populate(std::uint64_t offset, std::uint64_t bytes) const;

 private:
  Mapping(const std::shared_ptr<const File>& file, std::byte* data)
      : file_(file), bytes_(file->size()), data_(data) {}

  // Does not keep it open: a model of a thousand mapped shards would hold a thousand descriptors
  // for as long as it lives, and mmap(2) needs none.
  std::weak_ptr<const File> file_;
  std::size_t bytes_;
  std::byte* data_;
};

}  // namespace weightlift::io
