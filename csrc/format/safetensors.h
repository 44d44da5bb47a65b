// The safetensors header: bytes in, Index out. Opens no file.
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

// Returns the length of a file's JSON header, which lies in [8, 8 + length). `first` are the first
// bytes of the file: eight are needed, and with 512 the error for a file that is not safetensors
// (empty, git-lfs pointer, web page, ...) says what it is. `path` is for the error only.
//
// A safetensors file may be a part of another file, such as a DDUF archive. It then begins at
// `origin`, and `file_size` is the size of the part. Offsets of errors and of tensors count from
// the start of the whole file.
[[nodiscard]] Result<std::uint64_t> header_length(std::span<const std::byte> first,
                                                  std::uint64_t file_size, const std::string& path,
                                                  std::uint64_t origin = 0);

// Parses `header` (the JSON alone) of a file of `file_size` bytes.
[[nodiscard]] Result<std::shared_ptr<const Index>> parse_header(std::span<const std::byte> header,
                                                                std::uint64_t file_size,
                                                                const std::string& path,
                                                                std::uint64_t origin = 0);

}  // namespace weightlift::format
