// The contents of a checkpoint file: names, dtypes, shapes and byte ranges of its tensors. Only a
// parser or make_index() can make an Index, so an Index that exists has been checked.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "dtype.h"
#include "result.h"

namespace weightlift::format {

struct TensorInfo {
  std::string_view name;  // UTF-8, may be empty, may hold any character
  Dtype dtype = Dtype::kU8;
  std::span<const std::uint64_t> shape;  // in elements; empty for a scalar
  std::uint64_t begin = 0;               // bytes from the start of the file
  std::uint64_t bytes = 0;
};

class Index {
 public:
  // In the order of the file's bytes; tensors of size zero at the same place are in the order of
  // their names.
  [[nodiscard]] std::span<const TensorInfo> tensors() const noexcept { return tensors_; }
  [[nodiscard]] const std::vector<std::pair<std::string, std::string>>* metadata() const noexcept {
    return metadata_ ? &*metadata_ : nullptr;  // null where the header has no `__metadata__`
  }
  [[nodiscard]] std::uint64_t data_begin() const noexcept { return data_begin_; }
  // The position of a name in tensors().
  [[nodiscard]] std::optional<std::uint32_t> find(std::string_view name) const noexcept;

  Index(const Index&) = delete;
  Index& operator=(const Index&) = delete;
  ~Index();

 private:
  friend class SafetensorsParser;
  friend class EntriesIndexer;
  Index();

  std::vector<TensorInfo> tensors_;  // views into the two below
  std::string names_;
  std::vector<std::uint64_t> extents_;
  std::optional<std::vector<std::pair<std::string, std::string>>> metadata_;
  std::uint64_t data_begin_ = 0;
  struct ByName;  // built by the parser: it has to find duplicate names anyway
  std::unique_ptr<ByName> by_name_;
};

// A tensor whose place in a file is known from another source, such as torch's unpickler.
struct TensorEntry {
  std::string name;
  Dtype dtype = Dtype::kU8;
  std::vector<std::uint64_t> shape;
  std::uint64_t begin = 0;  // bytes from the start of the file
};

// Makes the Index of such tensors. They may share bytes. A tensor past the end of the file and a
// duplicate name are errors.
[[nodiscard]] Result<std::shared_ptr<const Index>> make_index(std::vector<TensorEntry> entries,
                                                              std::uint64_t file_size,
                                                              const std::string& path);

}  // namespace weightlift::format
