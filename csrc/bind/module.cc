// The Python module weightlift._native: names and conversions, no work of its own.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>

#include "bind/errors.h"
#include "bind/gil.h"
#include "bind/indexed_file.h"
#include "bind/plan_builder.h"
#include "bind/tensor_export.h"
#include "bind/torch_pickle.h"
#include "convert/cast.h"
#include "convert/scatter.h"
#include "device/context.h"
#include "device/staging.h"
#include "engine/host_memory.h"
#include "engine/io_path.h"
#include "io/machine.h"
#include "io/residency.h"

namespace py = pybind11;

namespace weightlift::bind {
namespace {

Dtype dtype_of(const std::string& name) {
  const auto dtype = dtype_from_name(name);
  if (!dtype) throw py::value_error("unknown dtype " + name);
  return *dtype;
}

std::vector<Dtype> parse_dtypes(const std::vector<std::string>& names) {
  std::vector<Dtype> parsed;
  parsed.reserve(names.size());
  for (const std::string& name : names) parsed.push_back(dtype_of(name));
  return parsed;
}

std::optional<Dtype> optional_dtype(const std::optional<std::string>& name) {
  if (!name) return std::nullopt;
  return dtype_of(*name);
}

py::str text(std::string_view value) {
  return {value.data(), value.size()};
}

// Paths, and texts that name them: bytes to the system, which need not be UTF-8 (PEP 383).
py::object path_text(const std::string& value) {
  PyObject* const decoded =
      PyUnicode_DecodeFSDefaultAndSize(value.data(), static_cast<Py_ssize_t>(value.size()));
  if (decoded == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(decoded);
}

std::string path_bytes(const py::str& path) {
  const auto encoded = py::reinterpret_steal<py::object>(PyUnicode_EncodeFSDefault(path.ptr()));
  if (!encoded) throw py::error_already_set();
  return encoded.cast<py::bytes>();
}

py::tuple shape_tuple(std::span<const std::uint64_t> shape) {
  py::tuple result(shape.size());
  for (std::size_t i = 0; i < shape.size(); ++i) result[i] = py::int_(shape[i]);
  return result;
}

const format::TensorInfo& tensor_at(const IndexedFile& self, std::size_t position) {
  const auto tensors = self.index->tensors();
  if (position >= tensors.size()) throw py::index_error("no such tensor in the index");
  return tensors[position];
}

template <class Enum>
Enum parse_choice(const std::string& value, const char* option,
                  std::initializer_list<std::pair<const char*, Enum>> choices) {
  std::string known;
  for (const auto& [name, choice] : choices) {
    if (value == name) return choice;
    known += (known.empty() ? "'" : ", '") + std::string(name) + "'";
  }
  throw py::value_error(std::string(option) + " is '" + value + "'; it can be " + known);
}

engine::Settings settings_from(unsigned threads, unsigned io_depth, std::size_t read_bytes,
                               std::size_t chunk_bytes, std::size_t pinned_bytes,
                               const std::string& io_path, const std::string& cast_place,
                               const std::string& huge_pages, bool kernels, bool batch_copies,
                               const std::tuple<bool, bool, bool>& fp8) {
  engine::Settings settings;
  settings.threads = threads;
  settings.io_depth = io_depth;
  settings.read_bytes = read_bytes;
  settings.chunk_bytes = chunk_bytes;
  settings.pinned_bytes = pinned_bytes;
  settings.io_path = parse_choice<engine::IoPath>(io_path, "io_path",
                                                  {{"auto", engine::IoPath::kAuto},
                                                   {"buffered", engine::IoPath::kBuffered},
                                                   {"direct", engine::IoPath::kDirect}});
  settings.cast_place = parse_choice<engine::CastPlace>(cast_place, "cast_place",
                                                        {{"auto", engine::CastPlace::kAuto},
                                                         {"host", engine::CastPlace::kHost},
                                                         {"device", engine::CastPlace::kDevice}});
  settings.huge_pages = parse_choice<engine::HugePages>(huge_pages, "huge_pages",
                                                        {{"auto", engine::HugePages::kAuto},
                                                         {"always", engine::HugePages::kAlways},
                                                         {"never", engine::HugePages::kNever}});
  settings.kernels = kernels;
  settings.batch_copies = batch_copies;
  settings.fp8 = {.e4m3_saturates = std::get<0>(fp8),
                  .e4m3_infinity_saturates = std::get<1>(fp8),
                  .e5m2_saturates = std::get<2>(fp8)};
  return settings;
}

py::dict report_dict(const engine::Report& report) {
  py::list files;
  for (const engine::FileReport& file : report.files) {
    files.append(py::make_tuple(path_text(file.path), file.bytes, file.route, file.reason));
  }
  py::list devices;
  for (const engine::DeviceReport& device : report.devices) {
    devices.append(py::make_tuple(device.device, device.bytes));
  }
  py::dict result;
  result["bytes"] = report.bytes;
  result["mapped_bytes"] = report.mapped_bytes;
  result["read_bytes"] = report.read_bytes;
  result["seconds"] = report.seconds;
  result["files"] = files;
  result["devices"] = devices;
  result["pinned_bytes"] = report.pinned_bytes;
  result["peak_staging_bytes"] = report.peak_staging_bytes;
  result["memory"] = report.memory;
  result["threads"] = report.threads;
  py::list fallbacks;
  for (const std::string& fallback : report.fallbacks) fallbacks.append(path_text(fallback));
  result["fallbacks"] = fallbacks;
  py::list touched;
  for (const std::string& path : report.touched) touched.append(path_text(path));
  result["touched"] = touched;
  return result;
}

// Everything `weightlift doctor` asks of the machine, without starting CUDA.
py::dict machine() {
  py::dict result;
  result["cpus"] = io::usable_cpus();
  result["memory_headroom"] = io::memory_headroom();
  result["isa"] = text(convert::isa_name(convert::best_isa()));
  py::list images;
  for (const convert::KernelImage& image : convert::scatter_images()) {
    images.append(
        py::make_tuple(image.architecture, image.is_ptx, image.maker, image.bytes.size()));
  }
  result["kernels"] = images;
  result["kernel_toolkit"] = text(convert::kernel_toolkit());
  return result;
}

// (CUDA version, library) of the driver, and its devices; starts CUDA.
py::dict driver_report() {
  const device::Driver* const table = value_or_raise(device::driver());
  py::dict result;
  result["version"] = table->version;
  result["library"] = table->library;
  const char* const batch = table->batch_form();
  result["batch_copies"] = batch != nullptr ? py::object(text(batch)) : py::object(py::none());
  py::list devices;
  const int count = value_or_raise(device::Device::count());
  for (int ordinal = 0; ordinal < count; ++ordinal) {
    device::Device* const device = value_or_raise(device::Device::get(ordinal));
    const auto kernel = device->scatter_kernel();
    devices.append(py::make_tuple(
        device->name(), device->kernel_form(),
        kernel.ok() ? py::object(py::none()) : py::object(py::str(kernel.error().message))));
  }
  result["devices"] = devices;
  return result;
}

py::bytes read_bytes(const Archive& self, std::uint64_t begin, std::uint64_t bytes) {
  if (begin > self.file->size() || bytes > self.file->size() - begin) {
    throw py::index_error("these bytes leave the file");
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

// Bytes for `from_dlpack`, on huge pages where they fill one.
py::object host_memory(std::uint64_t bytes) {
  const auto memory = value_or_raise(engine::HostMemory::allocate(bytes, std::nullopt, 0));
  const std::array<std::uint64_t, 1> shape = {bytes};
  return export_tensor({.shape = shape, .data = memory->data(), .bytes = bytes, .owner = memory});
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

}  // namespace

PYBIND11_MODULE(_native, module) {
  module.doc() = "The native engine of weightlift; see csrc/DESIGN.md.";
  module.def("set_error_factory", &set_error_factory, py::arg("factory"));

  py::class_<engine::Settings>(module, "Settings")
      .def(py::init(&settings_from), py::kw_only(), py::arg("threads") = 0, py::arg("io_depth") = 0,
           py::arg("read_bytes") = 0, py::arg("chunk_bytes") = 0, py::arg("pinned_bytes") = 0,
           py::arg("io_path") = "auto", py::arg("cast_place") = "auto",
           py::arg("huge_pages") = "auto", py::arg("kernels") = true,
           py::arg("batch_copies") = true, py::arg("fp8") = std::make_tuple(false, false, false));

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
          [](const IndexedFile& self, const PlanBuilder::Which& which) {
            py::list names;
            for_each_tensor(self, which, [&](const format::TensorInfo& tensor) {
              names.append(text(tensor.name));
            });
            return names;
          },
          py::arg("which") = py::none())
      .def(
          "dtypes",
          [](const IndexedFile& self, const PlanBuilder::Which& which) {
            py::list dtypes;
            for_each_tensor(self, which, [&](const format::TensorInfo& tensor) {
              dtypes.append(text(dtype_name(tensor.dtype)));
            });
            return dtypes;
          },
          py::arg("which") = py::none())
      .def(
          "shapes",
          [](const IndexedFile& self, const PlanBuilder::Which& which) {
            py::list shapes;
            for_each_tensor(self, which, [&](const format::TensorInfo& tensor) {
              shapes.append(shape_tuple(tensor.shape));
            });
            return shapes;
          },
          py::arg("which") = py::none())
      .def(
          "sizes",
          [](const IndexedFile& self, const PlanBuilder::Which& which) {
            py::list sizes;
            for_each_tensor(self, which,
                            [&](const format::TensorInfo& tensor) { sizes.append(tensor.bytes); });
            return sizes;
          },
          py::arg("which") = py::none())
      .def(
          "find",
          [](const IndexedFile& self, std::string_view name) -> std::optional<std::uint32_t> {
            return self.index->find(name);
          },
          py::arg("name"))
      .def(
          "dtype",
          [](const IndexedFile& self, std::size_t i) {
            return text(dtype_name(tensor_at(self, i).dtype));
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
      .def("read", &read_bytes, py::arg("begin"), py::arg("bytes"))
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

  module.def("torch_pickle", &torch_pickle, py::arg("pickle"), py::arg("tensor"));

  py::class_<PlanBuilder>(module, "Plan")
      .def(py::init<engine::Settings>(), py::arg("settings"))
      .def("map", &PlanBuilder::map, py::arg("source"), py::arg("which"), py::arg("shared"))
      .def(
          "read",
          [](PlanBuilder& self, const std::shared_ptr<IndexedFile>& source,
             const PlanBuilder::Which& which, const std::optional<std::string>& dtype,
             std::optional<int> pin_for) {
            self.read(source, which, optional_dtype(dtype), pin_for);
          },
          py::arg("source"), py::arg("which"), py::arg("dtype"), py::arg("pin_for"))
      .def(
          "copy_to",
          [](PlanBuilder& self, const std::shared_ptr<IndexedFile>& source,
             const PlanBuilder::Which& which, int device,
             const std::vector<std::uint64_t>& addresses, const std::vector<std::string>& dtypes) {
            self.copy_to(source, which, device, addresses, parse_dtypes(dtypes));
          },
          py::arg("source"), py::arg("which"), py::arg("device"), py::arg("addresses"),
          py::arg("dtypes"))
      .def(
          "copy_memory",
          [](PlanBuilder& self, const std::vector<std::string>& names,
             const std::vector<std::uint64_t>& sources, const std::vector<std::uint64_t>& elements,
             const std::vector<std::string>& source_dtypes, int device,
             const std::vector<std::uint64_t>& addresses, const std::vector<std::string>& dtypes) {
            self.copy_memory(names, sources, elements, parse_dtypes(source_dtypes), device,
                             addresses, parse_dtypes(dtypes));
          },
          py::arg("names"), py::arg("sources"), py::arg("elements"), py::arg("source_dtypes"),
          py::arg("device"), py::arg("addresses"), py::arg("dtypes"))
      .def(
          "slice",
          [](PlanBuilder& self, const std::shared_ptr<IndexedFile>& source, std::uint32_t which,
             const std::vector<std::tuple<std::uint64_t, std::int64_t, std::uint64_t>>& parts,
             const std::optional<std::string>& dtype, int device, std::uint64_t address) {
            self.slice(source, which, parts, optional_dtype(dtype), device, address);
          },
          py::arg("source"), py::arg("which"), py::arg("parts"), py::arg("dtype"),
          py::arg("device"), py::arg("address"))
      .def(
          "copy_strided",
          [](PlanBuilder& self, const std::shared_ptr<IndexedFile>& source, std::uint32_t which,
             std::uint64_t offset,
             const std::vector<std::tuple<std::uint64_t, std::int64_t, std::int64_t>>& dimensions,
             const std::string& dtype, int device, std::uint64_t address) {
            self.copy_strided(source, which, offset, dimensions, parse_dtypes({dtype}).front(),
                              device, address);
          },
          py::arg("source"), py::arg("which"), py::arg("offset"), py::arg("dimensions"),
          py::arg("dtype"), py::arg("device"), py::arg("address"))
      .def("use_stream", &PlanBuilder::use_stream, py::arg("device"), py::arg("stream"))
      .def("populate", &PlanBuilder::populate, py::arg("now"))
      .def("prepare", &PlanBuilder::prepare)
      .def("start", &PlanBuilder::start, py::arg("scratch"))
      .def("wait", &PlanBuilder::wait, py::arg("seconds"))
      .def("cancel", &PlanBuilder::cancel)
      .def("progress", &PlanBuilder::progress)
      .def("finish", [](PlanBuilder& self) { return report_dict(self.finish()); })
      .def("tensors", &PlanBuilder::tensors, py::arg("from_dlpack"));

  module.def("machine", &machine);
  module.def("host_memory", &host_memory, py::arg("bytes"));
  module.def("driver_report", &driver_report);
  module.def("pinned_bytes", [] { return device::StagingPool::instance().pinned_bytes(); });
#ifdef WEIGHTLIFT_TESTING
  module.def("use_driver_for_testing", &device::use_driver_for_testing, py::arg("path"));
#endif
}

}  // namespace weightlift::bind
