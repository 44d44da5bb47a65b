// The pickle in a checkpoint of torch.save, read as data: nothing that it names is called or made.
// Knows no file.
#pragma once

#include <cstdint>
#include <optional>
#include <string_view>
#include <utility>
#include <vector>

#include "dtype.h"

namespace weightlift::format {

// A tensor, or a Parameter, as `torch._utils._rebuild_tensor_v2` would rebuild it. It stays within
// its storage as the pickle states that one.
struct PickledTensor {
  std::string_view record;  // its storage is the record "data/<this>" of the archive
  Dtype dtype = Dtype::kU8;
  std::uint64_t offset = 0;                        // into the storage, in elements
  std::vector<std::uint64_t> shape;                // in elements
  std::vector<std::uint64_t> stride;               // in elements
  [[nodiscard]] bool contiguous() const noexcept;  // as torch's is_contiguous()
};

// What a state dict may hold; of lists and tuples no more than how many tensors they hold.
struct PickledValue {
  enum class Kind : std::uint8_t {
    kNone,
    kBool,         // `at` is 0 or 1
    kInt,          // `at` is into `ints`, and so on
    kFloat,        // in `floats`
    kText,         // in `texts`
    kList,         // in `lists`
    kTuple,        // in `tuples`
    kDict,         // in `dicts`
    kOrderedDict,  // in `dicts`
    kTensor,       // in `tensors`
    kStorage,      // in `storages`
    kGlobal,       // of the few that are known
  };
  Kind kind = Kind::kNone;
  std::uint32_t at = 0;
};

// No two are of one record.
struct PickledStorage {
  std::string_view record;
  Dtype dtype = Dtype::kU8;
  std::uint64_t elements = 0;
  std::uint64_t bytes = 0;
};

// Views into the pickle.
struct TorchPickle {
  struct Dict {
    std::vector<std::pair<PickledValue, PickledValue>> items;  // keys are texts or ints
    std::uint32_t depth = 1;
  };
  struct Held {
    std::uint64_t count = 0;  // tensors, in whatever is inside
    std::uint32_t one = 0;    // of `tensors`
  };
  PickledValue value;  // a dict, which holds no dict twice, nor itself
  std::vector<std::int64_t> ints;
  std::vector<double> floats;
  std::vector<std::string_view> texts;  // ASCII
  std::vector<std::vector<PickledValue>> tuples;
  std::vector<Held> held_by_tuples;
  std::vector<Held> lists;
  std::vector<Dict> dicts;
  std::vector<PickledStorage> storages;
  std::vector<PickledTensor> tensors;
};

// Nothing for whatever torch.save does not write of a state dict of plain tensors, be it damaged,
// hostile or merely rare (subclasses, sparse tensors, other protocols, names that are not ASCII):
// torch's own unpickler must say what that is. What is accepted here, that one accepts too, with
// the same result.
[[nodiscard]] std::optional<TorchPickle> parse_torch_pickle(std::string_view pickle) noexcept;

}  // namespace weightlift::format
