#include "format/torch_archive.h"

#include <algorithm>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "dtype.h"
#include "format/index.h"
#include "format/torch_pickle.h"
#include "format/zip.h"

namespace weightlift::format {
namespace {

// The records of storages, by their keys.
class StorageRecords {
 public:
  StorageRecords(std::span<const ZipRecord> records, std::string_view folder) {
    const std::string prefix = std::string(folder) + "data/";
    places_.reserve(records.size());
    for (const ZipRecord& record : records) {
      if (!record.name.starts_with(prefix)) continue;
      places_.push_back({std::string_view(record.name).substr(prefix.size()), &record});
    }
    std::ranges::sort(places_, {}, &Place::key);
  }

  // Null if there is no such record.
  [[nodiscard]] const ZipRecord* find(std::string_view key) const {
    const auto found = std::ranges::lower_bound(places_, key, {}, &Place::key);
    return found != places_.end() && found->key == key ? found->record : nullptr;
  }

 private:
  struct Place {
    std::string_view key;
    const ZipRecord* record;
  };
  std::vector<Place> places_;
};

}  // namespace

std::string_view common_folder(std::span<const ZipRecord> records) {
  if (records.empty()) return {};
  const std::string_view first = records[0].name;
  const std::string_view folder = first.substr(0, first.find('/') + 1);
  const auto inside = [folder](const ZipRecord& record) { return record.name.starts_with(folder); };
  return std::ranges::all_of(records, inside) ? folder : std::string_view{};
}

std::optional<std::vector<TensorEntry>> place_plain_tensors(TorchPickle pickle,
                                                            std::span<const ZipRecord> records,
                                                            std::string_view folder) {
  const TorchPickle::Dict& dict = pickle.dicts[pickle.value.at];
  if (dict.items.empty()) return std::nullopt;
  const StorageRecords by_key(records, folder);
  std::vector<std::uint64_t> begins;
  begins.reserve(pickle.storages.size());
  for (const PickledStorage& storage : pickle.storages) {
    const ZipRecord* const record = by_key.find(storage.record);
    if (record == nullptr || record->bytes != storage.bytes) return std::nullopt;
    begins.push_back(record->begin);
  }
  std::vector<bool> is_taken(pickle.storages.size());
  std::vector<TensorEntry> entries;
  entries.reserve(dict.items.size());
  for (const auto& [key, value] : dict.items) {
    if (key.kind != PickledValue::Kind::kText || value.kind != PickledValue::Kind::kTensor)
      return std::nullopt;
    PickledTensor& tensor = pickle.tensors[value.at];
    if (is_taken[tensor.storage] || !tensor.contiguous()) return std::nullopt;
    is_taken[tensor.storage] = true;
    entries.push_back({std::string(pickle.texts[key.at]), tensor.dtype, std::move(tensor.shape),
                       begins[tensor.storage] + tensor.offset * dtype_bytes(tensor.dtype)});
  }
  return entries;
}

}  // namespace weightlift::format
