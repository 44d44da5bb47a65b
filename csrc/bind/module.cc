// The Python module weightlift._native: only names and conversions.
#include <pybind11/pybind11.h>

#include "bind/bindings.h"
#include "bind/errors.h"
#include "bind/module_tensors.h"

namespace py = pybind11;

PYBIND11_MODULE(_native, module) {
  module.doc() = "The native engine of weightlift; see csrc/DESIGN.md.";
  module.def("set_error_factory", &weightlift::bind::set_error_factory, py::arg("factory"));
  weightlift::bind::bind_settings(module);
  weightlift::bind::bind_checkpoint(module);
  weightlift::bind::bind_plan(module);
  weightlift::bind::bind_machine(module);
  module.def("module_tensors", &weightlift::bind::module_tensors, py::arg("model"),
             py::arg("plain_setattr"));
}
