// torch's checkpoints: the archive, and the index of its tensors. Their places are in a pickle,
// which Python reads; here a table replaces the pickle.

#include <algorithm>
#include <array>
#include <set>

#include "format/index.h"
#include "zip_file.h"

namespace weightlift::fuzz {
namespace {

constexpr auto kNames = std::to_array<std::string_view>(
    {"x/data.pkl", "x/data/0", "x/data/1", "x/data/2", "x/version", "x/byteorder", "x/",
     ".data/version", "x/\xc3\xa9", "y/data/0", "x/data/0/", "x/constants.pkl"});

// One line of the table, without its padding.
struct Row {
  std::uint8_t dtype = 0;
  std::uint8_t rank = 0;  // modulo 4
  std::uint8_t name = 0;
  std::uint8_t record = 0;  // whose begin `offset` is counted from; modulo their number
  std::uint32_t padding = 0;
  std::uint64_t offset = 0;
  std::array<std::uint64_t, 3> shape = {};
};
static_assert(sizeof(Row) == 40);

std::vector<Row> rows_of(std::string_view table) {
  std::vector<Row> rows(std::min<std::size_t>(table.size() / sizeof(Row), 32));
  if (!rows.empty()) std::memcpy(rows.data(), table.data(), rows.size() * sizeof(Row));
  return rows;
}

void check_index(const std::vector<format::TensorEntry>& entries, std::uint64_t file_size) {
  bool sound = true;
  std::set<std::string> names;
  std::vector<std::uint64_t> bytes;
  for (const format::TensorEntry& entry : entries) {
    std::uint64_t bits = 1;
    bool counts = true;
    for (const std::uint64_t extent : entry.shape) {
      counts = counts && !__builtin_mul_overflow(bits, extent, &bits);
    }
    counts = counts && !__builtin_mul_overflow(bits, dtype_bits(entry.dtype), &bits);
    std::uint64_t end = 0;
    sound = sound && counts && bits % 8 == 0 &&
            !__builtin_add_overflow(entry.begin, bits / 8, &end) && end <= file_size &&
            names.insert(entry.name).second;
    bytes.push_back(bits / 8);
  }
  const auto index = format::make_index(entries, file_size, "f");
  WL_REQUIRE(index.ok() == sound);
  if (!index.ok()) {
    WL_REQUIRE(error_kind(index.error().code) == ErrorKind::kFormat);
    return;
  }
  const auto tensors = (*index)->tensors();
  WL_REQUIRE(tensors.size() == entries.size());
  for (std::size_t i = 0; i < entries.size(); ++i) {
    const auto position = (*index)->find(entries[i].name);
    WL_REQUIRE(position.has_value());
    const format::TensorInfo& tensor = tensors[*position];
    WL_REQUIRE(tensor.name == entries[i].name && tensor.dtype == entries[i].dtype);
    WL_REQUIRE(std::equal(tensor.shape.begin(), tensor.shape.end(), entries[i].shape.begin(),
                          entries[i].shape.end()));
    WL_REQUIRE(tensor.begin == entries[i].begin && tensor.bytes == bytes[i]);
    WL_REQUIRE(i == 0 || tensors[i - 1].begin <= tensors[i].begin);
  }
}

void mutate_record(const std::string& name, std::string& data, Random& random) {
  if (name != "x/data.pkl") {
    mutate_bytes(data);
    return;
  }
  std::vector<Row> rows = rows_of(data);
  if (!rows.empty() && random.one_in(8)) rows.pop_back();
  if (rows.empty() || random.one_in(4)) {
    Row& row = rows.emplace_back();
    row.dtype = static_cast<std::uint8_t>(random.below(kDtypeCount));
    row.rank = static_cast<std::uint8_t>(random.below(4));
    row.name = static_cast<std::uint8_t>(random.below(256));
    row.record = static_cast<std::uint8_t>(random.below(8));
    for (std::uint64_t& extent : row.shape) extent = random.below(4);
  } else {
    Row& row = random.of(rows);
    switch (random.below(5)) {
      case 0:
        row.offset = random.other(row.offset);
        break;
      case 1:
        row.name = random.of(rows).name;
        break;
      case 2:
        row.dtype = static_cast<std::uint8_t>(random.below(kDtypeCount));
        break;
      default: {
        std::uint64_t& extent = random.of(row.shape);
        extent = random.other(extent);
      }
    }
  }
  data.assign(reinterpret_cast<const char*>(rows.data()), rows.size() * sizeof(Row));
}

}  // namespace
}  // namespace weightlift::fuzz

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace weightlift;
  const std::string_view file = fuzz::as_text(data, size);
  const std::vector<format::ZipRecord> records = fuzz::check_archive(file);
  for (const format::ZipRecord& record : records) {
    if (record.name != "x/data.pkl") continue;
    std::vector<format::TensorEntry> entries;
    for (const fuzz::Row& row : fuzz::rows_of(fuzz::bytes_of(file, record))) {
      format::TensorEntry& entry = entries.emplace_back();
      entry.name = "t" + std::to_string(row.name);
      entry.dtype = static_cast<Dtype>(row.dtype % kDtypeCount);
      entry.shape.assign(row.shape.begin(), row.shape.begin() + row.rank % 4);
      entry.begin = records[row.record % records.size()].begin + row.offset;
    }
    fuzz::check_index(entries, file.size());
  }
  return 0;
}

extern "C" std::size_t LLVMFuzzerCustomMutator(std::uint8_t* data, std::size_t size,
                                               std::size_t max_size, unsigned seed) {
  using namespace weightlift::fuzz;
  Random random(seed);
  const std::string other = mutate_archive(as_text(data, size), random, kNames, mutate_record);
  return hand_back(other, data, size, max_size);
}
