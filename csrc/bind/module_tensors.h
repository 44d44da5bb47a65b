// The tensors and the modules of a torch module.
#pragma once

#include <pybind11/pybind11.h>

namespace weightlift::bind {

// Visits each place of a tensor once, in the order of torch's named_modules(). A module in several
// places is visited once for each, except below itself.
//
// Returns (columns, ties, modules, classes, has_load_hooks). `columns` are seven lists with an
// entry for each tensor: the tensor; whether it is a parameter; whether it is persistent, in any of
// its places; its first place: name, module, key; and the module's dict that holds it there, or
// None if the module's class has another __setattr__ than `plain_setattr`. `ties` are its other
// places: (index in the columns, name, module, key). `classes` is the set of the modules' classes.
// `has_load_hooks`: whether one has a hook of load_state_dict.
[[nodiscard]] pybind11::tuple module_tensors(const pybind11::object& model,
                                             const pybind11::object& plain_setattr);

}  // namespace weightlift::bind
