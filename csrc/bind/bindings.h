// The parts of weightlift._native, one function for each.
#pragma once

#include <pybind11/pybind11.h>

namespace weightlift::bind {

void bind_settings(const pybind11::module_& module);  // Settings
void bind_checkpoint(pybind11::module_& module);      // IndexedFile, Archive, torch_pickle
void bind_plan(const pybind11::module_& module);      // Plan, Targets, HostTensors, SlotsAhead
void bind_machine(pybind11::module_& module);  // processors, memory, the driver and its devices

}  // namespace weightlift::bind
