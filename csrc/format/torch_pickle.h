// Reads the pickle in a checkpoint of torch.save as data: calls and constructs nothing that the
// pickle names. Opens no file.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string_view>
#include <utility>
#include <vector>

#include "dtype.h"

namespace weightlift::format {

// A tensor or Parameter, as `torch._utils._rebuild_tensor_v2` would rebuild it. It stays within its
// storage, whose size the pickle states.
struct PickledTensor {
  std::string_view record;  // its storage is the record "data/<this>" of the archive
  Dtype dtype = Dtype::kU8;
  std::uint64_t offset = 0;                        // into the storage, in elements
  std::vector<std::uint64_t> shape;                // in elements
  std::vector<std::uint64_t> stride;               // in elements
  std::uint32_t storage = 0;                       // position in TorchPickle::storages
  [[nodiscard]] bool contiguous() const noexcept;  // as torch's is_contiguous()
};

// A value in a state dict. For lists and tuples, only the number of tensors in them is kept.
struct PickledValue {
  enum class Kind : std::uint8_t {
    kNone,
    kBool,         // `at` is 0 or 1
    kInt,          // `at` is a position in `ints`, and so on
    kFloat,        // in `floats`
    kText,         // in `texts`
    kList,         // in `lists`
    kTuple,        // in `tuples`
    kDict,         // in `dicts`
    kOrderedDict,  // in `dicts`
    kTensor,       // in `tensors`
    kStorage,      // in `storages`
    kGlobal,       // one of the few known globals
  };
  Kind kind = Kind::kNone;
  std::uint32_t at = 0;
};

// Each record has at most one.
struct PickledStorage {
  std::string_view record;
  Dtype dtype = Dtype::kU8;
  std::uint64_t elements = 0;
  std::uint64_t bytes = 0;
};

// Its texts are views into the pickle.
struct TorchPickle {
  struct Dict {
    std::vector<std::pair<PickledValue, PickledValue>> items;  // keys are texts or ints
    std::uint32_t depth = 1;
  };
  struct Held {
    std::uint64_t count = 0;  // of tensors, at any depth
    std::uint32_t one = 0;    // position of one of them in `tensors`
  };
  struct Tuple {  // a range of `tuple_items`
    std::size_t begin = 0;
    std::size_t count = 0;
  };
  PickledValue value;  // a dict; no dict is in it twice, or in itself
  std::vector<std::int64_t> ints;
  std::vector<double> floats;
  std::vector<std::string_view> texts;  // ASCII
  // In one vector, because a tensor has four tuples.
  std::vector<PickledValue> tuple_items;
  std::vector<Tuple> tuples;
  std::vector<Held> held_by_tuples;
  std::vector<Held> lists;
  std::vector<Dict> dicts;
  std::vector<PickledStorage> storages;
  std::vector<PickledTensor> tensors;
};

// Reads the pickles that torch.save writes for a state dict of plain tensors. Returns nothing for
// all others, whether damaged, hostile or only rare (subclasses, sparse tensors, other protocols,
// names that are not ASCII): torch's own unpickler then decides. It accepts every pickle that is
// accepted here, with the same result.
[[nodiscard]] std::optional<TorchPickle> parse_torch_pickle(std::string_view pickle) noexcept;

}  // namespace weightlift::format
