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

// Where each storage begins in the file; nothing unless each is a record of its size.
std::optional<std::vector<std::uint64_t>> begins_of(std::span<const PickledStorage> storages,
                                                    const StorageRecords& records) {
  std::vector<std::uint64_t> begins;
  begins.reserve(storages.size());
  for (const PickledStorage& storage : storages) {
    const ZipRecord* const record = records.find(storage.record);
    if (record == nullptr || record->bytes != storage.bytes) return std::nullopt;
    begins.push_back(record->begin);
  }
  return begins;
}

// Adds the tensors of a dict one by one.
class PlainDict {
 public:
  PlainDict(TorchPickle& pickle, std::span<const std::uint64_t> begins)
      : pickle_(pickle), begins_(begins), uses_(begins.size()), first_(begins.size()) {}

  std::optional<PlainTensors> place(const TorchPickle::Dict& dict) {
    for (const auto& [key, value] : dict.items) {
      if (key.kind != PickledValue::Kind::kText || value.kind != PickledValue::Kind::kTensor)
        return std::nullopt;
      const PickledTensor& tensor = pickle_.tensors[value.at];
      if (!tensor.contiguous()) return std::nullopt;
      ++uses_[tensor.storage];
    }
    result_.names.reserve(dict.items.size());
    result_.entries.reserve(dict.items.size());
    for (const auto& [key, value] : dict.items) {
      const std::string_view name = pickle_.texts[key.at];
      PickledTensor& tensor = pickle_.tensors[value.at];
      result_.names.push_back(name);
      if (uses_[tensor.storage] == 1) {
        add_entry(name, tensor, std::move(tensor.shape));
      } else if (!add_tied(name, tensor)) {
        return std::nullopt;
      }
    }
    if (!result_.ties.empty() && repeats(result_.names)) return std::nullopt;
    return std::move(result_);
  }

 private:
  void add_entry(std::string_view name, const PickledTensor& tensor,
                 std::vector<std::uint64_t> shape) {
    result_.entries.push_back(
        {std::string(name), tensor.dtype, std::move(shape),
         begins_[tensor.storage] + tensor.offset * dtype_bytes(tensor.dtype)});
  }

  // False for tensors that share only a part of their bytes, or none, and for those without bytes.
  bool add_tied(std::string_view name, const PickledTensor& tensor) {
    std::optional<First>& first = first_[tensor.storage];
    if (!first) {
      std::uint64_t count = 1;  // no overflow: the tensor stays inside its storage
      for (const std::uint64_t size : tensor.shape) count *= size;
      if (count == 0) return false;
      first = First{name, &tensor};
      add_entry(name, tensor, {count});
    }
    if (tensor.offset != first->tensor->offset || tensor.shape != first->tensor->shape)
      return false;
    result_.ties.push_back({name, first->name, tensor.dtype, tensor.shape, tensor.stride});
    return true;
  }

  static bool repeats(std::vector<std::string_view> names) {
    std::ranges::sort(names);
    return std::ranges::adjacent_find(names) != names.end();
  }

  struct First {
    std::string_view name;
    const PickledTensor* tensor;
  };
  TorchPickle& pickle_;
  std::span<const std::uint64_t> begins_;
  // For each storage.
  std::vector<std::uint32_t> uses_;
  std::vector<std::optional<First>> first_;
  PlainTensors result_;
};

}  // namespace

std::string_view common_folder(std::span<const ZipRecord> records) {
  if (records.empty()) return {};
  const std::string_view first = records[0].name;
  const std::string_view folder = first.substr(0, first.find('/') + 1);
  const auto inside = [folder](const ZipRecord& record) { return record.name.starts_with(folder); };
  return std::ranges::all_of(records, inside) ? folder : std::string_view{};
}

std::optional<PlainTensors> place_plain_tensors(TorchPickle pickle,
                                                std::span<const ZipRecord> records,
                                                std::string_view folder) {
  const TorchPickle::Dict& dict = pickle.dicts[pickle.value.at];
  if (dict.items.empty()) return std::nullopt;
  const auto begins = begins_of(pickle.storages, StorageRecords(records, folder));
  if (!begins) return std::nullopt;
  return PlainDict(pickle, *begins).place(dict);
}

}  // namespace weightlift::format
