// The safetensors header: bytes in, Index out. Knows no file.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "format/index.h"

namespace weightlift::format {

inline constexpr std::uint64_t kLengthBytes = 8;
// MAX_HEADER_SIZE of the reference implementation.
inline constexpr std::uint64_t kMaxHeaderBytes = 100'000'000;

// From the first eight bytes of a file (fewer where the file is shorter) and its size to the length
// of its JSON header, which then lies in [8, 8 + length). `path` is for the error only. Recognises
// an empty file, a git-lfs pointer and an HTML page by their first bytes, so give it up to 512.
//
// A safetensors file may be a part of another, as in a DDUF archive: it begins at `origin` there,
// and `file_size` is its own. The offsets of errors and of tensors are those of the whole file.
[[nodiscard]] Result<std::uint64_t> header_length(std::span<const std::byte> first,
                                                  std::uint64_t file_size, const std::string& path,
                                                  std::uint64_t origin = 0);

// Parses `header` (the JSON alone) of a file of `file_size` bytes.
[[nodiscard]] Result<std::shared_ptr<const Index>> parse_header(std::span<const std::byte> header,
                                                                std::uint64_t file_size,
                                                                const std::string& path,
                                                                std::uint64_t origin = 0);

}  // namespace weightlift::format
