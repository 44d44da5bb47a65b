#include "format/zip.h"

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "format/common.h"
#include "result.h"

// Numbers in comments are sections of PKWARE's APPNOTE.TXT, version 6.3.10.

namespace weightlift::format {
namespace {

constexpr std::uint32_t kLocalSignature = 0x04034b50;       // 4.3.7
constexpr std::uint32_t kDescriptorSignature = 0x08074b50;  // 4.3.9
constexpr std::uint32_t kCentralSignature = 0x02014b50;     // 4.3.12
constexpr std::uint32_t kEnd64Signature = 0x06064b50;       // 4.3.14
constexpr std::uint32_t kLocatorSignature = 0x07064b50;     // 4.3.15
constexpr std::uint32_t kEndSignature = 0x06054b50;         // 4.3.16
constexpr std::uint64_t kLocalBytes = 30;
constexpr std::uint64_t kCentralBytes = 46;
constexpr std::uint64_t kEnd64Bytes = 56;
constexpr std::uint64_t kLocatorBytes = 20;
constexpr std::uint64_t kEndBytes = 22;
constexpr std::uint64_t kLongestDescriptor = 24;
constexpr std::uint16_t kZip64Field = 0x0001;
constexpr std::uint16_t kZip64Version = 45;   // version needed to extract (4.4.3)
constexpr std::uint16_t kIn64Short = 0xffff;  // the value is in a ZIP64 field
constexpr std::uint32_t kIn64 = 0xffff'ffff;

// Bits of the general purpose flag (4.4.4).
constexpr std::uint16_t kHasDescriptor = 1 << 3;
constexpr std::uint16_t kUtf8 = 1 << 11;
constexpr std::uint16_t kEncrypted = 1 << 0 | 1 << 6 | 1 << 13;  // plain, strong, or the directory
constexpr std::uint16_t kPatch = 1 << 5;

constexpr std::uint32_t kDosFolder = 1 << 4;  // of the external attributes (4.4.15)

// Bytes to read for the extra field: torch pads with up to 64 bytes, so one read usually gets the
// whole header.
constexpr std::uint64_t kLikelyExtra = 160;

using Bytes = std::span<const std::byte>;

template <class Number>
Number number(Bytes bytes, std::uint64_t at) {
  Number value = 0;
  for (std::size_t i = sizeof(Number); i-- > 0;) {
    value = static_cast<Number>(value << 8 | std::to_integer<Number>(bytes[at + i]));
  }
  return value;
}
constexpr auto u16 = number<std::uint16_t>;
constexpr auto u32 = number<std::uint32_t>;
constexpr auto u64 = number<std::uint64_t>;

// A record as the directory states it.
struct Stated {
  ZipRecord record;
  std::uint64_t header = 0;  // offset of the record's own header
  std::uint16_t flags = 0;
};

struct Directory {
  std::uint64_t begin = 0;
  std::uint64_t bytes = 0;
  std::uint64_t count = 0;
};

class ZipParser {
 public:
  ZipParser(const ReadBytes& read, std::uint64_t file_size) : read_(read), size_(file_size) {}

  Result<std::vector<ZipRecord>> parse() {
    WL_RETURN_IF_ERROR(find_directory());
    WL_RETURN_IF_ERROR(read_directory());
    WL_RETURN_IF_ERROR(check_names());
    WL_RETURN_IF_ERROR(check_records());
    std::vector<ZipRecord> records;
    records.reserve(stated_.size());
    for (Stated& one : stated_) records.push_back(std::move(one.record));
    return records;
  }

 private:
  static Error malformed(const std::string& what, std::uint64_t at) {
    return make_error(ErrorCode::kArchiveMalformed, what + "; " + std::string(kDamaged), at);
  }
  static Error refuse(const Stated& one, ErrorCode code, const std::string& what,
                      std::uint64_t at) {
    return make_error(
        code, "record '" + excerpt(one.record.name) + "' " + what + "; " + std::string(kDamaged),
        at);
  }

  Result<Bytes> read(std::uint64_t offset, std::uint64_t count) {
    buffer_.resize(count);
    WL_RETURN_IF_ERROR(read_(offset, buffer_));
    return Bytes(buffer_);
  }

  // Other readers search for the end record, and find different ones. Here it must be at the end of
  // the file.
  Status find_directory() {
    constexpr std::uint64_t kEnds = kEnd64Bytes + kLocatorBytes + kEndBytes;
    const std::uint64_t known = std::min(size_, kEnds);
    WL_ASSIGN_OR_RETURN(const Bytes tail, read(size_ - known, known));
    if (known < kEndBytes || u32(tail, known - kEndBytes) != kEndSignature) return no_end();
    const Bytes end = tail.last(kEndBytes);
    const std::uint64_t end_at = size_ - kEndBytes;
    if (u16(end, 20) != 0) {
      return malformed("the end record of the archive states a comment that is missing", end_at);
    }
    if (u16(end, 4) != 0 || u16(end, 6) != 0 || u16(end, 8) != u16(end, 10)) return disks(end_at);
    directory_ = {.begin = u32(end, 16), .bytes = u32(end, 12), .count = u16(end, 10)};
    std::uint64_t directory_end = end_at;
    if (known >= kEndBytes + kLocatorBytes &&
        u32(tail, known - kEndBytes - kLocatorBytes) == kLocatorSignature) {
      const std::uint64_t locator_at = end_at - kLocatorBytes;
      if (known < kEnds || u64(tail, known - kEndBytes - kLocatorBytes + 8) != size_ - kEnds) {
        return malformed("the ZIP64 locator does not give the offset of the ZIP64 end record",
                         locator_at);
      }
      WL_RETURN_IF_ERROR(read_end64(tail.first(kEnd64Bytes + kLocatorBytes)));
      directory_end = size_ - kEnds;
    }
    if (directory_.bytes > directory_end || directory_.begin != directory_end - directory_.bytes) {
      return malformed("the end record states a directory of " + bytes_text(directory_.bytes) +
                           " at byte " + std::to_string(directory_.begin) +
                           ", but it ends at byte " + std::to_string(directory_end),
                       end_at);
    }
    if (directory_.bytes > kMaxDirectoryBytes) {
      return make_error(ErrorCode::kArchiveTooLarge,
                        "the directory of the archive has " + std::to_string(directory_.bytes) +
                            " bytes, but at most " + std::to_string(kMaxDirectoryBytes) +
                            " are allowed: save the file with fewer records",
                        directory_.begin);
    }
    if (directory_.count > directory_.bytes / kCentralBytes) return wrong_count(end_at);
    return {};
  }

  // `ends`: the ZIP64 end record and its locator.
  Status read_end64(Bytes ends) {
    const std::uint64_t at = size_ - kEndBytes - ends.size();
    const Bytes locator = ends.last(kLocatorBytes);
    if (u32(locator, 4) != 0 || u32(locator, 16) != 1) return disks(at + kEnd64Bytes);
    if (u32(ends, 0) != kEnd64Signature || u64(ends, 4) != kEnd64Bytes - 12) {
      return malformed("the ZIP64 end record is not at the offset that its locator gives", at);
    }
    if (u32(ends, 16) != 0 || u32(ends, 20) != 0 || u64(ends, 24) != u64(ends, 32)) {
      return disks(at);
    }
    const Directory wide{.begin = u64(ends, 48), .bytes = u64(ends, 40), .count = u64(ends, 32)};
    const auto agrees = [](std::uint64_t narrow, std::uint64_t value, std::uint64_t in_64) {
      return narrow == value || narrow == in_64;
    };
    if (!agrees(directory_.begin, wide.begin, kIn64) ||
        !agrees(directory_.bytes, wide.bytes, kIn64) ||
        !agrees(directory_.count, wide.count, kIn64Short)) {
      return malformed("the two end records of the archive contradict each other", at);
    }
    directory_ = wide;
    return {};
  }

  // The file does not end with an end record: finds out whether it is truncated or has bytes after
  // the archive.
  Error no_end() {
    constexpr std::uint64_t kLongestComment = 0xffff;
    const std::uint64_t known = std::min(size_, kEndBytes + kLongestComment);
    auto tail = read(size_ - known, known);
    if (!tail.ok()) return std::move(tail).error();
    const std::string_view text = as_text(*tail);
    const auto found = text.rfind("PK\x05\x06");
    if (const std::uint64_t end = size_ - known + found + kEndBytes;
        found != text.npos && end <= size_) {
      return make_error(ErrorCode::kTrailingBytes,
                        "other bytes or a comment follow the archive: download it or save it again",
                        end);
    }
    return make_error(ErrorCode::kArchiveIncomplete,
                      "the archive has no directory at its end: the download or the copy is "
                      "incomplete, so download it again",
                      size_);
  }

  static Error disks(std::uint64_t at) {
    return make_error(
        ErrorCode::kArchiveUnsupported,
        "the archive is one part of a split archive: join the parts, then load the result", at);
  }
  Error wrong_count(std::uint64_t at) const {
    return malformed("the end record states " + std::to_string(directory_.count) +
                         (directory_.count == 1 ? " entry" : " entries") +
                         ", but the directory of the archive has another number",
                     at);
  }

  Status read_directory() {
    std::vector<std::byte> bytes(directory_.bytes);
    WL_RETURN_IF_ERROR(read_(directory_.begin, bytes));
    stated_.reserve(directory_.count);
    std::uint64_t at = 0;
    while (at < bytes.size()) {
      const Bytes left = Bytes(bytes).subspan(at);
      const std::uint64_t in_file = directory_.begin + at;
      if (left.size() < kCentralBytes || u32(left, 0) != kCentralSignature) {
        return malformed("the directory of the archive has an invalid entry", in_file);
      }
      const std::uint64_t length =
          kCentralBytes + u16(left, 28) + u16(left, 30) + std::uint64_t{u16(left, 32)};
      if (length > left.size()) {
        return malformed("an entry reaches past the end of the archive's directory", in_file);
      }
      WL_RETURN_IF_ERROR(read_entry(left.first(length), in_file));
      at += length;
    }
    if (stated_.size() != directory_.count) return wrong_count(directory_.begin);
    std::sort(stated_.begin(), stated_.end(),
              [](const Stated& left, const Stated& right) { return left.header < right.header; });
    return {};
  }

  Status read_entry(Bytes entry, std::uint64_t at) {
    Stated one;
    one.record.name = as_text(entry.subspan(kCentralBytes, u16(entry, 28)));
    one.flags = u16(entry, 8);
    one.record.crc32 = u32(entry, 16);
    WL_RETURN_IF_ERROR(check_kind(one, u16(entry, 10), u16(entry, 6), at));
    std::uint64_t compressed = u32(entry, 20);
    one.record.bytes = u32(entry, 24);
    one.header = u32(entry, 42);
    WL_ASSIGN_OR_RETURN(
        const std::optional<Bytes> field,
        zip64_field(one, entry.subspan(kCentralBytes + one.record.name.size(), u16(entry, 30)),
                    at));
    // In this order; each value is there only if the 32-bit field does not hold it (4.5.3).
    std::uint64_t taken = 0;
    for (std::uint64_t* const value : {&one.record.bytes, &compressed, &one.header}) {
      if (*value != kIn64) continue;
      if (!field || field->size() < taken + 8) {
        return refuse(one, ErrorCode::kArchiveMalformed, "lacks a value in its ZIP64 field", at);
      }
      *value = u64(*field, taken);
      taken += 8;
    }
    if (field && field->size() != taken) {
      return refuse(one, ErrorCode::kArchiveMalformed, "has a ZIP64 field of a wrong size", at);
    }
    if (u16(entry, 34) != 0) return disks(at);
    if (compressed != one.record.bytes) {
      return refuse(one, ErrorCode::kSizeMismatch,
                    "is not compressed, but its two sizes differ: " + std::to_string(compressed) +
                        " and " + std::to_string(one.record.bytes),
                    at);
    }
    // torch's reader, miniz, treats such a record as a folder and does not read its bytes.
    const bool folder = one.record.name.ends_with('/') || (u32(entry, 38) & kDosFolder) != 0;
    if (folder && one.record.bytes != 0) {
      return refuse(one, ErrorCode::kArchiveMalformed, "is a folder but has bytes", at);
    }
    stated_.push_back(std::move(one));
    return {};
  }

  static Status check_kind(const Stated& one, std::uint16_t method, std::uint16_t version,
                           std::uint64_t at) {
    const auto unsupported = [&](const std::string& what) {
      return make_error(ErrorCode::kArchiveUnsupported,
                        "record '" + excerpt(one.record.name) + "' is " + what +
                            ": unpack the archive, or save the checkpoint again without this",
                        at);
    };
    if ((one.flags & kEncrypted) != 0) return unsupported("encrypted");
    if ((one.flags & kPatch) != 0) return unsupported("a patch of another file");
    if ((one.flags & ~(kHasDescriptor | kUtf8)) != 0) {
      return unsupported("of an unknown kind (flags " + std::to_string(one.flags) + ")");
    }
    if (method != 0) return unsupported("compressed (method " + std::to_string(method) + ")");
    if (version > kZip64Version) return unsupported("of a later version of the format");
    const std::string& name = one.record.name;
    const bool ascii =
        std::all_of(name.begin(), name.end(), [](char c) { return (c & 0x80) == 0; });
    // Without the flag, the name is in a code page that the archive does not state (4.4.4).
    if (name.empty() || name.find('\0') != name.npos ||
        (!ascii && ((one.flags & kUtf8) == 0 || utf8_prefix(name) != name.size()))) {
      return malformed("the name of a record is empty, contains a NUL or is not UTF-8", at);
    }
    return {};
  }

  // Returns the content of the ZIP64 field, if the extra fields (4.5.1) have one. Incomplete fields
  // are errors.
  static Result<std::optional<Bytes>> zip64_field(const Stated& one, Bytes extra,
                                                  std::uint64_t at) {
    std::optional<Bytes> found;
    while (!extra.empty()) {
      if (extra.size() < 4 || u16(extra, 2) > extra.size() - 4 ||
          (u16(extra, 0) == kZip64Field && found)) {
        return refuse(one, ErrorCode::kArchiveMalformed, "has invalid extra fields", at);
      }
      const Bytes content = extra.subspan(4, u16(extra, 2));
      if (u16(extra, 0) == kZip64Field) found = content;
      extra = extra.subspan(4 + content.size());
    }
    return found;
  }

  Status check_names() const {
    std::vector<std::string_view> names;
    names.reserve(stated_.size());
    for (const Stated& one : stated_) names.push_back(one.record.name);
    std::sort(names.begin(), names.end());
    const auto twice = std::adjacent_find(names.begin(), names.end());
    if (twice == names.end()) return {};
    return make_error(ErrorCode::kDuplicateName,
                      "the archive has two records '" + excerpt(*twice) +
                          "', and readers differ in which of them they read; " +
                          std::string(kDamaged),
                      directory_.begin);
  }

  // Checks each record's own header and the bytes between records, in the order of the file.
  Status check_records() {
    std::uint64_t covered = 0;
    const Stated* previous = nullptr;
    for (Stated& one : stated_) {
      WL_ASSIGN_OR_RETURN(const std::uint64_t gap, gap_before(covered, one.header, previous));
      if (directory_.begin - one.header < kLocalBytes) return leaves(one);
      const std::uint64_t most = kLocalBytes + one.record.name.size() + kLikelyExtra;
      WL_ASSIGN_OR_RETURN(Bytes known,
                          read(covered, gap + std::min(most, directory_.begin - one.header)));
      WL_RETURN_IF_ERROR(check_descriptor(previous, known.first(gap), covered));
      known = known.subspan(gap);
      if (u32(known, 0) != kLocalSignature) {
        return refuse(one, ErrorCode::kArchiveMismatch,
                      "has no header at the offset that the directory gives", one.header);
      }
      const std::uint64_t header = kLocalBytes + u16(known, 26) + std::uint64_t{u16(known, 28)};
      if (header > directory_.begin - one.header) return leaves(one);
      if (header > known.size()) {
        WL_ASSIGN_OR_RETURN(known, read(one.header, header));
      }
      WL_RETURN_IF_ERROR(check_header(one, known.first(header)));
      one.record.begin = one.header + header;
      if (one.record.bytes > directory_.begin - one.record.begin) return leaves(one);
      covered = one.record.begin + one.record.bytes;
      previous = &one;
    }
    WL_ASSIGN_OR_RETURN(const std::uint64_t gap, gap_before(covered, directory_.begin, previous));
    WL_ASSIGN_OR_RETURN(const Bytes descriptor, read(covered, gap));
    return check_descriptor(previous, descriptor, covered);
  }

  static Error leaves(const Stated& one) {
    return refuse(one, ErrorCode::kOffsetsInvalid, "overlaps the directory of the archive",
                  one.header);
  }

  // Bytes between the end of a record and the next one: only its descriptor may be there.
  static Result<std::uint64_t> gap_before(std::uint64_t covered, std::uint64_t next,
                                          const Stated* previous) {
    if (next < covered) {
      return refuse(*previous, ErrorCode::kOffsetsInvalid,
                    "overlaps the next bytes, which begin at " + std::to_string(next), covered);
    }
    const bool may = previous != nullptr && (previous->flags & kHasDescriptor) != 0;
    if (next - covered > (may ? kLongestDescriptor : 0)) {
      return make_error(ErrorCode::kOffsetsInvalid,
                        bytes_text(next - covered) +
                            (next - covered == 1 ? " belongs" : " belong") + " to no record; " +
                            std::string(kDamaged),
                        covered);
    }
    return next - covered;
  }

  static Status check_descriptor(const Stated* previous, Bytes bytes, std::uint64_t at) {
    // torch's writer, miniz, writes none after an empty record.
    if (previous == nullptr || (previous->flags & kHasDescriptor) == 0 ||
        (bytes.empty() && previous->record.bytes == 0)) {
      return {};
    }
    const std::uint64_t size = bytes.size();
    const std::uint64_t signature = size == 16 || size == 24 ? 4 : 0;  // optional (4.3.9.3)
    const bool wide = size == 20 || size == 24;
    const auto value = [&](std::uint64_t i) {
      return wide ? u64(bytes, signature + 4 + 8 * i)
                  : std::uint64_t{u32(bytes, signature + 4 + 4 * i)};
    };
    const bool whole = (size == 12 || size == 16 || wide) &&
                       (signature == 0 || u32(bytes, 0) == kDescriptorSignature);
    if (!whole || u32(bytes, signature) != previous->record.crc32 ||
        value(0) != previous->record.bytes || value(1) != previous->record.bytes) {
      return refuse(*previous, ErrorCode::kArchiveMismatch,
                    "has a descriptor that contradicts the directory", at);
    }
    return {};
  }

  static Status check_header(Stated& one, Bytes header) {
    const auto mismatch = [&](const std::string& what) {
      return refuse(one, ErrorCode::kArchiveMismatch,
                    "has one " + what + " in its own header and another in the directory",
                    one.header);
    };
    const std::uint64_t name_size = u16(header, 26);
    if (as_text(header.subspan(kLocalBytes, name_size)) != one.record.name) {
      return mismatch("name");
    }
    if (u16(header, 6) != one.flags) return mismatch("set of flags");
    if (u16(header, 8) != 0) return mismatch("method");
    WL_ASSIGN_OR_RETURN(const std::optional<Bytes> field,
                        zip64_field(one, header.subspan(kLocalBytes + name_size), one.header));
    one.record.zip64 = field.has_value();
    const bool later = (one.flags & kHasDescriptor) != 0;
    const std::uint32_t crc32 = u32(header, 14);
    if (crc32 != one.record.crc32 && !(later && crc32 == 0)) return mismatch("checksum");
    const std::array<std::uint32_t, 2> narrow = {u32(header, 18), u32(header, 22)};
    if (later) {
      // The size was not known when the header was written; the descriptor has it.
      for (const std::uint32_t size : narrow) {
        if (size != 0 && size != kIn64 && size != one.record.bytes) return mismatch("size");
      }
    } else if (narrow[0] == kIn64 && narrow[1] == kIn64) {
      // The field must have both sizes (4.5.3). miniz may add the header's offset, which is
      // ignored.
      if (!field || field->size() < 16 || u64(*field, 0) != one.record.bytes ||
          u64(*field, 8) != one.record.bytes) {
        return mismatch("size");
      }
    } else if (narrow[0] != one.record.bytes || narrow[1] != one.record.bytes) {
      return mismatch("size");
    }
    return {};
  }

  const ReadBytes& read_;
  std::uint64_t size_;
  Directory directory_;
  std::vector<Stated> stated_;
  std::vector<std::byte> buffer_;
};

}  // namespace

Result<bool> is_zip(std::span<const std::byte> first, std::uint64_t file_size,
                    const std::string& path) {
  return guarded(path, [&]() -> Result<bool> {
    if (auto empty = empty_file(file_size)) return *std::move(empty);
    const std::string_view text = as_text(first);
    if (text.starts_with("PK\x03\x04")) return true;
    if (auto foreign = foreign_file(text)) return *std::move(foreign);
    return false;
  });
}

Result<std::vector<ZipRecord>> parse_zip(const ReadBytes& read, std::uint64_t file_size,
                                         const std::string& path) {
  return guarded(path, [&] { return ZipParser(read, file_size).parse(); });
}

}  // namespace weightlift::format
