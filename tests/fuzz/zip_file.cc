#include "zip_file.h"

#include <algorithm>
#include <array>
#include <optional>
#include <set>
#include <utility>

#include "result.h"

namespace weightlift::fuzz {
namespace {

using RecordsResult = Result<std::vector<format::ZipRecord>>;

constexpr std::string_view kLocal = "PK\x03\x04";
constexpr std::string_view kDescriptor = "PK\x07\x08";
constexpr std::string_view kCentral = "PK\x01\x02";
constexpr std::string_view kEnd64 = "PK\x06\x06";
constexpr std::string_view kLocator = "PK\x06\x07";
constexpr std::string_view kEnd = "PK\x05\x06";
constexpr std::uint32_t kIn64 = 0xffff'ffff;

struct Record {
  std::string name;
  std::string data;
  std::uint32_t crc = 0;
  std::uint16_t flags = 0;
  std::uint16_t method = 0;
  std::uint32_t attributes = 0;
  std::string padding;        // of its own header: whole extra fields
  bool wide = false;          // sizes in a ZIP64 field of its own header
  bool wide_central = false;  // and of the directory's
  int descriptor = 0;         // its bytes: none, 12, 16, 20 or 24
};

struct Archive {
  std::vector<Record> records;
  bool wide = false;  // has the ZIP64 end record
};

// A field of a header, in what has been written.
struct Field {
  std::size_t at = 0;
  std::size_t size = 0;
};

class Writer {
 public:
  explicit Writer(const Archive& archive) {
    std::vector<std::size_t> places;
    for (const Record& record : archive.records) {
      places.push_back(out_.size());
      local(record);
    }
    const std::size_t begin = out_.size();
    for (std::size_t i = 0; i < archive.records.size(); ++i) {
      central(archive.records[i], places[i]);
    }
    end(archive, begin);
  }

  std::string& out() noexcept { return out_; }
  std::vector<Field>& fields() noexcept { return fields_; }

 private:
  template <class Number>
  void put(std::size_t value) {
    fields_.push_back({out_.size(), sizeof(Number)});
    append(out_, static_cast<Number>(value));
  }
  void put16(std::size_t value) { put<std::uint16_t>(value); }
  void put32(std::size_t value) { put<std::uint32_t>(value); }
  void put64(std::size_t value) { put<std::uint64_t>(value); }
  void put_signature(std::string_view signature) {
    fields_.push_back({out_.size(), 4});
    out_ += signature;
  }

  void local(const Record& record) {
    const bool later = record.descriptor != 0;
    put_signature(kLocal);
    put16(record.wide ? 45 : 20);
    put16(record.flags);
    put16(record.method);
    put32(0);
    put32(later ? 0 : record.crc);
    for (int i = 0; i < 2; ++i) put32(later ? 0 : record.wide ? kIn64 : record.data.size());
    put16(record.name.size());
    put16(record.padding.size() + (record.wide ? 20 : 0));
    out_ += record.name;
    if (record.wide) {
      put16(1);
      put16(16);
      for (int i = 0; i < 2; ++i) put64(record.data.size());
    }
    out_ += record.padding;
    out_ += record.data;
    if (record.descriptor % 8 == 0 && later) put_signature(kDescriptor);
    if (later) put32(record.crc);
    for (int i = 0; later && i < 2; ++i) {
      record.descriptor >= 20 ? put64(record.data.size()) : put32(record.data.size());
    }
  }

  void central(const Record& record, std::size_t place) {
    put_signature(kCentral);
    put16(20);
    put16(record.wide ? 45 : 20);
    put16(record.flags);
    put16(record.method);
    put32(0);
    put32(record.crc);
    for (int i = 0; i < 2; ++i) put32(record.wide_central ? kIn64 : record.data.size());
    put16(record.name.size());
    put16(record.wide_central ? 28 : 0);
    put16(0);
    put16(0);
    put16(0);
    put32(record.attributes);
    put32(record.wide_central ? kIn64 : place);
    out_ += record.name;
    if (record.wide_central) {
      put16(1);
      put16(24);
      for (int i = 0; i < 2; ++i) put64(record.data.size());
      put64(place);
    }
  }

  void end(const Archive& archive, std::size_t begin) {
    const std::size_t count = archive.records.size();
    const std::size_t bytes = out_.size() - begin;
    if (archive.wide) {
      const std::size_t at = out_.size();
      put_signature(kEnd64);
      put64(44);
      put16(45);
      put16(45);
      put32(0);
      put32(0);
      for (int i = 0; i < 2; ++i) put64(count);
      put64(bytes);
      put64(begin);
      put_signature(kLocator);
      put32(0);
      put64(at);
      put32(1);
    }
    put_signature(kEnd);
    put16(0);
    put16(0);
    for (int i = 0; i < 2; ++i) put16(count);
    put32(bytes);
    put32(archive.wide ? kIn64 : begin);
    put16(0);
  }

  std::string out_;
  std::vector<Field> fields_;
};

// The records that a directory names, wherever it is, without broken ones.
class Reader {
 public:
  explicit Reader(std::string_view file) : file_(file) {}

  Archive read() {
    Archive archive;
    archive.wide = file_.find(kEnd64) != file_.npos;
    std::size_t at = file_.find(kCentral);
    while (at != file_.npos && archive.records.size() < 64) {
      if (auto record = entry(at)) archive.records.push_back(*std::move(record));
      at = file_.find(kCentral, at + 4);
    }
    return archive;
  }

 private:
  template <class Number>
  Number number(std::size_t at) const noexcept {
    return at <= file_.size() && sizeof(Number) <= file_.size() - at
               ? little_endian<Number>(file_, at)
               : Number{0};
  }
  std::uint16_t u16(std::size_t at) const noexcept { return number<std::uint16_t>(at); }
  std::uint32_t u32(std::size_t at) const noexcept { return number<std::uint32_t>(at); }
  std::uint64_t u64(std::size_t at) const noexcept { return number<std::uint64_t>(at); }
  std::string part(std::uint64_t at, std::uint64_t count) const {
    return at <= file_.size() ? std::string(file_.substr(at, count)) : std::string();
  }

  std::optional<Record> entry(std::size_t at) {
    Record record;
    record.flags = u16(at + 8);
    record.method = u16(at + 10);
    record.crc = u32(at + 16);
    record.attributes = u32(at + 38);
    record.name = part(at + 46, u16(at + 28));
    const std::size_t extra = at + 46 + record.name.size();
    record.wide_central = u16(at + 30) == 28 && u16(extra) == 1;
    std::uint64_t size = record.wide_central ? u64(extra + 4) : u32(at + 24);
    const std::uint64_t header = record.wide_central ? u64(extra + 20) : u32(at + 42);
    if (header > file_.size() || file_.substr(header, 4) != kLocal) return std::nullopt;
    const std::size_t local_extra = header + 30 + u16(header + 26);
    record.padding = part(local_extra, u16(header + 28));
    const std::size_t begin = local_extra + record.padding.size();
    record.wide = u16(local_extra) == 1 && record.padding.size() >= 20;
    if (record.wide) record.padding.erase(0, 20);
    if (begin > file_.size()) return std::nullopt;
    size = std::min<std::uint64_t>(size, file_.size() - begin);
    record.data = part(begin, size);
    if ((record.flags & 8) != 0) {
      const std::size_t next = std::min(file_.find(kLocal, begin + size),  //
                                        file_.find(kCentral, begin + size));
      const std::size_t gap = std::min(next, file_.size()) - (begin + size);
      record.descriptor = gap >= 12 && gap <= 24 && gap % 4 == 0 ? static_cast<int>(gap) : 0;
    }
    return record;
  }

  std::string_view file_;
};

// --- What must hold ------------------------------------------------------------------------------

bool is_ascii(std::string_view text) {
  return std::all_of(text.begin(), text.end(), [](char c) { return (c & 0x80) == 0; });
}

// So simple that a file written by Writer must be accepted. A name with the signature of a ZIP64
// locator is not: if it ends the directory, readers take it for one, as Python's zipfile does.
bool is_plain(const Archive& archive) {
  std::set<std::string> names;
  for (const Record& record : archive.records) {
    const bool folder = record.name.ends_with('/') || (record.attributes & 0x10) != 0;
    if (record.name.empty() || record.name.find('\0') != record.name.npos ||
        record.name.find(kLocator) != record.name.npos || !is_ascii(record.name) ||
        !names.insert(record.name).second || record.method != 0 || (record.flags & ~0x808) != 0 ||
        ((record.flags & 8) != 0) != (record.descriptor != 0) || !record.padding.empty() ||
        (folder && !record.data.empty())) {
      return false;
    }
  }
  return true;
}

// What may lie behind a record's bytes.
std::vector<std::size_t> gaps_after(const format::ZipRecord* record, std::uint16_t flags) {
  if (record == nullptr || (flags & 8) == 0) return {0};
  if (record->bytes == 0) return {0, 12, 16, 20, 24};  // miniz leaves it out there
  return {12, 16, 20, 24};
}

// Tiles the file from its first byte on, by the records' own headers.
void require_tiled(std::string_view file, const std::vector<format::ZipRecord>& records) {
  std::set<std::string> names;
  std::uint64_t at = 0;
  std::uint16_t flags = 0;
  const format::ZipRecord* previous = nullptr;
  for (const format::ZipRecord& record : records) {
    WL_REQUIRE(names.insert(record.name).second);
    WL_REQUIRE(!record.name.empty() && record.name.find('\0') == record.name.npos);
    WL_REQUIRE(record.begin <= file.size() && record.bytes <= file.size() - record.begin);
    const auto gaps = gaps_after(previous, flags);
    const auto gap = std::find_if(gaps.begin(), gaps.end(), [&](std::size_t size) {
      const std::uint64_t header = at + size;
      const std::uint64_t name = header + 30;
      return name <= record.begin && file.substr(header, 4) == kLocal &&
             file.substr(name, record.name.size()) == record.name &&
             name + record.name.size() + little_endian<std::uint16_t>(file, header + 28) ==
                 record.begin;
    });
    WL_REQUIRE(gap != gaps.end());
    flags = little_endian<std::uint16_t>(file, at + *gap + 6);
    at = record.begin + record.bytes;
    previous = &record;
  }
  const auto gaps = gaps_after(previous, flags);
  WL_REQUIRE(std::any_of(gaps.begin(), gaps.end(), [&](std::size_t size) {
    return file.size() - at >= size &&
           file.substr(at + size).starts_with(records.empty() ? "PK" : kCentral);
  }));
}

class Readable {
 public:
  explicit Readable(std::string_view file, std::size_t failing = ~std::size_t{0})
      : file_(file), failing_(failing) {}

  RecordsResult parse() {
    const format::ReadBytes read = [this](std::uint64_t at, std::span<std::byte> out) -> Status {
      WL_REQUIRE(at <= file_.size() && out.size() <= file_.size() - at);
      bytes_ += out.size();
      if (reads_++ == failing_) {
        Error error;
        error.code = ErrorCode::kReadFailed;
        return error;
      }
      std::copy_n(as_bytes(file_).begin() + static_cast<std::ptrdiff_t>(at), out.size(),
                  out.begin());
      return {};
    };
    return format::parse_zip(read, file_.size(), "f");
  }
  [[nodiscard]] std::size_t reads() const noexcept { return reads_; }
  [[nodiscard]] std::size_t bytes() const noexcept { return bytes_; }

 private:
  std::string_view file_;
  std::size_t failing_;
  std::size_t reads_ = 0;
  std::size_t bytes_ = 0;
};

}  // namespace

std::vector<format::ZipRecord> check_archive(std::string_view file) {
  const auto start = as_bytes(file.substr(0, 512));
  const auto is_zip = format::is_zip(start, file.size(), "f");
  WL_REQUIRE(is_zip.ok() || error_kind(is_zip.error().code) == ErrorKind::kFormat);

  Readable readable(file);
  RecordsResult records = readable.parse();
  // A header that is longer than the first read is read twice, and so is the tail.
  WL_REQUIRE(readable.bytes() <= 8 * file.size() + 70'000);
  const std::size_t failing = (file.size() + readable.bytes()) % (readable.reads() + 1);
  if (failing < readable.reads()) {
    const RecordsResult failed = Readable(file, failing).parse();
    WL_REQUIRE(!failed.ok() && failed.error().code == ErrorCode::kReadFailed);
  }

  const Archive archive = Reader(file).read();
  if (!records.ok()) {
    WL_REQUIRE(error_kind(records.error().code) == ErrorKind::kFormat);
    WL_REQUIRE(records.error().path == "f" && records.error().message.size() < 1000);
    WL_REQUIRE(!records.error().offset || *records.error().offset <= file.size());
    WL_REQUIRE(!is_plain(archive) || Writer(archive).out() != file);
    return {};
  }
  require_tiled(file, *records);

  Archive again;
  for (const format::ZipRecord& record : *records) {
    Record& one = again.records.emplace_back();
    one.name = record.name;
    one.data = bytes_of(file, record);
    one.crc = record.crc32;
    one.flags = is_ascii(record.name) ? 0 : 0x800;
    one.wide = record.zip64;
  }
  const std::string rewritten = std::move(Writer(again).out());
  const RecordsResult second = Readable(rewritten).parse();
  WL_REQUIRE(second.ok() && second->size() == records->size());
  for (std::size_t i = 0; i < records->size(); ++i) {
    const format::ZipRecord& one = (*records)[i];
    const format::ZipRecord& other = (*second)[i];
    WL_REQUIRE(one.name == other.name && one.crc32 == other.crc32 && one.zip64 == other.zip64);
    WL_REQUIRE(bytes_of(file, one) == bytes_of(rewritten, other));
  }
  return *std::move(records);
}

// --- Mutations -----------------------------------------------------------------------------------

namespace {

constexpr auto kPaddings = std::to_array<std::string_view>(
    {"", {"FB\0\0", 4}, {"FB\3\0ZZZ", 7}, {"FB\1\0", 4}, {"\1\0\0\0", 4}, "F"});
constexpr auto kFlags = std::to_array<std::uint16_t>({0, 8, 0x800, 0x808, 1, 0x20, 0x40, 0x2000});
constexpr auto kDescriptors = std::to_array<int>({0, 12, 16, 20, 24});

void mutate_one(Record& record, Random& random, std::span<const std::string_view> names,
                const MutateRecord& mutate_record) {
  switch (random.below(12)) {
    case 0:
      record.name = random.of(names);
      break;
    case 1:
      mutate_bytes(record.name);
      break;
    case 2:
      record.data.resize(random.below(record.data.size() + 9), 'y');
      break;
    case 3:
      record.flags = random.of(kFlags);
      break;
    case 4:
      record.padding = random.of(kPaddings);
      break;
    case 5:
      record.wide = !record.wide;
      break;
    case 6:
      record.wide_central = !record.wide_central;
      break;
    case 7:
      record.descriptor = random.of(kDescriptors);
      record.flags =
          static_cast<std::uint16_t>((record.flags & ~8) | (record.descriptor != 0 ? 8 : 0));
      break;
    case 8:
      record.attributes ^= 0x10;
      break;
    default:
      mutate_record(record.name, record.data, random);
  }
}

void mutate_records(Archive& archive, Random& random, std::span<const std::string_view> names,
                    const MutateRecord& mutate_record) {
  auto& records = archive.records;
  switch (random.below(10)) {
    case 0: {
      Record& fresh = records.emplace_back();
      fresh.name = random.of(names);
      mutate_record(fresh.name, fresh.data, random);
      break;
    }
    case 1:
      if (!records.empty())
        records.erase(records.begin() + static_cast<std::ptrdiff_t>(random.below(records.size())));
      break;
    case 2:
      if (!records.empty()) records.push_back(Record(random.of(records)));
      break;
    case 3:
      if (!records.empty()) std::swap(random.of(records), random.of(records));
      break;
    case 4:
      archive.wide = !archive.wide;
      break;
    default:
      if (!records.empty()) mutate_one(random.of(records), random, names, mutate_record);
  }
}

std::uint64_t get(const std::string& text, const Field& field) {
  std::uint64_t value = 0;
  std::memcpy(&value, text.data() + field.at, field.size);
  return value;
}

}  // namespace

std::string mutate_archive(std::string_view file, Random& random,
                           std::span<const std::string_view> names,
                           const MutateRecord& mutate_record) {
  if (random.one_in(16)) {
    std::string whole(file);
    mutate_bytes(whole);
    return whole;
  }
  Archive archive = Reader(file).read();
  for (std::size_t times = random.below(4); times-- > 0;) {
    mutate_records(archive, random, names, mutate_record);
  }
  Writer writer(archive);
  std::string& out = writer.out();
  // And what the headers say, here and there.
  for (std::size_t times = random.below(3); times-- > 0;) {
    const Field& field = random.of(writer.fields());
    const std::uint64_t value =
        random.one_in(3) ? get(out, random.of(writer.fields())) : random.other(get(out, field));
    std::memcpy(out.data() + field.at, &value, field.size);
  }
  if (random.one_in(32)) out.resize(random.below(out.size() + 32), 'z');
  if (random.one_in(64)) out += out;
  return std::move(out);
}

}  // namespace weightlift::fuzz
