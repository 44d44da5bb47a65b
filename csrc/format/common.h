// Functions that the parsers share. Internal to format/.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>

#include "dtype.h"
#include "result.h"

namespace weightlift::format {

inline constexpr std::string_view kDamaged = "the file is damaged: download it or save it again";

[[nodiscard]] Error make_error(ErrorCode code, std::string message,
                               std::optional<std::uint64_t> offset = {},
                               std::string_view tensor = {});

// Text from the file, shortened for a message. Does not cut inside a character.
[[nodiscard]] std::string excerpt(std::string_view text, std::size_t limit = 80);
[[nodiscard]] std::string shape_text(std::span<const std::uint64_t> shape);
// "1 byte", "2 bytes".
[[nodiscard]] std::string bytes_text(std::uint64_t count);

// The position of the first byte that is not UTF-8 (Unicode 16, table 3-7), or the size.
[[nodiscard]] std::size_t utf8_prefix(std::string_view text) noexcept;

// The only function that turns a shape into a number of bytes. As in the safetensors reference, a
// product that exceeds 64 bits on the way is an error even if a later extent is 0. Callers compare
// the result with the size of the file before they allocate by it.
[[nodiscard]] Result<std::uint64_t> bytes_of(std::span<const std::uint64_t> shape, Dtype dtype);

// Recognise files that are not checkpoints by their first bytes.
[[nodiscard]] std::optional<Error> empty_file(std::uint64_t file_size);
[[nodiscard]] std::optional<Error> foreign_file(std::string_view first);

[[nodiscard]] inline std::string_view as_text(std::span<const std::byte> bytes) noexcept {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

// The only function in format/ that turns exceptions into values: only allocations throw. By then
// `function` has freed its memory, so there is enough for the Error.
template <class Function>
auto guarded(const std::string& path, Function function) noexcept -> decltype(function()) {
  try {
    auto result = function();
    if (!result.ok()) result.error().path = path;
    return result;
  } catch (const std::bad_alloc&) {
    Error error =
        make_error(ErrorCode::kOutOfMemory,
                   "out of memory for the index of the file: free memory, then load it again");
    error.path = path;
    return error;
  }
}

}  // namespace weightlift::format
