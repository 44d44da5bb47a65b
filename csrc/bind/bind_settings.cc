#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <initializer_list>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bind/bindings.h"
#include "engine/settings.h"

namespace py = pybind11;

namespace weightlift::bind {
namespace {

using engine::Settings;

template <class Enum>
Enum parse_choice(const std::string& value, const char* option,
                  const std::vector<std::pair<const char*, Enum>>& choices) {
  std::string known;
  for (const auto& [name, choice] : choices) {
    if (value == name) return choice;
    known += (known.empty() ? "'" : ", '") + std::string(name) + "'";
  }
  throw py::value_error(std::string(option) + " is '" + value + "'; it can be " + known);
}

// Defines a property whose values are names.
template <class Enum>
void def_choice(py::class_<Settings>& settings, const char* name, Enum Settings::* field,
                std::initializer_list<std::pair<const char*, Enum>> choices) {
  const std::vector<std::pair<const char*, Enum>> known(choices);
  settings.def_property(
      name,
      [field, known](const Settings& self) -> std::string {
        for (const auto& [text, choice] : known) {
          if (self.*field == choice) return text;
        }
        return {};
      },
      [name, field, known](Settings& self, const std::string& value) {
        self.*field = parse_choice(value, name, known);
      });
}

using Fp8Rules = std::tuple<bool, bool, bool>;

Fp8Rules fp8_rules(const Settings& self) {
  return {self.fp8.e4m3_saturates, self.fp8.e4m3_infinity_saturates, self.fp8.e5m2_saturates};
}

void set_fp8_rules(Settings& self, const Fp8Rules& rules) {
  self.fp8 = {.e4m3_saturates = std::get<0>(rules),
              .e4m3_infinity_saturates = std::get<1>(rules),
              .e5m2_saturates = std::get<2>(rules)};
}

}  // namespace

void bind_settings(const py::module_& module) {
  py::class_<Settings> settings(module, "Settings");
  settings.def(py::init<>())
      .def_readwrite("threads", &Settings::threads)
      .def_readwrite("io_depth", &Settings::io_depth)
      .def_readwrite("read_bytes", &Settings::read_bytes)
      .def_readwrite("hole_bytes", &Settings::hole_bytes)
      .def_readwrite("chunk_bytes", &Settings::chunk_bytes)
      .def_readwrite("pinned_bytes", &Settings::pinned_bytes)
      .def_readwrite("pool_bytes", &Settings::pool_bytes)
      .def_readwrite("streams", &Settings::streams)
      .def_readwrite("kernels", &Settings::kernels)
      .def_readwrite("batch_copies", &Settings::batch_copies)
      .def_property("fp8", &fp8_rules, &set_fp8_rules);
  def_choice(settings, "io_path", &Settings::io_path,
             {{"auto", engine::IoPath::kAuto},
              {"buffered", engine::IoPath::kBuffered},
              {"direct", engine::IoPath::kDirect}});
  def_choice(settings, "cast_place", &Settings::cast_place,
             {{"auto", engine::CastPlace::kAuto},
              {"host", engine::CastPlace::kHost},
              {"device", engine::CastPlace::kDevice}});
  def_choice(settings, "huge_pages", &Settings::huge_pages,
             {{"auto", engine::HugePages::kAuto},
              {"always", engine::HugePages::kAlways},
              {"never", engine::HugePages::kNever}});
}

}  // namespace weightlift::bind
