#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "bind/bindings.h"
#include "bind/errors.h"
#include "bind/gil.h"
#include "bind/indexed_file.h"
#include "bind/torch_pickle.h"
#include "bind/values.h"
#include "format/index.h"
#include "format/torch_archive.h"
#include "format/torch_pickle.h"
#include "format/zip.h"
#include "io/file.h"
#include "io/residency.h"
#include "result.h"

namespace py = pybind11;

namespace weightlift::bind {
namespace {

py::bytes read_bytes(const Archive& self, std::uint64_t begin, std::uint64_t bytes) {
  if (begin > self.file->size() || bytes > self.file->size() - begin) {
    throw py::index_error("these bytes leave the file, which has " +
                          std::to_string(self.file->size()) + " bytes");
  }
  auto result = py::reinterpret_steal<py::bytes>(
      PyBytes_FromStringAndSize(nullptr, static_cast<Py_ssize_t>(bytes)));
  if (!result) throw py::error_already_set();
  char* const data = PyBytes_AS_STRING(result.ptr());
  auto done = [&] {
    const UnlockedGil unlocked;
    return self.file->read_exact(begin, std::as_writable_bytes(std::span(data, bytes)));
  }();
  raise_if_error(std::move(done));
  return result;
}

// The records of these names in the folder that all records are in; none if there is no such
// folder.
py::dict find_records(const Archive& self, const std::vector<std::string>& names) {
  py::dict found;
  const std::string_view folder = format::common_folder(self.records);
  if (folder.empty()) return found;
  for (const format::ZipRecord& record : self.records) {
    const std::string_view name = std::string_view(record.name).substr(folder.size());
    if (std::ranges::find(names, name) == names.end()) continue;
    found[text(name)] = py::make_tuple(record.begin, record.bytes);
  }
  return found;
}

// Each tied tensor as (name, name of its base, dtype, shape, stride).
py::list tuples_of(std::span<const format::TiedTensor> ties) {
  py::list tuples;
  for (const format::TiedTensor& tied : ties) {
    tuples.append(py::make_tuple(text(tied.name), text(tied.base), dtype_text(tied.dtype),
                                 shape_tuple(tied.shape), shape_tuple(tied.stride)));
  }
  return tuples;
}

// Returns the index of a plain state dict, the names in its order and its tied tensors, None for
// all others.
py::object index_of_plain(const Archive& self, const py::bytes& pickle) {
  const std::string_view data = pickle;
  std::optional<format::PlainTensors> plain;
  bool in_file_order = true;
  auto opened = [&]() -> Result<std::shared_ptr<IndexedFile>> {
    const UnlockedGil unlocked;
    auto parsed = format::parse_torch_pickle(data);
    if (!parsed) return std::shared_ptr<IndexedFile>();
    plain = format::place_plain_tensors(*std::move(parsed), self.records,
                                        format::common_folder(self.records));
    if (!plain) return std::shared_ptr<IndexedFile>();
    in_file_order = plain->ties.empty() &&
                    std::ranges::is_sorted(plain->entries, {}, &format::TensorEntry::begin);
    return IndexedFile::of_entries(self.file, std::move(plain->entries));
  }();
  // A name that repeats is no error in a pickle, where the last value counts.
  const auto index = opened.ok() ? *std::move(opened) : nullptr;
  if (index == nullptr) return py::none();
  const py::list ties = tuples_of(plain->ties);
  if (in_file_order) return py::make_tuple(index, index->names(), ties);
  py::list order;
  for (const std::string_view name : plain->names) order.append(text(name));
  return py::make_tuple(index, order, ties);
}

using EntryTuple = std::tuple<std::string, std::string, std::vector<std::uint64_t>, std::uint64_t>;

std::shared_ptr<IndexedFile> index_of_entries(const Archive& self,
                                              std::vector<EntryTuple> entries) {
  std::vector<format::TensorEntry> parsed;
  parsed.reserve(entries.size());
  for (auto& [name, dtype, shape, begin] : entries) {
    parsed.push_back({std::move(name), dtype_of(dtype), std::move(shape), begin});
  }
  return value_or_raise(IndexedFile::of_entries(self.file, std::move(parsed)));
}

py::dict headers(IndexedFile& self) {
  py::dict headers;
  const py::list names = self.names();
  Py_ssize_t position = 0;
  for (const format::TensorInfo& tensor : self.index->tensors()) {
    const py::tuple header = py::make_tuple(dtype_text(tensor.dtype), shape_tuple(tensor.shape));
    if (PyDict_SetItem(headers.ptr(), PyList_GET_ITEM(names.ptr(), position), header.ptr()) != 0) {
      throw py::error_already_set();
    }
    ++position;
  }
  return headers;
}

void bind_indexed_file(const py::module_& module) {
  py::class_<IndexedFile, std::shared_ptr<IndexedFile>>(module, "IndexedFile")
      .def_static(
          "open",
          [](const py::str& path, std::uint64_t begin, std::optional<std::uint64_t> bytes) {
            auto opened = [&, name = path_bytes(path)]() -> Result<std::shared_ptr<IndexedFile>> {
              const UnlockedGil unlocked;
              WL_ASSIGN_OR_RETURN(auto file, io::File::open(name));
              return IndexedFile::open(std::move(file), begin, bytes);
            }();
            return value_or_raise(std::move(opened));
          },
          py::arg("path"), py::arg("begin") = 0, py::arg("bytes") = py::none())
      .def_property_readonly("path",
                             [](const IndexedFile& self) { return path_text(self.file->path()); })
      .def_property_readonly("identity",
                             [](const IndexedFile& self) { return self.file->identity(); })
      .def_property_readonly("size", [](const IndexedFile& self) { return self.file->size(); })
      .def("__len__", [](const IndexedFile& self) { return self.index->tensors().size(); })
      .def(
          "names",
          [](IndexedFile& self, const Which& which) {
            if (!which) return self.names();
            py::list names;
            for_each_tensor(self, which, [&](const format::TensorInfo& tensor) {
              names.append(text(tensor.name));
            });
            return names;
          },
          py::arg("which") = py::none())
      .def(
          "dtypes",
          [](const IndexedFile& self, const Which& which) {
            py::list dtypes;
            for_each_tensor(self, which, [&](const format::TensorInfo& tensor) {
              dtypes.append(dtype_text(tensor.dtype));
            });
            return dtypes;
          },
          py::arg("which") = py::none())
      .def(
          "shapes",
          [](const IndexedFile& self, const Which& which) {
            py::list shapes;
            for_each_tensor(self, which, [&](const format::TensorInfo& tensor) {
              shapes.append(shape_tuple(tensor.shape));
            });
            return shapes;
          },
          py::arg("which") = py::none())
      .def(
          "sizes",
          [](const IndexedFile& self, const Which& which) {
            py::list sizes;
            for_each_tensor(self, which,
                            [&](const format::TensorInfo& tensor) { sizes.append(tensor.bytes); });
            return sizes;
          },
          py::arg("which") = py::none())
      .def("headers", &headers)
      .def(
          "find",
          [](const IndexedFile& self, std::string_view name) -> std::optional<std::uint32_t> {
            return self.index->find(name);
          },
          py::arg("name"))
      .def(
          "dtype",
          [](const IndexedFile& self, std::size_t i) {
            return dtype_text(tensor_at(self, i).dtype);
          },
          py::arg("position"))
      .def(
          "shape",
          [](const IndexedFile& self, std::size_t i) {
            return shape_tuple(tensor_at(self, i).shape);
          },
          py::arg("position"))
      .def(
          "range",
          [](const IndexedFile& self, std::size_t i) {
            const auto& tensor = tensor_at(self, i);
            return py::make_tuple(tensor.begin, tensor.begin + tensor.bytes);
          },
          py::arg("position"))
      .def("metadata",
           [](const IndexedFile& self) -> py::object {
             const auto* const metadata = self.index->metadata();
             if (metadata == nullptr) return py::none();
             py::dict result;
             for (const auto& [key, value] : *metadata) result[text(key)] = text(value);
             return result;
           })
      .def("resident_bytes",
           [](const IndexedFile& self) {
             return io::resident_bytes(*self.file, 0, self.file->size());
           })
      .def("drop_from_page_cache",
           [](const IndexedFile& self) { io::drop_from_page_cache(*self.file); });
}

void bind_archive(const py::module_& module) {
  py::class_<Archive, std::shared_ptr<Archive>>(module, "Archive")
      .def_static(
          "open",
          [](const py::str& path) {
            auto opened = [name = path_bytes(path)] {
              const UnlockedGil unlocked;
              return Archive::open(name);
            }();
            return value_or_raise(std::move(opened));
          },
          py::arg("path"))
      .def_property_readonly("path",
                             [](const Archive& self) { return path_text(self.file->path()); })
      .def_property_readonly("identity", [](const Archive& self) { return self.file->identity(); })
      .def_property_readonly("size", [](const Archive& self) { return self.file->size(); })
      .def("records",
           [](const Archive& self) {
             py::list records;
             for (const format::ZipRecord& record : self.records) {
               records.append(py::make_tuple(text(record.name), record.begin, record.bytes,
                                             record.crc32, record.zip64));
             }
             return records;
           })
      .def("find", &find_records, py::arg("names"))
      .def("read", &read_bytes, py::arg("begin"), py::arg("bytes"))
      .def("index_of_plain", &index_of_plain, py::arg("pickle"))
      .def(
          "safetensors",
          [](const Archive& self, std::uint64_t begin, std::uint64_t bytes) {
            auto opened = [&] {
              const UnlockedGil unlocked;
              return IndexedFile::open(self.file, begin, bytes);
            }();
            return value_or_raise(std::move(opened));
          },
          py::arg("begin"), py::arg("bytes"))
      .def("index", &index_of_entries, py::arg("entries"));
}

}  // namespace

void bind_checkpoint(py::module_& module) {
  bind_indexed_file(module);
  bind_archive(module);
  module.def("torch_pickle", &torch_pickle, py::arg("pickle"), py::arg("tensor"));
}

}  // namespace weightlift::bind
