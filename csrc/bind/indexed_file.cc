#include "bind/indexed_file.h"

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "bind/values.h"
#include "format/index.h"
#include "format/safetensors.h"
#include "format/zip.h"
#include "io/file.h"
#include "io/mapping.h"
#include "result.h"

namespace weightlift::bind {
namespace {

// Bytes from which format/ recognises a web page, a git-lfs pointer and other foreign files.
constexpr std::uint64_t kFirstBytes = 512;

}  // namespace

Result<std::shared_ptr<IndexedFile>> IndexedFile::open(std::shared_ptr<io::File> file,
                                                       std::uint64_t begin,
                                                       std::optional<std::uint64_t> bytes) {
  const std::string& path = file->path();
  if (begin > file->size() || bytes.value_or(0) > file->size() - begin) {
    return Error{.code = ErrorCode::kInvalidArgument,
                 .message = "the requested part leaves the file, which has " +
                            std::to_string(file->size()) + " bytes: give a range inside it",
                 .path = path,
                 .offset = begin};
  }
  const std::uint64_t size = bytes.value_or(file->size() - begin);
  std::vector<std::byte> first(std::min(kFirstBytes, size));
  WL_RETURN_IF_ERROR(file->read_index(begin, first));
  WL_ASSIGN_OR_RETURN(const std::uint64_t length, format::header_length(first, size, path, begin));
  std::vector<std::byte> header(length);
  const std::size_t known = std::min<std::size_t>(length, first.size() - format::kLengthBytes);
  std::copy_n(first.begin() + format::kLengthBytes, known, header.begin());
  WL_RETURN_IF_ERROR(
      file->read_index(begin + format::kLengthBytes + known, std::span(header).subspan(known)));
  WL_ASSIGN_OR_RETURN(auto index, format::parse_header(header, size, path, begin));
  return std::make_shared<IndexedFile>(IndexedFile{
      .file = std::move(file), .index = std::move(index), .mapping = {}, .all_names = {}});
}

Result<std::shared_ptr<IndexedFile>> IndexedFile::of_entries(
    std::shared_ptr<io::File> file, std::vector<format::TensorEntry> entries) {
  WL_ASSIGN_OR_RETURN(auto index,
                      format::make_index(std::move(entries), file->size(), file->path()));
  return std::make_shared<IndexedFile>(IndexedFile{
      .file = std::move(file), .index = std::move(index), .mapping = {}, .all_names = {}});
}

Result<std::shared_ptr<io::Mapping>> IndexedFile::map() {
  if (auto mapped = mapping.lock()) return mapped;
  WL_ASSIGN_OR_RETURN(auto mapped, io::Mapping::map(file));
  mapping = mapped;
  return mapped;
}

pybind11::list IndexedFile::names() {
  if (!all_names) {
    pybind11::list made;
    for (const format::TensorInfo& tensor : index->tensors()) made.append(text(tensor.name));
    all_names = std::move(made);
  }
  // The caller may change its list.
  auto copy = pybind11::reinterpret_steal<pybind11::list>(
      PyList_GetSlice(all_names.ptr(), 0, PY_SSIZE_T_MAX));
  if (!copy) throw pybind11::error_already_set();
  return copy;
}

const format::TensorInfo& tensor_at(const IndexedFile& source, std::size_t position) {
  const auto tensors = source.index->tensors();
  if (position >= tensors.size())
    throw pybind11::index_error("no such tensor in the index: position " +
                                std::to_string(position) + " of " + std::to_string(tensors.size()));
  return tensors[position];
}

Result<std::shared_ptr<Archive>> Archive::open(const std::string& path) {
  WL_ASSIGN_OR_RETURN(std::shared_ptr<io::File> file, io::File::open(path));
  std::vector<std::byte> first(std::min(kFirstBytes, file->size()));
  WL_RETURN_IF_ERROR(file->read_index(0, first));
  WL_ASSIGN_OR_RETURN(const bool zip, format::is_zip(first, file->size(), path));
  if (!zip) {
    return Error{.code = ErrorCode::kNotArchive,
                 .message = "this is not a zip file: download it again, or give another path",
                 .path = path,
                 .offset = 0};
  }
  WL_ASSIGN_OR_RETURN(auto records, format::parse_zip(
                                        [&file](std::uint64_t offset, std::span<std::byte> target) {
                                          return file->read_index(offset, target);
                                        },
                                        file->size(), path));
  return std::make_shared<Archive>(Archive{.file = std::move(file), .records = std::move(records)});
}

}  // namespace weightlift::bind
