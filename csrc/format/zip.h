// The directory of a ZIP archive of stored records: torch's checkpoints and DDUF files. Knows no
// file.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "result.h"

namespace weightlift::format {

// More is refused before it is read: a million records of 100 bytes each.
inline constexpr std::uint64_t kMaxDirectoryBytes = 100'000'000;

struct ZipRecord {
  std::string name;         // UTF-8, without NUL
  std::uint64_t begin = 0;  // of its bytes, from the start of the file
  std::uint64_t bytes = 0;
  // As stated. Not checked: it would take reading everything, torch writes 0 where it is told to
  // save time (`torch.serialization.set_crc32_options(False)`), and its reader does not check
  // either (pytorch #126952).
  std::uint32_t crc32 = 0;
  bool zip64 = false;  // its own header has the ZIP64 field
};

// Fills the span from the offset on, all of which lie in the file.
using ReadBytes = std::function<Status(std::uint64_t, std::span<std::byte>)>;

// Whether a file that begins so (give it up to 512 bytes) is an archive. An empty file, a git-lfs
// pointer and a web page are errors. `path` is for errors only.
[[nodiscard]] Result<bool> is_zip(std::span<const std::byte> first, std::uint64_t file_size,
                                  const std::string& path);

// The records in the order of their bytes. Stricter than the formats' own readers, which disagree
// among each other about what an archive holds: the file is covered from its first byte to its last
// by records, directory and end record, without a hole and without overlap, and what a record says
// of itself is what the directory says of it.
[[nodiscard]] Result<std::vector<ZipRecord>> parse_zip(const ReadBytes& read,
                                                       std::uint64_t file_size,
                                                       const std::string& path);

}  // namespace weightlift::format
