// A checkpoint file, or a part of one, with its index; and an archive of such files.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "format/index.h"
#include "format/zip.h"
#include "io/file.h"
#include "io/mapping.h"

namespace weightlift::bind {

// The file, its index and, while it is in use, the mapping. Once names() has made strings, it must
// be deleted with the GIL held.
struct IndexedFile {
  std::shared_ptr<io::File> file;
  std::shared_ptr<const format::Index> index;
  std::weak_ptr<io::Mapping> mapping;
  pybind11::object all_names;  // null before the first names()

  // Opens the safetensors file in [begin, begin + bytes) of `file`; without `bytes`, up to the end.
  [[nodiscard]] static Result<std::shared_ptr<IndexedFile>> open(
      std::shared_ptr<io::File> file, std::uint64_t begin = 0,
      std::optional<std::uint64_t> bytes = std::nullopt);
  // Makes an index of tensors whose places are known.
  [[nodiscard]] static Result<std::shared_ptr<IndexedFile>> of_entries(
      std::shared_ptr<io::File> file, std::vector<format::TensorEntry> entries);

  // The mapping that all mapped tensors of this object share.
  [[nodiscard]] Result<std::shared_ptr<io::Mapping>> map();

  // The names of all tensors. The strings are made once: a load asks for them several times, and
  // a string keeps its hash.
  [[nodiscard]] pybind11::list names();
};

// Positions in an index; without a value, all of them.
using Which = std::optional<std::vector<std::uint32_t>>;

// The tensor at a position; IndexError if there is none.
[[nodiscard]] const format::TensorInfo& tensor_at(const IndexedFile& source, std::size_t position);

// Visits the tensors at the given positions, or all.
template <class Visit>
void for_each_tensor(const IndexedFile& source, const Which& which, const Visit& visit) {
  const auto tensors = source.index->tensors();
  if (!which) {
    for (const format::TensorInfo& tensor : tensors) visit(tensor);
    return;
  }
  for (const std::uint32_t position : *which) {
    visit(tensor_at(source, position));
  }
}

// A zip file of stored records.
struct Archive {
  std::shared_ptr<io::File> file;
  std::vector<format::ZipRecord> records;  // in the order of their bytes

  [[nodiscard]] static Result<std::shared_ptr<Archive>> open(const std::string& path);
};

}  // namespace weightlift::bind
