#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bind/bindings.h"
#include "bind/indexed_file.h"
#include "bind/plan_builder.h"
#include "bind/values.h"
#include "engine/report.h"
#include "engine/settings.h"
#include "engine/slots_ahead.h"

namespace py = pybind11;

namespace weightlift::bind {
namespace {

py::dict report_dict(const engine::Report& report) {
  py::list files;
  for (const engine::FileReport& file : report.files) {
    files.append(py::make_tuple(path_text(file.path), file.bytes, file.route, file.reason));
  }
  py::list devices;
  for (const engine::DeviceReport& device : report.devices) {
    devices.append(py::make_tuple(device.device, device.bytes));
  }
  py::list fallbacks;
  for (const std::string& fallback : report.fallbacks) fallbacks.append(path_text(fallback));
  py::list touched;
  for (const std::string& path : report.touched) touched.append(path_text(path));
  const auto fields = std::to_array<std::pair<const char*, py::object>>({
      {"bytes", py::int_(report.bytes)},
      {"mapped_bytes", py::int_(report.mapped_bytes)},
      {"read_bytes", py::int_(report.read_bytes)},
      {"seconds", py::float_(report.seconds)},
      {"files", files},
      {"devices", devices},
      {"pinned_bytes", py::int_(report.pinned_bytes)},
      {"peak_staging_bytes", py::int_(report.peak_staging_bytes)},
      {"memory", py::cast(report.memory)},
      {"copies", py::cast(report.copies)},
      {"threads", py::int_(report.threads)},
      {"fallbacks", fallbacks},
      {"touched", touched},
  });
  // Made once, because the report of a small load has as many fields as any other.
  static const auto names = [&] {
    std::array<PyObject*, std::tuple_size_v<decltype(fields)>> made{};
    std::ranges::transform(fields, made.begin(), [](const auto& field) {
      return PyUnicode_InternFromString(field.first);
    });
    return made;
  }();
  py::dict result;
  for (std::size_t i = 0; i < fields.size(); ++i) {
    if (PyDict_SetItem(result.ptr(), names.at(i), fields.at(i).second.ptr()) != 0) {
      throw py::error_already_set();
    }
  }
  return result;
}

void bind_targets(const py::module_& module) {
  py::class_<Targets>(module, "Targets")
      .def(py::init([](int device, std::vector<std::uint64_t> addresses,
                       const std::vector<std::string>& dtypes) {
             if (addresses.size() != dtypes.size()) {
               throw py::value_error("one address and one dtype are needed for each tensor");
             }
             return Targets{
                 .device = device, .addresses = std::move(addresses), .dtypes = dtypes_of(dtypes)};
           }),
           py::arg("device"), py::arg("addresses"), py::arg("dtypes"));
  py::class_<HostTensors, std::shared_ptr<HostTensors>>(module, "HostTensors")
      .def(
          py::init([](std::vector<std::string> names, std::vector<std::uint64_t> addresses,
                      std::vector<std::uint64_t> elements, const std::vector<std::string>& dtypes) {
            for (const std::size_t size : {addresses.size(), elements.size(), dtypes.size()}) {
              if (size != names.size()) {
                throw py::value_error(
                    "names, addresses, elements and dtypes must have the same length");
              }
            }
            return std::make_shared<HostTensors>(HostTensors{.names = std::move(names),
                                                             .addresses = std::move(addresses),
                                                             .elements = std::move(elements),
                                                             .dtypes = dtypes_of(dtypes)});
          }),
          py::arg("names"), py::arg("addresses"), py::arg("elements"), py::arg("dtypes"));
}

void bind_slots_ahead(const py::module_& module) {
  py::class_<engine::SlotsAhead>(module, "SlotsAhead")
      .def(py::init([](int device, std::uint64_t bytes, const engine::Settings& settings) {
             return std::make_unique<engine::SlotsAhead>(device, engine::Expected{.bytes = bytes},
                                                         settings);
           }),
           py::arg("device"), py::arg("bytes"), py::arg("settings"))
      .def("stop", &engine::SlotsAhead::stop);
}

}  // namespace

void bind_plan(const py::module_& module) {
  bind_targets(module);
  bind_slots_ahead(module);
  py::class_<PlanBuilder>(module, "Plan")
      .def(py::init<engine::Settings>(), py::arg("settings"))
      .def("map", &PlanBuilder::map, py::arg("source"), py::arg("which"), py::arg("shared"),
           py::arg("windows") = py::none())
      .def(
          "read",
          [](PlanBuilder& self, const std::shared_ptr<IndexedFile>& source, const Which& which,
             const std::optional<std::string>& dtype, std::optional<int> pin_for) {
            self.read(source, which, optional_dtype(dtype), pin_for);
          },
          py::arg("source"), py::arg("which"), py::arg("dtype"), py::arg("pin_for"))
      .def("copy_to", &PlanBuilder::copy_to, py::arg("source"), py::arg("which"),
           py::arg("targets"))
      .def("copy_memory", &PlanBuilder::copy_memory, py::arg("tensors"), py::arg("targets"))
      .def(
          "slice",
          [](PlanBuilder& self, const std::shared_ptr<IndexedFile>& source, std::uint32_t which,
             const Stretches& parts, const std::optional<std::string>& dtype) {
            self.slice(source, which, parts, optional_dtype(dtype));
          },
          py::arg("source"), py::arg("which"), py::arg("parts"), py::arg("dtype"))
      .def("slice_to", &PlanBuilder::slice_to, py::arg("source"), py::arg("which"),
           py::arg("parts"), py::arg("target"))
      .def("copy_strided", &PlanBuilder::copy_strided, py::arg("source"), py::arg("which"),
           py::arg("offset"), py::arg("dimensions"), py::arg("target"))
      .def("use_stream", &PlanBuilder::use_stream, py::arg("device"), py::arg("stream"))
      .def("populate", &PlanBuilder::populate, py::arg("now"))
      .def(
          "prepare_ahead",
          [](PlanBuilder& self, int device, std::uint64_t bytes, bool casts,
             std::uint64_t separate) {
            self.prepare_ahead(device, {.bytes = bytes, .casts = casts, .separate = separate});
          },
          py::arg("device"), py::arg("bytes"), py::arg("casts"), py::arg("separate"))
      .def("prepare", &PlanBuilder::prepare)
      .def("start", &PlanBuilder::start, py::arg("scratch"))
      .def("wait", &PlanBuilder::wait, py::arg("seconds"))
      .def("order", &PlanBuilder::order, py::arg("ranks"))
      .def("wait_for", &PlanBuilder::wait_for, py::arg("which"), py::arg("seconds"))
      .def("wait_for_on_stream", &PlanBuilder::wait_for_on_stream, py::arg("which"),
           py::arg("device"), py::arg("stream"), py::arg("seconds"))
      .def("cancel", &PlanBuilder::cancel)
      .def("progress", &PlanBuilder::progress)
      .def("finish", [](PlanBuilder& self) { return report_dict(self.finish()); })
      .def("tensors", &PlanBuilder::tensors, py::arg("from_dlpack"));
}

}  // namespace weightlift::bind
