// The directory of a ZIP archive of stored records: torch's checkpoints and DDUF files. Opens no
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

// A larger directory is refused before it is read. This is a million records of 100 bytes each.
inline constexpr std::uint64_t kMaxDirectoryBytes = 100'000'000;

struct ZipRecord {
  std::string name;         // UTF-8, without NUL
  std::uint64_t begin = 0;  // of its bytes, from the start of the file
  std::uint64_t bytes = 0;
  // As stated, not checked: a check would read the whole file, torch can be told to write 0
  // (`torch.serialization.set_crc32_options(False)`), and its reader does not check either (pytorch
  // #126952).
  std::uint32_t crc32 = 0;
  bool zip64 = false;  // the record's own header has the ZIP64 field
};

// Fills the span with the file's bytes from the offset on. The parser asks only for bytes inside
// the file.
using ReadBytes = std::function<Status(std::uint64_t, std::span<std::byte>)>;

// Whether a file with these first bytes (512 are enough) is an archive. An empty file, a git-lfs
// pointer and a web page are errors. `path` is for errors only.
[[nodiscard]] Result<bool> is_zip(std::span<const std::byte> first, std::uint64_t file_size,
                                  const std::string& path);

// Returns the records in the order of their bytes. Stricter than the readers of the formats' own
// libraries, which disagree about the contents of some archives: records, directory and end record
// must cover the file from its first byte to its last, without holes or overlaps, and the header of
// each record must agree with the directory.
[[nodiscard]] Result<std::vector<ZipRecord>> parse_zip(const ReadBytes& read,
                                                       std::uint64_t file_size,
                                                       const std::string& path);

}  // namespace weightlift::format
