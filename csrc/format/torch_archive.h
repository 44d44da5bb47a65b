// Where the tensors of a file of torch.save lie: its pickle and its records together. Opens no
// file.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string_view>
#include <vector>

#include "dtype.h"
#include "format/index.h"
#include "format/torch_pickle.h"
#include "format/zip.h"

namespace weightlift::format {

// The folder of all records, with its slash; empty if they have none in common.
[[nodiscard]] std::string_view common_folder(std::span<const ZipRecord> records);

// A tensor that has all its bytes in common with others.
struct TiedTensor {
  std::string_view name;
  std::string_view base;  // the name of the flat entry that has the bytes
  Dtype dtype = Dtype::kU8;
  std::vector<std::uint64_t> shape;   // in elements
  std::vector<std::uint64_t> stride;  // in elements
};

// Names are views into the pickle.
struct PlainTensors {
  std::vector<std::string_view> names;  // of all tensors, in the order of the dict
  std::vector<TensorEntry> entries;     // what to read; tied tensors are one, under the first name
  std::vector<TiedTensor> ties;
};

// Places the tensors of a plain state dict in the file: texts are the keys, which may repeat unless
// tensors are tied, and each value is a contiguous tensor that has its storage for itself or shares
// it with tensors of the same bytes and shape, as tied weights do. Every storage of the pickle must
// be a record of its size. Returns nothing for all other dicts, also the empty one: they need other
// views, a search for the state dict, or an error. `records`: those of the archive. `folder`: the
// prefix of their names, such as "archive/".
[[nodiscard]] std::optional<PlainTensors> place_plain_tensors(TorchPickle pickle,
                                                              std::span<const ZipRecord> records,
                                                              std::string_view folder);

}  // namespace weightlift::format
