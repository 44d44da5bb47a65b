// The pickle of a checkpoint, read as data. tests/python/checkpoint/test_torch_pickle.py compares
// with torch's own unpickler; this checks properties that hold for all bytes.

#include <algorithm>
#include <functional>
#include <numeric>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "common.h"
#include "format/torch_archive.h"
#include "format/torch_pickle.h"
#include "format/zip.h"

namespace weightlift::fuzz {
namespace {

using Kind = format::PickledValue::Kind;

class Walk {
 public:
  explicit Walk(const format::TorchPickle& pickle, std::string_view text)
      : pickle_(pickle), text_(text) {}

  // Returns the depth of dicts in it.
  std::uint32_t operator()(format::PickledValue value) {
    WL_REQUIRE(value.kind != Kind::kStorage && value.kind != Kind::kGlobal);
    switch (value.kind) {
      case Kind::kInt:
        WL_REQUIRE(value.at < pickle_.ints.size());
        break;
      case Kind::kFloat:
        WL_REQUIRE(value.at < pickle_.floats.size());
        break;
      case Kind::kText:
        WL_REQUIRE(value.at < pickle_.texts.size());
        require_inside(pickle_.texts[value.at]);
        break;
      case Kind::kTuple:
        WL_REQUIRE(value.at < pickle_.tuples.size());
        break;
      case Kind::kTensor:
        WL_REQUIRE(value.at < pickle_.tensors.size());
        break;
      case Kind::kDict:
      case Kind::kOrderedDict:
        return dict(value.at);
      default:
        break;
    }
    return 0;
  }

 private:
  std::uint32_t dict(std::uint32_t at) {
    WL_REQUIRE(at < pickle_.dicts.size());
    WL_REQUIRE(seen_.insert(at).second);  // a tree
    std::uint32_t depth = 0;
    for (const auto& [key, value] : pickle_.dicts[at].items) {
      WL_REQUIRE(key.kind == Kind::kText || key.kind == Kind::kInt);
      (*this)(key);
      depth = std::max(depth, (*this)(value));
    }
    WL_REQUIRE(depth < 64);
    return depth + 1;
  }

  void require_inside(std::string_view part) const {
    WL_REQUIRE(part.data() >= text_.data() &&
               part.data() + part.size() <= text_.data() + text_.size());
    for (const char c : part) WL_REQUIRE(static_cast<unsigned char>(c) < 128);
  }

  const format::TorchPickle& pickle_;
  std::string_view text_;
  std::set<std::uint32_t> seen_;
};

void check_tensors(const format::TorchPickle& pickle) {
  std::set<std::string_view> records;
  for (const auto& storage : pickle.storages) {
    WL_REQUIRE(records.insert(storage.record).second);
    WL_REQUIRE(static_cast<unsigned __int128>(storage.elements) * dtype_bytes(storage.dtype) ==
               storage.bytes);
  }
  for (const auto& tensor : pickle.tensors) {
    const auto storage =
        std::ranges::find(pickle.storages, tensor.record, &format::PickledStorage::record);
    WL_REQUIRE(storage != pickle.storages.end());
    WL_REQUIRE(storage->dtype == tensor.dtype && tensor.shape.size() == tensor.stride.size());
    unsigned __int128 last = tensor.offset;
    unsigned __int128 count = 1;
    bool packed = true;
    for (std::size_t i = tensor.shape.size(); i-- > 0;) {
      packed = packed && (tensor.shape[i] == 1 || tensor.stride[i] == count);
      count *= tensor.shape[i];
      if (tensor.shape[i] != 0) {
        last += static_cast<unsigned __int128>(tensor.shape[i] - 1) * tensor.stride[i];
      }
    }
    const bool empty = std::ranges::find(tensor.shape, 0U) != tensor.shape.end();
    WL_REQUIRE(empty || last < storage->elements);
    WL_REQUIRE(tensor.contiguous() == (empty || packed));
  }
}

// A record for each storage, with a gap after it.
std::vector<format::ZipRecord> records_of(const format::TorchPickle& pickle) {
  std::vector<format::ZipRecord> records;
  std::uint64_t begin = 64;
  for (const auto& storage : pickle.storages) {
    std::uint64_t end = 0;
    if (__builtin_add_overflow(begin, storage.bytes, &end) || end >> 62 != 0) break;
    records.push_back({"a/data/" + std::string(storage.record), begin, storage.bytes, 0, false});
    begin = end + 64;
  }
  return records;
}

std::uint64_t count_of(const std::vector<std::uint64_t>& shape) {
  return std::accumulate(shape.begin(), shape.end(), std::uint64_t{1}, std::multiplies<>());
}

// Each tensor is read from within one record, and no record is read twice.
void check_places(const format::TorchPickle& pickle) {
  const auto records = records_of(pickle);
  const auto placed = format::place_plain_tensors(pickle, records, "a/");
  if (!placed) return;
  std::multiset<std::string_view> names;
  std::set<std::uint64_t> read;
  for (const auto& entry : placed->entries) {
    names.insert(entry.name);
    const auto next = std::ranges::upper_bound(records, entry.begin, {}, &format::ZipRecord::begin);
    WL_REQUIRE(next != records.begin());
    const auto& record = *std::prev(next);
    const std::uint64_t bytes = count_of(entry.shape) * dtype_bytes(entry.dtype);
    WL_REQUIRE(entry.begin + bytes <= record.begin + record.bytes);
    WL_REQUIRE(bytes == 0 || read.insert(record.begin).second);
  }
  for (const auto& tied : placed->ties) {
    const auto base = std::ranges::find(placed->entries, tied.base, &format::TensorEntry::name);
    WL_REQUIRE(base != placed->entries.end() && base->dtype == tied.dtype);
    WL_REQUIRE(base->shape == std::vector{count_of(tied.shape)});
    WL_REQUIRE(tied.shape.size() == tied.stride.size());
    if (tied.name == tied.base) continue;
    WL_REQUIRE(names.insert(tied.name) != names.end() && names.count(tied.name) == 1);
  }
  WL_REQUIRE(std::ranges::is_permutation(names, placed->names));
  const auto& items = pickle.dicts[pickle.value.at].items;
  WL_REQUIRE(std::ranges::equal(placed->names, items, {}, {},
                                [&](const auto& item) { return pickle.texts[item.first.at]; }));
}

}  // namespace
}  // namespace weightlift::fuzz

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace weightlift;
  const std::string_view text = fuzz::as_text(data, size);
  const auto pickle = format::parse_torch_pickle(text);
  if (!pickle) return 0;
  const bool is_dict = pickle->value.kind == format::PickledValue::Kind::kDict ||
                       pickle->value.kind == format::PickledValue::Kind::kOrderedDict;
  WL_REQUIRE(is_dict);
  fuzz::Walk(*pickle, text)(pickle->value);
  fuzz::check_tensors(*pickle);
  fuzz::check_places(*pickle);
  return 0;
}
