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

// Parses it. What is accepted is what a second implementation accepts, which shares no code with
// the first, and holds the same; written again it is read again.
void check_safetensors(std::string_view file);

}  // namespace weightlift::fuzz
