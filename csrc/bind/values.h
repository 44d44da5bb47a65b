// Conversions between Python's values and C++ ones.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "dtype.h"

namespace weightlift::bind {

// By the file's name of the dtype, such as "BF16". ValueError if there is no such dtype.
[[nodiscard]] Dtype dtype_of(const std::string& name);
[[nodiscard]] std::vector<Dtype> dtypes_of(const std::vector<std::string>& names);
[[nodiscard]] std::optional<Dtype> optional_dtype(const std::optional<std::string>& name);

[[nodiscard]] pybind11::str text(std::string_view value);
[[nodiscard]] pybind11::str dtype_text(Dtype dtype);  // the file's name
// For paths and texts that contain them: bytes that need not be UTF-8 (PEP 383).
[[nodiscard]] pybind11::object path_text(const std::string& value);
[[nodiscard]] std::string path_bytes(const pybind11::str& path);
[[nodiscard]] pybind11::tuple shape_tuple(std::span<const std::uint64_t> shape);

}  // namespace weightlift::bind
