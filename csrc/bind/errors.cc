#include "bind/errors.h"

#include <stdexcept>
#include <string_view>
#include <utility>

#include "result.h"

namespace py = pybind11;

namespace weightlift::bind {
namespace {

py::object& factory_slot() {
  // Never destroyed: static destructors may run after the interpreter has ended.
  static auto* const slot = new py::object;
  return *slot;
}

const char* kind_name(ErrorKind kind) {
  switch (kind) {
    case ErrorKind::kFormat:
      return "format";
    case ErrorKind::kRead:
      return "read";
    case ErrorKind::kDevice:
      return "device";
    case ErrorKind::kMemory:
      return "memory";
    case ErrorKind::kArgument:
      return "argument";
    case ErrorKind::kCancelled:
      return "cancelled";
  }
  return "argument";
}

}  // namespace

void set_error_factory(py::object factory) {
  factory_slot() = std::move(factory);
}

void raise(const Error& error) {
  const py::object& factory = factory_slot();
  if (!factory) throw std::runtime_error(error.describe());
  const auto code = error_name(error.code);
  // surrogateescape, so that paths and names that are not UTF-8 are shown too.
  const auto text = [](std::string_view value) {
    return py::reinterpret_steal<py::object>(PyUnicode_DecodeUTF8(
        value.data(), static_cast<Py_ssize_t>(value.size()), "surrogateescape"));
  };
  const py::object exception = factory(
      kind_name(error_kind(error.code)), py::str(code.data(), code.size()), text(error.text()),
      text(error.path), error.offset ? py::object(py::int_(*error.offset)) : py::object(py::none()),
      text(error.tensor), error.system_errno);
  PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(exception.ptr())), exception.ptr());
  throw py::error_already_set();
}

}  // namespace weightlift::bind
