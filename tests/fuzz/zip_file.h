// Archives for the targets: mutations that know the format, and what must hold of one.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "common.h"
#include "format/zip.h"

namespace weightlift::fuzz {

// Changes the bytes of the record of this name.
using MutateRecord = std::function<void(const std::string& name, std::string& data, Random&)>;

// `names`: what new records are called.
[[nodiscard]] std::string mutate_archive(std::string_view file, Random& random,
                                         std::span<const std::string_view> names,
                                         const MutateRecord& mutate_record);

// Parses it. Accepted records must tile the file from its first byte to its last, and an archive
// written from them must be accepted too; a simple archive must be accepted; a read error must be
// passed on. Returns nothing if the archive is refused.
[[nodiscard]] std::vector<format::ZipRecord> check_archive(std::string_view file);

[[nodiscard]] inline std::string_view bytes_of(std::string_view file,
                                               const format::ZipRecord& record) {
  return file.substr(record.begin, record.bytes);
}

}  // namespace weightlift::fuzz
