#include "bind/values.h"

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "dtype.h"

namespace py = pybind11;

namespace weightlift::bind {

Dtype dtype_of(const std::string& name) {
  const auto dtype = dtype_from_name(name);
  if (!dtype)
    throw py::value_error("unknown dtype '" + name + "': use a name of the file, such as 'BF16'");
  return *dtype;
}

std::vector<Dtype> dtypes_of(const std::vector<std::string>& names) {
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

py::str dtype_text(Dtype dtype) {
  // One object a dtype: a checkpoint has many tensors of few.
  static std::array<PyObject*, kDtypeCount> made{};
  PyObject*& known = made.at(static_cast<std::size_t>(dtype));
  if (known == nullptr) known = text(dtype_name(dtype)).release().ptr();
  return py::reinterpret_borrow<py::str>(known);
}

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

}  // namespace weightlift::bind
