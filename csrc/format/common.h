// What the parsers share. Internal to format/.
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

// Text from the file, made short for a message; never cut inside a character.
[[nodiscard]] std::string excerpt(std::string_view text, std::size_t limit = 80);
[[nodiscard]] std::string shape_text(std::span<const std::uint64_t> shape);
// "1 byte", "2 bytes".
[[nodiscard]] std::string bytes_text(std::uint64_t count);

// The position of the first byte that is not UTF-8 (Unicode 16, table 3-7), or the size.
[[nodiscard]] std::size_t utf8_prefix(std::string_view text) noexcept;

// The one place where a shape becomes a number of bytes. As in the safetensors reference a product
// that leaves 64 bits on the way is an error even where a later extent is 0. Nothing is allocated
// by the result before it has been held against the bytes that the file has.
[[nodiscard]] Result<std::uint64_t> bytes_of(std::span<const std::uint64_t> shape, Dtype dtype);

// What people have under the name of a checkpoint, told by its first bytes.
[[nodiscard]] std::optional<Error> empty_file(std::uint64_t file_size);
[[nodiscard]] std::optional<Error> foreign_file(std::string_view first);

[[nodiscard]] inline std::string_view as_text(std::span<const std::byte> bytes) noexcept {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

// The only place where format/ turns exceptions into values: allocations throw, nothing else does.
// By then everything the function held has been freed, so that the little an Error takes is there.
template <class Function>
auto guarded(const std::string& path, Function function) noexcept -> decltype(function()) {
  try {
    auto result = function();
    if (!result.ok()) result.error().path = path;
    return result;
  } catch (const std::bad_alloc&) {
    Error error = make_error(ErrorCode::kOutOfMemory, "no memory for the index of the file");
    error.path = path;
    return error;
  }
}

}  // namespace weightlift::format
