#include "format/torch_pickle.h"

#include <algorithm>
#include <bit>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>
#include <optional>
#include <span>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "dtype.h"

namespace weightlift::format {
namespace {

using Kind = PickledValue::Kind;

// The nesting of dicts is limited, so that code that walks the result may recurse.
constexpr std::uint32_t kMaxDepth = 64;
// torch supports no more dimensions. Without a limit, one long tuple could be the shape of many
// tensors.
constexpr std::size_t kMaxRank = 64;
// Positions have 32 bits; this bounds the number of values that a pickle can make.
constexpr std::size_t kMaxBytes = std::size_t{1} << 30;

// Python's module `pickletools` describes each opcode.
enum Opcode : unsigned char {
  kMark = '(',
  kStop = '.',
  kBinInt = 'J',
  kBinInt1 = 'K',
  kBinInt2 = 'M',
  kPushNone = 'N',
  kBinPersistentId = 'Q',
  kReduce = 'R',
  kBinUnicode = 'X',
  kAppend = 'a',
  kBuild = 'b',
  kGlobalName = 'c',
  kAppends = 'e',
  kBinFloat = 'G',
  kBinGet = 'h',
  kLongBinGet = 'j',
  kBinPut = 'q',
  kLongBinPut = 'r',
  kSetItem = 's',
  kTupleOfMark = 't',
  kSetItems = 'u',
  kEmptyTuple = ')',
  kEmptyList = ']',
  kEmptyDict = '}',
  kProtocol = 0x80,
  kTuple1 = 0x85,
  kTuple2 = 0x86,
  kTuple3 = 0x87,
  kTrue = 0x88,
  kFalse = 0x89,
  kLong1 = 0x8a,
};

enum class Global : std::uint8_t {
  kOrderedDict,
  kRebuildTensor,
  kRebuildParameter,
  kStorageOf,  // plus the dtype
};

struct StorageName {
  std::string_view name;
  Dtype dtype;
};

constexpr StorageName kStorages[] = {
    {"DoubleStorage", Dtype::kF64},       {"FloatStorage", Dtype::kF32},
    {"HalfStorage", Dtype::kF16},         {"BFloat16Storage", Dtype::kBf16},
    {"LongStorage", Dtype::kI64},         {"IntStorage", Dtype::kI32},
    {"ShortStorage", Dtype::kI16},        {"CharStorage", Dtype::kI8},
    {"ByteStorage", Dtype::kU8},          {"BoolStorage", Dtype::kBool},
    {"ComplexFloatStorage", Dtype::kC64}, {"ComplexDoubleStorage", Dtype::kC128},
};

std::optional<std::uint32_t> global_of(std::string_view module, std::string_view name) {
  constexpr auto number = [](Global global) { return static_cast<std::uint32_t>(global); };
  if (module == "collections" && name == "OrderedDict") return number(Global::kOrderedDict);
  if (module == "torch._utils" && name == "_rebuild_tensor_v2") {
    return number(Global::kRebuildTensor);
  }
  if (module == "torch._utils" && name == "_rebuild_parameter") {
    return number(Global::kRebuildParameter);
  }
  if (module != "torch") return std::nullopt;
  for (const StorageName& storage : kStorages) {
    if (storage.name == name) {
      return number(Global::kStorageOf) + static_cast<std::uint32_t>(storage.dtype);
    }
  }
  return std::nullopt;
}

bool is_ascii(std::string_view text) {
  return std::ranges::all_of(text, [](char c) { return static_cast<unsigned char>(c) < 0x80; });
}

// The stack machine of the format, for the known opcodes. Each step returns false for anything
// else.
class Reader {
 public:
  explicit Reader(std::string_view pickle) : bytes_(pickle) {}

  std::optional<TorchPickle> read() {
    std::uint8_t version = 0;
    if (bytes_.size() > kMaxBytes || !number(opcode_) || opcode_ != kProtocol || !number(version) ||
        version != 2) {
      return std::nullopt;
    }
    while (number(opcode_)) {
      if (opcode_ == kStop) break;
      if (!step()) return std::nullopt;
    }
    if (opcode_ != kStop || position_ != bytes_.size() || !marks_.empty() || stack_.size() != 1 ||
        !is_dict(stack_[0])) {
      return std::nullopt;
    }
    result_.value = stack_[0];
    return std::move(result_);
  }

 private:
  bool step() {
    switch (opcode_) {
      case kMark:
        marks_.push_back(stack_.size());
        return true;
      case kPushNone:
        return push({});
      case kTrue:
      case kFalse:
        return push({Kind::kBool, opcode_ == kTrue ? 1U : 0U});
      case kBinInt1:
        return push_int<std::uint8_t>();
      case kBinInt2:
        return push_int<std::uint16_t>();
      case kBinInt:
        return push_int<std::int32_t>();
      case kLong1:
        return push_long();
      case kBinFloat:
        return push_float();
      case kBinUnicode:
        return push_text();
      case kGlobalName:
        return push_global();
      case kEmptyDict:
        return push_new(Kind::kDict, result_.dicts, {});
      case kEmptyList:
        return push_new(Kind::kList, result_.lists, {});
      case kEmptyTuple:
        return push_tuple(0);
      case kTuple1:
        return push_tuple(1);
      case kTuple2:
        return push_tuple(2);
      case kTuple3:
        return push_tuple(3);
      case kTupleOfMark: {
        const auto count = pop_mark();
        return count && push_tuple(*count);
      }
      case kAppend:
        return append(1);
      case kAppends: {
        const auto count = pop_mark();
        return count && append(*count);
      }
      case kSetItem:
        return set_items(2);
      case kSetItems: {
        const auto count = pop_mark();
        return count && set_items(*count);
      }
      case kBinPut:
        return put<std::uint8_t>();
      case kLongBinPut:
        return put<std::uint32_t>();
      case kBinGet:
        return get<std::uint8_t>();
      case kLongBinGet:
        return get<std::uint32_t>();
      case kBinPersistentId:
        return persistent_id();
      case kReduce:
        return reduce();
      case kBuild:
        return build();
      default:
        return false;
    }
  }

  // The format and all supported machines are little-endian.
  template <std::integral Number>
  bool number(Number& value) {
    if (bytes_.size() - position_ < sizeof(Number)) return false;
    std::memcpy(&value, bytes_.data() + position_, sizeof(Number));
    position_ += sizeof(Number);
    return true;
  }

  std::optional<std::string_view> text(std::size_t count) {
    if (count > bytes_.size() - position_) return std::nullopt;
    const std::string_view found = bytes_.substr(position_, count);
    if (!is_ascii(found)) return std::nullopt;
    position_ += count;
    return found;
  }

  std::optional<std::string_view> line() {
    const std::size_t end = bytes_.find('\n', position_);
    if (end == std::string_view::npos) return std::nullopt;
    const auto found = text(end - position_);
    ++position_;
    return found;
  }

  bool push(PickledValue value) {
    stack_.push_back(value);
    return true;
  }

  template <class Thing>
  bool push_new(Kind kind, std::vector<Thing>& things, Thing thing) {
    things.push_back(std::move(thing));
    return push({kind, static_cast<std::uint32_t>(things.size() - 1)});
  }

  template <std::integral Number>
  bool push_int() {
    Number value = 0;
    return number(value) && push_new(Kind::kInt, result_.ints, std::int64_t{value});
  }

  bool push_long() {
    std::uint8_t count = 0;
    if (!number(count) || count == 0 || count > 8 || count > bytes_.size() - position_)
      return false;
    std::uint64_t value = 0;
    std::memcpy(&value, bytes_.data() + position_, count);
    position_ += count;
    const unsigned unused = 64 - 8U * count;  // the sign is that of the last byte
    return push_new(Kind::kInt, result_.ints, static_cast<std::int64_t>(value << unused) >> unused);
  }

  bool push_float() {
    std::uint64_t bits = 0;  // the only big-endian number of the format
    return number(bits) &&
           push_new(Kind::kFloat, result_.floats, std::bit_cast<double>(__builtin_bswap64(bits)));
  }

  bool push_text() {
    std::uint32_t count = 0;
    if (!number(count)) return false;
    const auto found = text(count);
    return found && push_new(Kind::kText, result_.texts, *found);
  }

  bool push_global() {
    const auto module = line();
    if (!module) return false;
    const auto name = line();
    if (!name) return false;
    const auto known = global_of(*module, *name);
    return known && push({Kind::kGlobal, *known});
  }

  // The number of values above the last mark. No operation may take values below it.
  [[nodiscard]] std::size_t available() const {
    return stack_.size() - (marks_.empty() ? 0 : marks_.back());
  }

  std::optional<std::size_t> pop_mark() {
    if (marks_.empty()) return std::nullopt;
    const std::size_t count = available();
    marks_.pop_back();
    return count;
  }

  // The last `count` values; they stay on the stack until drop().
  [[nodiscard]] std::span<const PickledValue> last(std::size_t count) const {
    return std::span(stack_).last(count);
  }

  void drop(std::size_t count) { stack_.resize(stack_.size() - count); }

  bool push_tuple(std::size_t count) {
    if (available() < count) return false;
    const auto items = last(count);
    Held held;
    for (const PickledValue item : items) add_held(held, item);
    result_.held_by_tuples.push_back(held);
    const TorchPickle::Tuple tuple{result_.tuple_items.size(), count};
    result_.tuple_items.insert(result_.tuple_items.end(), items.begin(), items.end());
    drop(count);
    return push_new(Kind::kTuple, result_.tuples, tuple);
  }

  // Valid until the next tuple is made.
  [[nodiscard]] std::span<const PickledValue> items_of(PickledValue tuple) const {
    const TorchPickle::Tuple& range = result_.tuples[tuple.at];
    return std::span(result_.tuple_items).subspan(range.begin, range.count);
  }

  using Held = TorchPickle::Held;

  bool append(std::size_t count) {
    if (available() < count + 1 || last(count + 1)[0].kind != Kind::kList) return false;
    Held& held = result_.lists[last(count + 1)[0].at];
    for (const PickledValue item : last(count)) add_held(held, item);
    drop(count);
    return true;
  }

  // For a list or tuple, only the number of tensors in it and one of them are kept.
  void add_held(Held& held, PickledValue value) const {
    const auto add = [&held](const Held& more) {
      if (more.count == 0) return;
      if (held.count == 0) held.one = more.one;
      // Tuples that share tuples can make the count grow exponentially.
      if (__builtin_add_overflow(held.count, more.count, &held.count)) {
        held.count = ~std::uint64_t{0};
      }
    };
    switch (value.kind) {
      case Kind::kTensor:
        return add({1, value.at});
      case Kind::kList:
        return add(result_.lists[value.at]);
      case Kind::kTuple:
        return add(result_.held_by_tuples[value.at]);
      case Kind::kDict:
      case Kind::kOrderedDict:
        for (const auto& [key, item] : result_.dicts[value.at].items) add_held(held, item);
        return;
      default:
        return;
    }
  }

  [[nodiscard]] static bool is_dict(PickledValue value) {
    return value.kind == Kind::kDict || value.kind == Kind::kOrderedDict;
  }

  bool set_items(std::size_t count) {
    if (count % 2 != 0 || available() < count + 1) return false;
    const auto items = last(count + 1);
    if (!is_dict(items[0])) return false;
    TorchPickle::Dict& dict = result_.dicts[items[0].at];
    if (dict.items.empty()) dict.items.reserve(count / 2);
    for (std::size_t i = 1; i < items.size(); i += 2) {
      const PickledValue key = items[i];
      const PickledValue value = items[i + 1];
      if (key.kind != Kind::kText && key.kind != Kind::kInt) return false;
      if (value.kind == Kind::kStorage || value.kind == Kind::kGlobal) return false;
      if (is_dict(value)) {
        dict.depth = std::max(dict.depth, result_.dicts[value.at].depth + 1);
        if (dict.depth > kMaxDepth) return false;
      }
      dict.items.emplace_back(key, value);
    }
    drop(count);
    return true;
  }

  // Python's pickler numbers the memo from 0 without gaps.
  template <std::integral Number>
  bool put() {
    Number index = 0;
    if (!number(index) || available() == 0 || index > memo_.size()) return false;
    if (index == memo_.size()) memo_.emplace_back();
    memo_[index] = stack_.back();
    return true;
  }

  // Refuses dicts and lists: a state dict has each only once, and one that contained itself would
  // have no end.
  template <std::integral Number>
  bool get() {
    Number index = 0;
    if (!number(index) || index >= memo_.size()) return false;
    const PickledValue value = memo_[index];
    return !is_dict(value) && value.kind != Kind::kList && push(value);
  }

  // ("storage", type, record, location, elements)
  bool persistent_id() {
    if (available() == 0 || stack_.back().kind != Kind::kTuple) return false;
    const auto saved = items_of(stack_.back());
    if (saved.size() != 5 || !is_text(saved[0], "storage") || saved[1].kind != Kind::kGlobal ||
        saved[1].at < static_cast<std::uint32_t>(Global::kStorageOf) ||
        saved[2].kind != Kind::kText || saved[3].kind != Kind::kText) {
      return false;
    }
    const auto elements = size_of(saved[4]);
    if (!elements) return false;
    const auto dtype =
        static_cast<Dtype>(saved[1].at - static_cast<std::uint32_t>(Global::kStorageOf));
    PickledStorage storage{result_.texts[saved[2].at], dtype, *elements, 0};
    drop(1);
    if (__builtin_mul_overflow(*elements, dtype_bytes(dtype), &storage.bytes)) return false;
    const auto [known, is_new] = storage_of_.try_emplace(
        storage.record, static_cast<std::uint32_t>(result_.storages.size()));
    if (is_new) return push_new(Kind::kStorage, result_.storages, storage);
    const PickledStorage& before = result_.storages[known->second];
    return before.dtype == dtype && before.elements == *elements &&
           push({Kind::kStorage, known->second});
  }

  bool reduce() {
    if (available() < 2) return false;
    const PickledValue callee = last(2)[0];
    const PickledValue arguments = last(2)[1];
    if (callee.kind != Kind::kGlobal || arguments.kind != Kind::kTuple) return false;
    const auto tuple = items_of(arguments);
    drop(2);
    switch (static_cast<Global>(callee.at)) {
      case Global::kOrderedDict:
        return tuple.empty() && push_new(Kind::kOrderedDict, result_.dicts, {});
      case Global::kRebuildTensor:
        return rebuild_tensor(tuple);
      case Global::kRebuildParameter:
        // (tensor, requires_grad, hooks)
        return tuple.size() == 3 && tuple[0].kind == Kind::kTensor &&
               may_require_grad(result_.tensors[tuple[0].at].dtype, tuple[1]) &&
               is_empty_dict(tuple[2]) && push(tuple[0]);
      default:
        return false;
    }
  }

  // (storage, offset, shape, stride, requires_grad, hooks)
  bool rebuild_tensor(std::span<const PickledValue> arguments) {
    if (arguments.size() != 6 || arguments[0].kind != Kind::kStorage) return false;
    const PickledStorage& storage = result_.storages[arguments[0].at];
    const auto offset = size_of(arguments[1]);
    auto shape = sizes_of(arguments[2]);
    auto stride = sizes_of(arguments[3]);
    if (!offset || !shape || !stride || shape->size() != stride->size() ||
        !may_require_grad(storage.dtype, arguments[4]) || !is_empty_dict(arguments[5])) {
      return false;
    }
    PickledTensor tensor{storage.record,    storage.dtype,      *offset,
                         std::move(*shape), std::move(*stride), arguments[0].at};
    return stays_inside(tensor, storage.elements) &&
           push_new(Kind::kTensor, result_.tensors, std::move(tensor));
  }

  static bool stays_inside(const PickledTensor& tensor, std::uint64_t elements) {
    std::uint64_t last = tensor.offset;
    for (std::size_t i = 0; i < tensor.shape.size(); ++i) {
      std::uint64_t way = 0;
      if (tensor.shape[i] == 0) return tensor.offset == 0;
      if (__builtin_mul_overflow(tensor.shape[i] - 1, tensor.stride[i], &way) ||
          __builtin_add_overflow(last, way, &last)) {
        return false;
      }
    }
    return last < elements;
  }

  [[nodiscard]] bool is_text(PickledValue value, std::string_view wanted) const {
    return value.kind == Kind::kText && result_.texts[value.at] == wanted;
  }

  [[nodiscard]] bool is_empty_dict(PickledValue value) const {
    return value.kind == Kind::kOrderedDict && result_.dicts[value.at].items.empty();
  }

  // torch refuses requires_grad for other dtypes.
  [[nodiscard]] static bool may_require_grad(Dtype dtype, PickledValue value) {
    return value.kind == Kind::kBool && (value.at == 0 || dtype_is_floating(dtype));
  }

  [[nodiscard]] std::optional<std::uint64_t> size_of(PickledValue value) const {
    if (value.kind != Kind::kInt || result_.ints[value.at] < 0) return std::nullopt;
    return static_cast<std::uint64_t>(result_.ints[value.at]);
  }

  [[nodiscard]] std::optional<std::vector<std::uint64_t>> sizes_of(PickledValue value) const {
    if (value.kind != Kind::kTuple) return std::nullopt;
    const auto tuple = items_of(value);
    if (tuple.size() > kMaxRank) return std::nullopt;
    std::vector<std::uint64_t> sizes;
    sizes.reserve(tuple.size());
    for (const PickledValue item : tuple) {
      const auto size = size_of(item);
      if (!size) return std::nullopt;
      sizes.push_back(*size);
    }
    return sizes;
  }

  // The attributes of a state dict: `_metadata`, the versions that Module.state_dict() records.
  bool build() {
    if (available() < 2 || last(2)[0].kind != Kind::kOrderedDict || !is_dict(last(2)[1])) {
      return false;
    }
    const auto& state = result_.dicts[last(2)[1].at].items;
    if (!std::ranges::all_of(state, [](auto& item) { return item.first.kind == Kind::kText; })) {
      return false;
    }
    drop(1);
    return true;
  }

  std::string_view bytes_;
  std::size_t position_ = 0;
  std::uint8_t opcode_ = 0;
  std::vector<PickledValue> stack_;
  std::vector<std::size_t> marks_;
  std::vector<PickledValue> memo_;
  std::unordered_map<std::string_view, std::uint32_t> storage_of_;
  TorchPickle result_;
};

}  // namespace

bool PickledTensor::contiguous() const noexcept {
  if (std::ranges::find(shape, 0U) != shape.end()) return true;
  std::uint64_t expected = 1;
  for (std::size_t i = shape.size(); i-- > 0;) {
    if (shape[i] == 1) continue;
    if (stride[i] != expected) return false;
    expected *= shape[i];  // no overflow: the tensor stays inside its storage
  }
  return true;
}

std::optional<TorchPickle> parse_torch_pickle(std::string_view pickle) noexcept {
  try {
    return Reader(pickle).read();
  } catch (const std::bad_alloc&) {
    return std::nullopt;  // torch's unpickler will raise the error
  }
}

}  // namespace weightlift::format
