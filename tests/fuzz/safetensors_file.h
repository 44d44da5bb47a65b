// Safetensors files for the targets: mutations that know the format, and what must hold of one.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

#include "common.h"
#include "format/index.h"
#include "result.h"

namespace weightlift::fuzz {

[[nodiscard]] std::string mutate_safetensors(std::string_view file, Random& random);

// As a reader of files parses one that begins at `origin` of another.
[[nodiscard]] Result<std::shared_ptr<const format::Index>> parse_safetensors(
    std::string_view file, std::uint64_t origin = 0);

// Parses it. A second implementation without shared code must accept the same files with the same
// content, and a file written from the content must be accepted too.
void check_safetensors(std::string_view file);

}  // namespace weightlift::fuzz
