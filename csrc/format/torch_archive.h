// Where the tensors of a file of torch.save lie: its pickle and its records together. Opens no
// file.
#pragma once

#include <optional>
#include <span>
#include <string_view>
#include <vector>

#include "format/index.h"
#include "format/torch_pickle.h"
#include "format/zip.h"

namespace weightlift::format {

// The folder of all records, with its slash; empty if they have none in common.
[[nodiscard]] std::string_view common_folder(std::span<const ZipRecord> records);

// Places the tensors of a plain state dict in the file, in the order of the dict: texts are the
// keys, which may repeat, and each value is a contiguous tensor that has its storage for itself.
// Every storage of the pickle must be a record of its size. Returns nothing for all other dicts,
// also the empty one: they need views, a search for the state dict, or an error. `records`: those
// of the archive. `folder`: the prefix of their names, such as "archive/".
[[nodiscard]] std::optional<std::vector<TensorEntry>> place_plain_tensors(
    TorchPickle pickle, std::span<const ZipRecord> records, std::string_view folder);

}  // namespace weightlift::format
