#include "format/safetensors.h"

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <iterator>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "dtype.h"
#include "format/by_name.h"
#include "format/common.h"
#include "format/index.h"
#include "result.h"

// This parser accepts what safetensors 0.8.0 accepts, found by running it. The one exception is
// duplicate tensor names, which the format forbids: the reference silently drops one of the two
// tensors. tests/python/checkpoint/test_malformed.py compares the two parsers.

namespace weightlift::format {
namespace {

// The limit of serde_json, which the reference uses: 127 nested objects and lists, including the
// outermost.
constexpr std::uint32_t kMaxDepth = 127;
constexpr std::string_view kMetadataKey = "__metadata__";

// A tensor as the header states it, not yet checked against the others.
struct Entry {
  std::size_t name_at = 0;  // in Parsed::names
  std::size_t name_size = 0;
  std::size_t shape_at = 0;  // in Parsed::extents
  std::size_t rank = 0;
  std::uint64_t begin = 0;  // from the start of the data
  std::uint64_t end = 0;
  std::uint64_t header_at = 0;  // in the file: the end of its name in the header
  Dtype dtype = Dtype::kU8;
};

struct Parsed {
  std::vector<Entry> entries;
  std::string names;
  std::vector<std::uint64_t> extents;
  std::optional<std::vector<std::pair<std::string, std::string>>> metadata;

  [[nodiscard]] std::string_view name(const Entry& entry) const noexcept {
    return std::string_view(names).substr(entry.name_at, entry.name_size);
  }
  [[nodiscard]] std::span<const std::uint64_t> shape(const Entry& entry) const noexcept {
    return std::span(extents).subspan(entry.shape_at, entry.rank);
  }
};

// Walks over the header and stores its position in `*at`, because the SAX interface gives a
// position only for syntax errors.
class Cursor {
 public:
  using iterator_category = std::input_iterator_tag;
  using value_type = char;
  using difference_type = std::ptrdiff_t;
  using pointer = const char*;
  using reference = const char&;

  Cursor(const char* here, const char** at) noexcept : here_(here), at_(at) {}
  const char& operator*() const noexcept { return *here_; }
  Cursor& operator++() noexcept {
    *at_ = ++here_;
    return *this;
  }
  bool operator==(const Cursor& other) const noexcept { return here_ == other.here_; }

 private:
  const char* here_;
  const char** at_;
};

// Handles the events of nlohmann-json's SAX parser, which keeps its own stack, so nothing here
// recurses. Each event returns whether to go on; if not, `error` says why.
class Handler {
 public:
  explicit Handler(std::string_view header) : header_(header), at_(header.data()) {}

  [[nodiscard]] bool parse() {
    const char* const end = header_.data() + header_.size();
    // NOLINTNEXTLINE(bugprone-suspicious-stringview-data-usage): `end` is the end
    return nlohmann::json::sax_parse(Cursor(header_.data(), &at_), Cursor(end, &at_), this);
  }
  Parsed& parsed() noexcept { return parsed_; }
  Error& error() noexcept { return error_; }

  bool null() { return scalar(Kind::kNull); }
  bool boolean(bool) { return scalar(Kind::kBoolean); }
  // Called only for numbers with a minus sign. That includes -0, which the reference reads as a
  // floating-point number.
  bool number_integer(std::int64_t) { return scalar(Kind::kNegative); }
  bool number_unsigned(std::uint64_t value) { return scalar(Kind::kWhole, value); }
  // Also called for whole numbers that do not fit into 64 bits.
  bool number_float(double, const std::string&) { return scalar(Kind::kFraction); }
  bool string(std::string& text) { return scalar(Kind::kText, 0, &text); }
  bool binary(nlohmann::json::binary_t&) { return false; }  // not in JSON

  bool start_object(std::size_t) {
    if (!deeper()) return false;
    switch (next_value()) {
      case State::kStart:
        return enter(State::kTop);
      case State::kMetadataValue:
        parsed_.metadata.emplace();
        return enter(State::kMetadata);
      case State::kTensorValue:
        return enter(State::kTensorObject);
      case State::kField:
        if (field_ == kDtype) {
          dtype_given_ = false;
          return enter(State::kDtypeObject);
        }
        if (field_ == kUnknown) return skip();
        break;
      case State::kSkip:
        return true;
      default:
        break;
    }
    return misplaced(Kind::kObject);
  }

  bool start_array(std::size_t) {
    if (!deeper()) return false;
    switch (next_value()) {
      case State::kTensorValue:
        // serde also reads a struct from a list of its fields, so the reference accepts "name":
        // ["F32", [1], [0, 4]] as a tensor.
        listed_ = 0;
        return enter(State::kTensorList);
      case State::kField:
        if (field_ == kShape) entry_.shape_at = parsed_.extents.size();
        if (field_ == kShape || field_ == kOffsets) return enter(State::kNumbers);
        if (field_ == kUnknown) return skip();
        break;
      case State::kSkip:
        return true;
      default:
        break;
    }
    return misplaced(Kind::kList);
  }

  bool key(std::string& text) {
    switch (state_) {
      case State::kTop:
        if (text == kMetadataKey) {
          if (metadata_seen_) {
            return fail(ErrorCode::kMetadataInvalid,
                        "the header has __metadata__ twice: save the file again");
          }
          metadata_seen_ = true;
          return enter(State::kMetadataValue);
        }
        entry_ = Entry{};
        entry_.name_at = parsed_.names.size();
        entry_.name_size = text.size();
        entry_.header_at = offset();
        parsed_.names += text;
        fields_ = 0;
        listed_ = kNotListed;
        return enter(State::kTensorValue);
      case State::kMetadata:
        metadata_key_ = std::move(text);
        return enter(State::kMetadataText);
      case State::kTensorObject:
        return tensor_field(text);
      case State::kDtypeObject:
        if (dtype_given_) return tensor_invalid("gives more than one dtype");
        return dtype(text) && enter(State::kDtypeNull);
      default:
        return true;  // inside a field that is not read
    }
  }

  bool end_object() {
    --depth_;
    switch (state_) {
      case State::kTop:
        return enter(State::kEnd);
      case State::kMetadata:
        return enter(State::kTop);
      case State::kTensorObject:
        return tensor_end();
      case State::kDtypeObject:
        if (!dtype_given_) return tensor_invalid("has an empty object for its dtype");
        return field_end();
      default:
        return unskip();
    }
  }

  bool end_array() {
    --depth_;
    switch (state_) {
      case State::kTensorList:
        return tensor_end();
      case State::kNumbers:
        if (field_ == kShape) {
          entry_.rank = parsed_.extents.size() - entry_.shape_at;
        } else if (offsets_ != 2) {
          return tensor_invalid("has " + std::to_string(offsets_) + " data_offsets instead of two");
        }
        return field_end();
      default:
        return unskip();
    }
  }

  bool parse_error(std::size_t position, const std::string&, const nlohmann::json::exception& e) {
    // The text is "[json.exception.parse_error.101] parse error at line 1, column 2: syntax error
    // while ...". Only its end is used: the error has a byte offset of its own, and the text that
    // was last read may end inside a character.
    std::string_view what = e.what();
    what = what.substr(0, what.find("; last read: "));
    for (const std::string_view before : {"] ", "syntax error "}) {
      if (const auto found = what.find(before); found != what.npos) {
        what.remove_prefix(found + before.size());
      }
    }
    if (what.starts_with("- ")) what.remove_prefix(2);
    // `position` is the number of characters that were read, and counts the end of the input as
    // one.
    const std::size_t last = std::min(position > 0 ? position - 1 : 0, header_.size());
    error_ =
        make_error(ErrorCode::kHeaderNotJson,
                   "the header is not JSON: " + excerpt(what, 160) + "; " + std::string(kDamaged),
                   kLengthBytes + last);
    return false;
  }

 private:
  enum class State : std::uint8_t {
    kStart,
    kTop,
    kMetadataValue,
    kMetadata,
    kMetadataText,
    kTensorValue,
    kTensorObject,
    kTensorList,
    kField,
    kDtypeObject,
    kDtypeNull,
    kNumbers,
    kSkip,
    kEnd,
  };
  enum class Kind : std::uint8_t {
    kNull,
    kBoolean,
    kNegative,
    kWhole,
    kFraction,
    kText,
    kObject,
    kList,
  };
  enum Field : std::uint8_t { kDtype, kShape, kOffsets, kUnknown };
  static constexpr std::array<std::string_view, 3> kFieldNames = {"dtype", "shape", "data_offsets"};

  [[nodiscard]] std::uint64_t offset() const noexcept {
    return kLengthBytes + static_cast<std::uint64_t>(at_ - header_.data());
  }
  [[nodiscard]] bool enter(State state) noexcept {
    state_ = state;
    return true;
  }
  [[nodiscard]] bool fail(ErrorCode code, std::string message, std::string_view tensor = {}) {
    error_ = make_error(code, std::move(message), offset(), tensor);
    return false;
  }
  [[nodiscard]] bool tensor_invalid(const std::string& what) {
    return fail(ErrorCode::kTensorInvalid,
                "its entry in the header " + what + ": save the file again", parsed_.name(entry_));
  }

  [[nodiscard]] bool deeper() {
    if (++depth_ <= kMaxDepth) return true;
    return fail(ErrorCode::kHeaderTooDeep, "the header nests more than " +
                                               std::to_string(kMaxDepth) + " objects and lists; " +
                                               std::string(kDamaged));
  }

  // The state for the value that begins now.
  [[nodiscard]] State next_value() noexcept {
    if (state_ == State::kTensorList) {
      field_ = static_cast<Field>(std::min<std::uint32_t>(listed_++, kUnknown));
      begin_field();
    }
    return state_;
  }

  bool scalar(Kind kind, std::uint64_t number = 0, std::string* text = nullptr) {
    switch (next_value()) {
      case State::kMetadataValue:
        if (kind == Kind::kNull) return enter(State::kTop);
        break;
      case State::kMetadataText:
        if (kind == Kind::kText) return metadata_pair(std::move(*text));
        break;
      case State::kField:
        if (field_ == kDtype && kind == Kind::kText) return dtype(*text) && field_end();
        if (field_ == kUnknown) return field_end();
        break;
      case State::kDtypeNull:
        if (kind == Kind::kNull) return enter(State::kDtypeObject);
        break;
      case State::kNumbers:
        if (kind == Kind::kWhole) return whole_number(number);
        break;
      case State::kSkip:
        return true;
      default:
        break;
    }
    return misplaced(kind);
  }

  [[nodiscard]] bool metadata_pair(std::string text) {
    auto& pairs = *parsed_.metadata;
    // If a key is repeated, its last value counts, as in the reference.
    const auto [place, fresh] = metadata_places_.try_emplace(metadata_key_, pairs.size());
    if (fresh) {
      pairs.emplace_back(std::move(metadata_key_), std::move(text));
    } else {
      pairs[place->second].second = std::move(text);
    }
    return enter(State::kMetadata);
  }

  [[nodiscard]] bool tensor_field(std::string_view text) {
    const auto found = std::find(kFieldNames.begin(), kFieldNames.end(), text);
    field_ = static_cast<Field>(found - kFieldNames.begin());  // kUnknown if it is none of them
    if (field_ != kUnknown && (fields_ >> field_ & 1) != 0) {
      return tensor_invalid("has " + std::string(text) + " twice");
    }
    begin_field();
    return true;
  }
  void begin_field() noexcept {
    if (field_ != kUnknown) fields_ = static_cast<std::uint8_t>(fields_ | 1 << field_);
    offsets_ = 0;
    state_ = State::kField;
  }
  [[nodiscard]] bool field_end() noexcept {
    return enter(listed_ != kNotListed ? State::kTensorList : State::kTensorObject);
  }

  [[nodiscard]] bool tensor_end() {
    if (listed_ != kNotListed && listed_ != kFieldNames.size()) {
      return tensor_invalid("is a list of " + std::to_string(listed_) +
                            " values instead of dtype, shape and data_offsets");
    }
    for (std::size_t i = 0; i < kFieldNames.size(); ++i) {
      if ((fields_ >> i & 1) == 0) return tensor_invalid("has no " + std::string(kFieldNames[i]));
    }
    parsed_.entries.push_back(entry_);
    return enter(State::kTop);
  }

  [[nodiscard]] bool dtype(std::string_view name) {
    dtype_given_ = true;
    // Most files have one dtype, so the last one is compared first.
    if (name != dtype_name(last_dtype_)) {
      const auto found = dtype_from_name(name);
      if (!found || static_cast<std::size_t>(*found) >= kSafetensorsDtypeCount) {
        return fail(
            ErrorCode::kUnknownDtype,
            "its dtype '" + excerpt(name) + "' is not one of the " +
                std::to_string(kSafetensorsDtypeCount) +
                " dtypes of the safetensors format: install a newer weightlift, or save the "
                "file with another dtype",
            parsed_.name(entry_));
      }
      last_dtype_ = *found;
    }
    entry_.dtype = last_dtype_;
    return true;
  }

  [[nodiscard]] bool whole_number(std::uint64_t number) {
    if (field_ == kShape) {
      parsed_.extents.push_back(number);
      return true;
    }
    // Further numbers are only counted.
    if (offsets_ == 0) entry_.begin = number;
    if (offsets_ == 1) entry_.end = number;
    ++offsets_;
    return true;
  }

  [[nodiscard]] bool skip() noexcept {
    skip_depth_ = depth_ - 1;
    return enter(State::kSkip);
  }
  [[nodiscard]] bool unskip() noexcept { return depth_ > skip_depth_ || field_end(); }

  [[nodiscard]] bool misplaced(Kind kind) {
    static constexpr std::array<std::string_view, 8> kNames = {
        "null",
        "a boolean",
        "a negative number",
        "a number",
        "a fraction or a number that is too large",
        "a string",
        "an object",
        "a list"};
    const std::string name(kNames[static_cast<std::size_t>(kind)]);
    switch (state_) {
      case State::kMetadataValue:
        return fail(
            ErrorCode::kMetadataInvalid,
            "__metadata__ is " + name + " and must be an object of strings: save the file again");
      case State::kMetadataText:
        return fail(ErrorCode::kMetadataInvalid, "the __metadata__ value of '" +
                                                     excerpt(metadata_key_) + "' is " + name +
                                                     " and must be a string: save the file again");
      case State::kTensorValue:
        return tensor_invalid("is " + name +
                              " and must be an object of dtype, shape and data_offsets");
      case State::kField:
      case State::kNumbers:
      case State::kDtypeNull:
      case State::kDtypeObject: {
        const std::string field(kFieldNames[std::min<std::size_t>(field_, kOffsets)]);
        return tensor_invalid("has " + name + " in " + field);
      }
      default:
        return fail(
            ErrorCode::kHeaderNotObject,
            "the header is " + name + " and must be a JSON object; " + std::string(kDamaged));
    }
  }

  static constexpr std::uint32_t kNotListed = 0xffff'ffff;

  std::string_view header_;
  const char* at_;
  Parsed parsed_;
  Error error_;

  State state_ = State::kStart;
  std::uint32_t depth_ = 0;
  std::uint32_t skip_depth_ = 0;

  bool metadata_seen_ = false;
  std::string metadata_key_;
  std::map<std::string, std::size_t, std::less<>> metadata_places_;

  // The tensor that is being read.
  Entry entry_;
  Field field_ = kUnknown;
  std::uint8_t fields_ = 0;            // a bit for each of kFieldNames
  std::uint32_t listed_ = kNotListed;  // fields so far, if the tensor is a list
  bool dtype_given_ = false;
  std::uint64_t offsets_ = 0;
  Dtype last_dtype_ = Dtype::kF32;
};

Result<std::uint64_t> length_of(std::string_view first, std::uint64_t file_size) {
  if (auto empty = empty_file(file_size)) return *std::move(empty);
  // Called only if the first bytes cannot be the length of a header.
  const auto refuse = [first](ErrorCode code, std::string message) {
    if (first.starts_with("PK\x03\x04")) {
      return make_error(
          ErrorCode::kNotWeights,
          "this is a zip file, perhaps from torch.save: if so, rename it to .bin or .pt", 0);
    }
    if (first.size() > 2 && first[0] == '\x80' && first[1] >= 2 && first[1] <= 5) {
      return make_error(
          ErrorCode::kNotWeights,
          "this is a pickle, perhaps from torch.save: if so, rename it to .bin or .pt", 0);
    }
    auto foreign = foreign_file(first);
    return foreign ? *std::move(foreign) : make_error(code, std::move(message), 0);
  };
  const std::string size = bytes_text(file_size);
  if (first.size() < kLengthBytes) {
    return refuse(ErrorCode::kHeaderTooSmall, "the file has " + size +
                                                  ", but the length of its header alone takes 8; " +
                                                  std::string(kDamaged));
  }
  std::uint64_t length = 0;
  for (std::size_t i = kLengthBytes; i-- > 0;) {
    length = length << 8 | static_cast<unsigned char>(first[i]);
  }
  const std::string stated = "the first bytes state a header of " + bytes_text(length);
  if (length > kMaxHeaderBytes) {
    return refuse(ErrorCode::kHeaderTooLarge,
                  stated + ", but at most " + std::to_string(kMaxHeaderBytes) +
                      " are allowed: this is not a safetensors file, or "
                      "it is damaged; download it or save it again");
  }
  if (length > file_size - kLengthBytes) {
    return refuse(ErrorCode::kHeaderPastEnd,
                  stated + ", but the file ends after " + size +
                      ": the download or the copy is incomplete, or "
                      "this is not a safetensors file; download it again");
  }
  constexpr std::string_view kSmallest = "{}";
  if (length < kSmallest.size()) {
    return refuse(ErrorCode::kHeaderTooSmall,
                  stated + ", but the smallest header has 2; " + std::string(kDamaged));
  }
  return length;
}

// nlohmann-json skips a byte order mark, takes a NUL byte for the end of its input, and checks the
// encoding of strings only. The reference refuses all three.
Status check_bytes(std::string_view header) {
  if (const std::size_t valid = utf8_prefix(header); valid < header.size()) {
    return make_error(ErrorCode::kHeaderNotUtf8,
                      "the header is not UTF-8; " + std::string(kDamaged), kLengthBytes + valid);
  }
  const auto not_json = [](std::string what, std::size_t at) {
    return make_error(ErrorCode::kHeaderNotJson,
                      "the header is not JSON: " + std::move(what) + "; " + std::string(kDamaged),
                      kLengthBytes + at);
  };
  if (header.starts_with("\xef\xbb\xbf")) return not_json("it begins with a byte order mark", 0);
  if (const std::size_t nul = header.find('\0'); nul != header.npos) {
    return not_json("it has a NUL byte", nul);
  }
  return {};
}

std::span<const std::byte> known(std::span<const std::byte> first, std::uint64_t file_size) {
  return first.first(static_cast<std::size_t>(std::min<std::uint64_t>(first.size(), file_size)));
}

}  // namespace

class SafetensorsParser {
 public:
  static Result<std::shared_ptr<const Index>> parse(std::string_view header,
                                                    std::uint64_t file_size, std::uint64_t origin) {
    if (header.size() > kMaxHeaderBytes || file_size < kLengthBytes ||
        header.size() > file_size - kLengthBytes) {
      return make_error(ErrorCode::kHeaderPastEnd,
                        "the header has " + bytes_text(header.size()) +
                            ", which do not fit into a file of " + bytes_text(file_size) + "; " +
                            std::string(kDamaged),
                        0);
    }
    WL_RETURN_IF_ERROR(check_bytes(header));
    Handler handler(header);
    if (!handler.parse()) return std::move(handler.error());
    Parsed& parsed = handler.parsed();

    sort(parsed);
    const std::shared_ptr<Index> index(new Index());
    const std::uint64_t data_begin = kLengthBytes + header.size();
    fill(*index, parsed, origin + data_begin);
    // Names first: two tensors of one name nearly always overlap as well, and the name says more.
    WL_RETURN_IF_ERROR(name(*index, parsed.entries));
    WL_RETURN_IF_ERROR(check_places(*index, parsed.entries, data_begin, file_size));
    return std::shared_ptr<const Index>(index);
  }

 private:
  static void sort(Parsed& parsed) {
    const auto order = [&parsed](const Entry& left, const Entry& right) {
      if (left.begin != right.begin) return left.begin < right.begin;
      if (left.end != right.end) return left.end < right.end;
      return parsed.name(left) < parsed.name(right);
    };
    auto& entries = parsed.entries;
    // All known writers write this order.
    if (!std::is_sorted(entries.begin(), entries.end(), order)) {
      std::sort(entries.begin(), entries.end(), order);
    }
  }

  // The numbers are not checked yet: if the sum wraps, check_places() refuses the file.
  static void fill(Index& index, Parsed& parsed, std::uint64_t data_begin) {
    index.data_begin_ = data_begin;
    index.metadata_ = std::move(parsed.metadata);
    index.extents_ = std::move(parsed.extents);
    index.names_ = std::move(parsed.names);
    index.tensors_.reserve(parsed.entries.size());
    const std::string_view names = index.names_;
    const std::span<const std::uint64_t> extents = index.extents_;
    for (const Entry& entry : parsed.entries) {
      index.tensors_.push_back({names.substr(entry.name_at, entry.name_size), entry.dtype,
                                extents.subspan(entry.shape_at, entry.rank),
                                data_begin + entry.begin, entry.end - entry.begin});
    }
  }

  static Status name(Index& index, std::span<const Entry> entries) {
    const std::span<const TensorInfo> tensors = index.tensors_;
    index.by_name_ = std::make_unique<Index::ByName>(tensors.size());
    for (std::uint32_t i = 0; i < tensors.size(); ++i) {
      if (const auto earlier = index.by_name_->insert(tensors, i)) {
        return make_error(
            ErrorCode::kDuplicateName,
            "the header has this name twice, which the format forbids, because one of "
            "the two tensors would be lost: save the file again with different names",
            std::max(entries[*earlier].header_at, entries[i].header_at), tensors[i].name);
      }
    }
    return {};
  }

  // The tensors must cover the data from its first byte to its last, without holes or overlaps, and
  // each must be as large as its dtype and shape say.
  static Status check_places(const Index& index, std::span<const Entry> entries,
                             std::uint64_t data_begin, std::uint64_t file_size) {
    std::uint64_t covered = 0;
    for (std::size_t i = 0; i < entries.size(); ++i) {
      const Entry& entry = entries[i];
      const TensorInfo& tensor = index.tensors_[i];
      const auto refuse = [&](ErrorCode code, const std::string& what) {
        return make_error(code, what + "; " + std::string(kDamaged), entry.header_at, tensor.name);
      };
      const auto offsets = [&entry] {
        return "data_offsets [" + std::to_string(entry.begin) + ", " + std::to_string(entry.end) +
               "]";
      };
      if (entry.end < entry.begin) {
        return refuse(ErrorCode::kOffsetsInvalid, offsets() + " end before they begin");
      }
      if (entry.begin != covered) {
        return refuse(ErrorCode::kOffsetsInvalid,
                      offsets() +
                          (entry.begin < covered ? " overlap the bytes before them, which end at "
                                                 : " leave a hole: the bytes before them end at ") +
                          std::to_string(covered));
      }
      const auto bytes = bytes_of(tensor.shape, tensor.dtype);
      if (!bytes.ok()) return refuse(bytes.error().code, bytes.error().message);
      if (*bytes != tensor.bytes) {
        return refuse(ErrorCode::kSizeMismatch,
                      std::string(dtype_name(tensor.dtype)) + " of shape " +
                          shape_text(tensor.shape) + " takes " + bytes_text(*bytes) + ", but " +
                          offsets() + " are " + std::to_string(tensor.bytes));
      }
      covered = entry.end;
    }
    // Every size in bits fits into 64 bits, so this is less than 2^61 past the header.
    const std::uint64_t expected = data_begin + covered;
    const auto sizes = [&] {
      return "the header describes a file of " + bytes_text(expected) + ", but this one has " +
             std::to_string(file_size);
    };
    if (expected > file_size) {
      return make_error(ErrorCode::kDataIncomplete,
                        sizes() + ": the download or the copy is incomplete, so download it again",
                        file_size);
    }
    if (expected < file_size) {
      return make_error(ErrorCode::kTrailingBytes,
                        sizes() +
                            ": bytes were appended, or the header belongs to another file, so "
                            "download it or save it again",
                        expected);
    }
    return {};
  }
};

namespace {

// The parser's offsets count from the start of its part of the file.
template <class T>
Result<T> from_origin(Result<T> result, std::uint64_t origin) {
  if (!result.ok() && result.error().offset) *result.error().offset += origin;
  return result;
}

}  // namespace

Result<std::uint64_t> header_length(std::span<const std::byte> first, std::uint64_t file_size,
                                    const std::string& path, std::uint64_t origin) {
  return guarded(path, [&] {
    return from_origin(length_of(as_text(known(first, file_size)), file_size), origin);
  });
}

Result<std::shared_ptr<const Index>> parse_header(std::span<const std::byte> header,
                                                  std::uint64_t file_size, const std::string& path,
                                                  std::uint64_t origin) {
  return guarded(path, [&] {
    return from_origin(SafetensorsParser::parse(as_text(header), file_size, origin), origin);
  });
}

}  // namespace weightlift::format
