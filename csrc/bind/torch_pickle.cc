#include "bind/torch_pickle.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

#include "dtype.h"
#include "format/torch_pickle.h"

namespace py = pybind11;

namespace weightlift::bind {
namespace {

using Kind = format::PickledValue::Kind;

py::tuple sizes(const std::vector<std::uint64_t>& values) {
  py::tuple result(values.size());
  for (std::size_t i = 0; i < values.size(); ++i) result[i] = py::int_(values[i]);
  return result;
}

class Converter {
 public:
  Converter(const format::TorchPickle& pickle, const py::object& tensor)
      : pickle_(pickle), tensor_(tensor) {}

  // Recurses no deeper than the parser allows dicts in dicts.
  py::object operator()(format::PickledValue value) {
    switch (value.kind) {
      case Kind::kBool:
        return py::bool_(value.at != 0);
      case Kind::kInt:
        return py::int_(pickle_.ints[value.at]);
      case Kind::kFloat:
        return py::float_(pickle_.floats[value.at]);
      case Kind::kText:
        return py::str(pickle_.texts[value.at]);
      case Kind::kList:
        return held(pickle_.lists[value.at]);
      case Kind::kTuple:
        return py::tuple(held(pickle_.held_by_tuples[value.at]));
      case Kind::kDict:
        return filled(py::dict(), value);
      case Kind::kOrderedDict:
        return filled(ordered_dict_(), value);
      case Kind::kTensor:
        return tensor(pickle_.tensors[value.at]);
      case Kind::kNone:
      case Kind::kStorage:
      case Kind::kGlobal:
        break;
    }
    return py::none();
  }

 private:
  py::object filled(py::object dict, format::PickledValue value) {
    for (const auto& [key, item] : pickle_.dicts[value.at].items) {
      dict[(*this)(key)] = (*this)(item);
    }
    return dict;
  }

  // One tensor, repeated once for each tensor of the list or tuple, but at most kMost times.
  py::list held(const format::TorchPickle::Held& held) {
    constexpr std::uint64_t kMost = 10'000;
    py::list result;
    if (held.count == 0) return result;
    const py::object one = tensor(pickle_.tensors[held.one]);
    for (std::uint64_t i = 0; i < std::min(held.count, kMost); ++i) result.append(one);
    return result;
  }

  py::object tensor(const format::PickledTensor& tensor) {
    return tensor_(py::str(tensor.record), py::str(dtype_name(tensor.dtype)), tensor.offset,
                   sizes(tensor.shape), sizes(tensor.stride), tensor.contiguous());
  }

  const format::TorchPickle& pickle_;
  const py::object& tensor_;
  py::object ordered_dict_ = py::module_::import("collections").attr("OrderedDict");
};

}  // namespace

py::object torch_pickle(const py::bytes& pickle, const py::object& tensor) {
  const auto parsed = format::parse_torch_pickle(std::string_view(pickle));
  if (!parsed) return py::none();
  const py::dict storages;
  for (const format::PickledStorage& storage : parsed->storages) {
    storages[py::str(storage.record)] = storage.bytes;
  }
  return py::make_tuple(Converter(*parsed, tensor)(parsed->value), storages);
}

}  // namespace weightlift::bind
