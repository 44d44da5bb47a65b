// Raises an Error as a Python exception.
#pragma once

#include <pybind11/pybind11.h>

#include <utility>

#include "result.h"

namespace weightlift::bind {

// `factory(kind, code, message, path, offset, tensor, errno)` must return the exception to raise.
// weightlift.core.errors sets it.
void set_error_factory(pybind11::object factory);

[[noreturn]] void raise(const Error& error);

inline void raise_if_error(Status status) {
  if (!status.ok()) raise(status.error());
}

template <class T>
T value_or_raise(Result<T> result) {
  if (!result.ok()) raise(result.error());
  return *std::move(result);
}

}  // namespace weightlift::bind
