#include "safetensors_file.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <map>
#include <optional>
#include <set>
#include <tuple>
#include <utility>
#include <vector>

#include "format/safetensors.h"

namespace weightlift::fuzz {
namespace {

using IndexResult = Result<std::shared_ptr<const format::Index>>;

struct Kind {
  std::string_view name;
  std::uint64_t bits;
};
constexpr std::array<Kind, 22> kKinds = {{
    {"BOOL", 8},        {"F4", 4},      {"F6_E2M3", 6}, {"F6_E3M2", 6}, {"U8", 8},
    {"I8", 8},          {"F8_E5M2", 8}, {"F8_E4M3", 8}, {"F8_E8M0", 8}, {"F8_E4M3FNUZ", 8},
    {"F8_E5M2FNUZ", 8}, {"I16", 16},    {"U16", 16},    {"F16", 16},    {"BF16", 16},
    {"I32", 32},        {"U32", 32},    {"F32", 32},    {"C64", 64},    {"F64", 64},
    {"I64", 64},        {"U64", 64},
}};

// --- A second implementation: a document, then the rules one after another -----------------------

struct Value {
  enum Type : std::uint8_t { kNull, kBoolean, kWhole, kOtherNumber, kText, kList, kObject };
  Type type = kNull;
  std::uint64_t number = 0;
  std::string text;
  std::vector<std::string> keys;  // of an object, as often as they are there
  std::vector<Value> items;
};

class Document {
 public:
  explicit Document(std::string_view text) : text_(text) {}

  std::optional<Value> read() {
    Value value;
    if (!read_value(value, 0)) return std::nullopt;
    space();
    if (at_ != text_.size()) return std::nullopt;
    return value;
  }

 private:
  [[nodiscard]] bool next(char c) noexcept {
    if (at_ == text_.size() || text_[at_] != c) return false;
    ++at_;
    return true;
  }
  void space() noexcept {
    while (at_ < text_.size() && std::string_view(" \t\r\n").find(text_[at_]) != text_.npos) ++at_;
  }
  [[nodiscard]] bool word(std::string_view wanted) noexcept {
    if (!text_.substr(at_).starts_with(wanted)) return false;
    at_ += wanted.size();
    return true;
  }
  [[nodiscard]] bool digits() noexcept {
    const std::size_t from = at_;
    while (at_ < text_.size() && text_[at_] >= '0' && text_[at_] <= '9') ++at_;
    return at_ > from;
  }

  bool read_value(Value& value, int depth) {
    space();
    if (at_ == text_.size()) return false;
    switch (text_[at_]) {
      case '{':
      case '[':
        return depth < 127 && read_items(value, depth + 1);
      case '"':
        value.type = Value::kText;
        return read_text(value.text);
      case 'n':
        return word("null");
      case 't':
        value.type = Value::kBoolean;
        return word("true");
      case 'f':
        value.type = Value::kBoolean;
        return word("false");
      default:
        return read_number(value);
    }
  }

  bool read_items(Value& value, int depth) {
    const bool object = text_[at_++] == '{';
    value.type = object ? Value::kObject : Value::kList;
    const char end = object ? '}' : ']';
    space();
    if (next(end)) return true;
    do {
      if (object) {
        space();
        if (!read_text(value.keys.emplace_back())) return false;
        space();
        if (!next(':')) return false;
      }
      if (!read_value(value.items.emplace_back(), depth)) return false;
      space();
    } while (next(','));
    return next(end);
  }

  bool read_number(Value& value) {
    const std::size_t from = at_;
    bool whole = !next('-');
    if (!next('0') && !digits()) return false;
    if (next('.')) {
      whole = false;
      if (!digits()) return false;
    }
    if (next('e') || next('E')) {
      whole = false;
      if (!next('+')) (void)next('-');
      if (!digits()) return false;
    }
    const std::string text(text_.substr(from, at_ - from));
    value.type = Value::kOtherNumber;
    if (whole) {
      unsigned __int128 number = 0;
      for (const char digit : text) {
        number = number * 10 + static_cast<unsigned>(digit - '0');
        if (number > ~std::uint64_t{0}) whole = false;
        if (!whole) break;
      }
      if (whole) {
        value.type = Value::kWhole;
        value.number = static_cast<std::uint64_t>(number);
        return true;
      }
    }
    return std::isfinite(std::strtod(text.c_str(), nullptr));
  }

  [[nodiscard]] std::optional<std::uint32_t> read_unit() noexcept {
    std::uint32_t unit = 0;
    for (int i = 0; i < 4; ++i) {
      if (at_ == text_.size()) return std::nullopt;
      const char c = text_[at_++];
      const auto found = std::string_view("0123456789abcdef")
                             .find(c >= 'A' && c <= 'F' ? static_cast<char>(c - 'A' + 'a') : c);
      if (found == std::string_view::npos) return std::nullopt;
      unit = unit << 4 | static_cast<std::uint32_t>(found);
    }
    return unit;
  }

  [[nodiscard]] bool read_escape(std::string& out) {
    constexpr std::string_view kShort = "\"\\/bfnrt";
    constexpr std::string_view kMeant = "\"\\/\b\f\n\r\t";
    if (at_ == text_.size()) return false;
    const char c = text_[at_++];
    if (const auto found = kShort.find(c); found != kShort.npos) {
      out += kMeant[found];
      return true;
    }
    if (c != 'u') return false;
    const auto first = read_unit();
    if (!first) return false;
    std::uint32_t point = *first;
    if (point >= 0xdc00 && point < 0xe000) return false;
    if (point >= 0xd800 && point < 0xdc00) {
      if (!word("\\u")) return false;
      const auto second = read_unit();
      if (!second || *second < 0xdc00 || *second >= 0xe000) return false;
      point = 0x10000 + ((point - 0xd800) << 10) + (*second - 0xdc00);
    }
    const auto put = [&out](std::uint32_t byte) { out += static_cast<char>(byte); };
    if (point < 0x80) {
      put(point);
    } else if (point < 0x800) {
      put(0xc0 | point >> 6);
      put(0x80 | (point & 0x3f));
    } else if (point < 0x10000) {
      put(0xe0 | point >> 12);
      put(0x80 | (point >> 6 & 0x3f));
      put(0x80 | (point & 0x3f));
    } else {
      put(0xf0 | point >> 18);
      put(0x80 | (point >> 12 & 0x3f));
      put(0x80 | (point >> 6 & 0x3f));
      put(0x80 | (point & 0x3f));
    }
    return true;
  }

  bool read_text(std::string& out) {
    if (!next('"')) return false;
    while (at_ < text_.size()) {
      const char c = text_[at_++];
      if (c == '"') return true;
      if (static_cast<unsigned char>(c) < 0x20) return false;
      if (c != '\\') {
        out += c;
      } else if (!read_escape(out)) {
        return false;
      }
    }
    return false;
  }

  std::string_view text_;
  std::size_t at_ = 0;
};

// By decoding: a sequence is valid if it is the encoding of its code point.
bool is_utf8(std::string_view text) {
  constexpr std::array<std::uint32_t, 5> kSmallest = {0, 0, 0x80, 0x800, 0x10000};
  for (std::size_t i = 0; i < text.size();) {
    const auto first = static_cast<unsigned char>(text[i]);
    const auto length = static_cast<std::size_t>(first < 0x80 ? 1 : std::countl_one(first));
    if (length == 1 && first >= 0x80) return false;  // a continuation
    if (length > 4 || length > text.size() - i) return false;
    std::uint32_t point = length == 1 ? first : first & (0x7fu >> length);
    for (std::size_t k = 1; k < length; ++k) {
      const auto byte = static_cast<unsigned char>(text[i + k]);
      if (byte >> 6 != 2) return false;
      point = point << 6 | (byte & 0x3fu);
    }
    if (point < kSmallest[length] || point > 0x10ffff || (point >= 0xd800 && point < 0xe000)) {
      return false;
    }
    i += length;
  }
  return true;
}

struct Tensor {
  std::string name;
  std::string_view dtype;
  std::uint64_t bits = 0;
  std::vector<std::uint64_t> shape;
  std::uint64_t begin = 0;
  std::uint64_t end = 0;

  [[nodiscard]] auto place() const noexcept { return std::tie(begin, end, name); }
};

struct Contents {
  std::vector<Tensor> tensors;
  std::optional<std::map<std::string, std::string>> metadata;
  std::uint64_t data_begin = 0;
};

std::optional<std::vector<std::uint64_t>> whole_numbers(const Value& value) {
  if (value.type != Value::kList) return std::nullopt;
  std::vector<std::uint64_t> numbers;
  for (const Value& item : value.items) {
    if (item.type != Value::kWhole) return std::nullopt;
    numbers.push_back(item.number);
  }
  return numbers;
}

std::optional<Tensor> tensor_of(const std::string& name, const Value& value) {
  std::array<const Value*, 3> fields = {};
  if (value.type == Value::kList) {
    if (value.items.size() != fields.size()) return std::nullopt;
    for (std::size_t i = 0; i < fields.size(); ++i) fields[i] = &value.items[i];
  } else if (value.type == Value::kObject) {
    for (std::size_t i = 0; i < value.keys.size(); ++i) {
      constexpr std::array<std::string_view, 3> kNames = {"dtype", "shape", "data_offsets"};
      const auto found = std::find(kNames.begin(), kNames.end(), value.keys[i]);
      if (found == kNames.end()) continue;
      const Value*& field = fields[static_cast<std::size_t>(found - kNames.begin())];
      if (field != nullptr) return std::nullopt;
      field = &value.items[i];
    }
  }
  if (std::find(fields.begin(), fields.end(), nullptr) != fields.end()) return std::nullopt;

  const Value* const stated = fields[0];
  std::string dtype = stated->text;
  if (stated->type == Value::kObject) {
    if (stated->keys.size() != 1 || stated->items[0].type != Value::kNull) return std::nullopt;
    dtype = stated->keys[0];
  } else if (stated->type != Value::kText) {
    return std::nullopt;
  }
  const auto kind = std::find_if(kKinds.begin(), kKinds.end(),
                                 [&dtype](const Kind& one) { return one.name == dtype; });
  const auto shape = whole_numbers(*fields[1]);
  const auto offsets = whole_numbers(*fields[2]);
  if (kind == kKinds.end() || !shape || !offsets || offsets->size() != 2) return std::nullopt;
  return Tensor{name, kind->name, kind->bits, *shape, (*offsets)[0], (*offsets)[1]};
}

// Its size in bytes, if it is whole and fits into 64 bits.
std::optional<std::uint64_t> bytes_of(const Tensor& tensor) {
  std::uint64_t bits = 1;
  for (const std::uint64_t extent : tensor.shape) {
    if (__builtin_mul_overflow(bits, extent, &bits)) return std::nullopt;
  }
  if (__builtin_mul_overflow(bits, tensor.bits, &bits) || bits % 8 != 0) return std::nullopt;
  return bits / 8;
}

std::optional<Contents> contents_of(std::string_view file) {
  if (file.size() < 8) return std::nullopt;
  const auto length = little_endian<std::uint64_t>(file, 0);
  if (length < 2 || length > 100'000'000 || length > file.size() - 8) return std::nullopt;
  const std::string_view header = file.substr(8, length);
  if (!is_utf8(header) || header.find('\0') != header.npos) return std::nullopt;
  const auto document = Document(header).read();
  if (!document || document->type != Value::kObject) return std::nullopt;

  Contents contents;
  contents.data_begin = 8 + length;
  std::set<std::string> names;
  for (std::size_t i = 0; i < document->keys.size(); ++i) {
    const std::string& name = document->keys[i];
    const Value& value = document->items[i];
    if (!names.insert(name).second) return std::nullopt;
    if (name == "__metadata__") {
      if (value.type == Value::kNull) continue;
      if (value.type != Value::kObject) return std::nullopt;
      contents.metadata.emplace();
      for (std::size_t k = 0; k < value.keys.size(); ++k) {
        if (value.items[k].type != Value::kText) return std::nullopt;
        (*contents.metadata)[value.keys[k]] = value.items[k].text;
      }
      continue;
    }
    auto tensor = tensor_of(name, value);
    if (!tensor) return std::nullopt;
    contents.tensors.push_back(*std::move(tensor));
  }
  std::sort(contents.tensors.begin(), contents.tensors.end(),
            [](const Tensor& left, const Tensor& right) { return left.place() < right.place(); });
  std::uint64_t covered = 0;
  for (const Tensor& tensor : contents.tensors) {
    const auto bytes = bytes_of(tensor);
    if (tensor.begin != covered || tensor.end < tensor.begin || !bytes ||
        *bytes != tensor.end - tensor.begin) {
      return std::nullopt;
    }
    covered = tensor.end;
  }
  if (covered != file.size() - contents.data_begin) return std::nullopt;
  return contents;
}

// --- What must hold ------------------------------------------------------------------------------

void require_same(const format::Index& index, const Contents& contents) {
  WL_REQUIRE(index.data_begin() == contents.data_begin);
  WL_REQUIRE(index.tensors().size() == contents.tensors.size());
  for (std::uint32_t i = 0; i < contents.tensors.size(); ++i) {
    const format::TensorInfo& ours = index.tensors()[i];
    const Tensor& theirs = contents.tensors[i];
    WL_REQUIRE(ours.name == theirs.name);
    WL_REQUIRE(dtype_name(ours.dtype) == theirs.dtype);
    WL_REQUIRE(
        std::equal(ours.shape.begin(), ours.shape.end(), theirs.shape.begin(), theirs.shape.end()));
    WL_REQUIRE(ours.begin == contents.data_begin + theirs.begin);
    WL_REQUIRE(ours.bytes == theirs.end - theirs.begin);
    WL_REQUIRE(index.find(ours.name) == i);
  }
  WL_REQUIRE(!index.find("no tensor has this name"));
  WL_REQUIRE((index.metadata() != nullptr) == contents.metadata.has_value());
  if (index.metadata() != nullptr) {
    const auto& pairs = *index.metadata();
    WL_REQUIRE(pairs.size() == contents.metadata->size());
    WL_REQUIRE(
        (std::map<std::string, std::string>(pairs.begin(), pairs.end()) == *contents.metadata));
  }
}

std::string quoted(std::string_view text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') out += '\\';
    if (static_cast<unsigned char>(c) < 0x20) {
      std::array<char, 8> escape = {};
      std::snprintf(escape.data(), escape.size(), "\\u%04x", static_cast<unsigned>(c));
      out += escape.data();
    } else {
      out += c;
    }
  }
  return out + '"';
}

std::string with_length(const std::string& header, std::string_view data) {
  std::string file;
  append(file, std::uint64_t{header.size()});
  return file + header + std::string(data);
}

// The simplest file of the same tensors.
std::string written_again(const format::Index& index, std::string_view file) {
  std::string header = "{";
  const auto add = [&header](std::string_view key, const std::string& value) {
    header += (header.size() > 1 ? "," : "") + quoted(key) + ":" + value;
  };
  if (index.metadata() != nullptr) {
    std::string pairs;
    for (const auto& [key, value] : *index.metadata()) {
      pairs += (pairs.empty() ? "" : ",") + quoted(key) + ":" + quoted(value);
    }
    add("__metadata__", "{" + pairs + "}");
  }
  for (const format::TensorInfo& tensor : index.tensors()) {
    std::string shape;
    for (const std::uint64_t extent : tensor.shape) {
      shape += (shape.empty() ? "" : ",") + std::to_string(extent);
    }
    const std::uint64_t begin = tensor.begin - index.data_begin();
    add(tensor.name, "{\"dtype\":" + quoted(dtype_name(tensor.dtype)) + ",\"shape\":[" + shape +
                         "],\"data_offsets\":[" + std::to_string(begin) + "," +
                         std::to_string(begin + tensor.bytes) + "]}");
  }
  return with_length(header + "}", file.substr(index.data_begin()));
}

}  // namespace

IndexResult parse_safetensors(std::string_view file, std::uint64_t origin) {
  // Copies of their exact size, so that the address sanitizer sees every read outside of them.
  const auto copy = [file](std::size_t at, std::size_t count) {
    const auto part = as_bytes(file.substr(at, count));
    return std::vector<std::byte>(part.begin(), part.end());
  };
  const std::vector<std::byte> first = copy(0, 512);
  const auto length = format::header_length(first, file.size(), "f", origin);
  if (!length.ok()) return length.error();
  WL_REQUIRE(*length <= file.size() - format::kLengthBytes);
  return format::parse_header(copy(format::kLengthBytes, *length), file.size(), "f", origin);
}

void check_safetensors(std::string_view file) {
  const IndexResult index = parse_safetensors(file);
  const auto contents = contents_of(file);
  if (!index.ok()) {
    const Error& error = index.error();
    WL_REQUIRE(error_kind(error.code) == ErrorKind::kFormat);
    WL_REQUIRE(error.path == "f");
    WL_REQUIRE(!error.message.empty() && error.message.size() < 1000);
    WL_REQUIRE(is_utf8(error.message) && is_utf8(error.tensor));
    WL_REQUIRE(!error.offset || *error.offset <= file.size());
  }
  WL_REQUIRE(index.ok() == contents.has_value());
  if (!index.ok()) return;
  require_same(**index, *contents);

  const std::string again = written_again(**index, file);
  const IndexResult second = parse_safetensors(again);
  WL_REQUIRE(second.ok());
  Contents moved = *contents;
  moved.data_begin = again.size() - (file.size() - contents->data_begin);
  require_same(**second, moved);
}

// --- Mutations -----------------------------------------------------------------------------------

namespace {

constexpr auto kNames = std::to_array<std::string_view>(
    {R"("a")", R"("b")", R"("c")", R"("")", R"("\u0061")", R"("\ud83d\ude00")", "\"\u00e9\"",
     R"("a.b")", R"("\"\\\/\b\f\n\r\t")", R"("../x")", R"("__metadata__")", R"("d")", R"("e")",
     R"("f")", R"("g")", R"("h")"});

constexpr auto kTokens =
    std::to_array<std::string_view>({"{",
                                     "}",
                                     "[",
                                     "]",
                                     ",",
                                     ":",
                                     "null",
                                     "true",
                                     "false",
                                     R"("dtype")",
                                     R"("shape")",
                                     R"("data_offsets")",
                                     R"("__metadata__")",
                                     R"("F32")",
                                     R"("F4")",
                                     R"("F6_E2M3")",
                                     R"("BOOL")",
                                     R"({"F32":null})",
                                     R"("\ud800")",
                                     R"("\udc00")",
                                     R"("\u0000")",
                                     R"("\x")",
                                     "-0",
                                     "-1",
                                     "0.0",
                                     "1e0",
                                     "1e400",
                                     "01",
                                     "18446744073709551615",
                                     "18446744073709551616",
                                     "9223372036854775808",
                                     "4611686018427387906",
                                     "4294967296",
                                     " ",
                                     "\n",
                                     "\t",
                                     "\xef\xbb\xbf",
                                     "\xff",
                                     "\xed\xa0\x80",
                                     "\xc3\xa9",
                                     "/**/",
                                     "NaN",
                                     "[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[",
                                     "]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]",
                                     R"({"dtype":"F32","shape":[1],"data_offsets":[0,4]})",
                                     R"("x":{"y":[1,{"z":null}]},)"});

std::string written(Random& random) {
  std::vector<std::string> members;
  std::uint64_t covered = 0;
  const std::size_t count = random.below(6);
  for (std::size_t i = 0; i < count; ++i) {
    const Kind& kind = random.of(kKinds);
    std::string shape;
    std::uint64_t elements = 1;
    for (std::size_t rank = random.below(4); rank-- > 0;) {
      const std::uint64_t extent = random.below(4);
      elements *= extent;
      shape += (shape.empty() ? "" : ",") + std::to_string(extent);
    }
    if (elements * kind.bits % 8 != 0) {
      shape += std::string(shape.empty() ? "" : ",") + "4";
      elements *= 4;
    }
    const std::uint64_t end = covered + elements * kind.bits / 8;
    const std::string dtype = random.one_in(16) ? "{\"" + std::string(kind.name) + "\":null}"
                                                : "\"" + std::string(kind.name) + "\"";
    const std::string offsets = "[" + std::to_string(covered) + "," + std::to_string(end) + "]";
    covered = end;
    std::string member(random.of(kNames));
    member += ':';
    if (random.one_in(16)) {
      members.push_back(member + "[" + dtype + ",[" + shape + "]," + offsets + "]");
      continue;
    }
    std::vector<std::string> fields = {"\"dtype\":" + dtype, "\"shape\":[" + shape + "]",
                                       "\"data_offsets\":" + offsets};
    if (random.one_in(8)) fields.push_back("\"x\":" + std::string(random.of(kTokens)));
    std::swap(fields[random.below(fields.size())], fields[random.below(fields.size())]);
    member += '{';
    for (std::size_t k = 0; k < fields.size(); ++k) member += (k > 0 ? "," : "") + fields[k];
    members.push_back(member + '}');
  }
  if (random.one_in(4)) members.emplace_back(R"("__metadata__":{"k":"v","\u006b":"w"})");
  std::string header = "{";
  for (std::size_t i = members.size(); i > 0; --i) {
    std::swap(members[i - 1], members[random.below(i)]);
    header += (header.size() > 1 ? "," : "") + members[i - 1];
  }
  header += '}';
  if (random.one_in(4)) header.append(random.below(8), ' ');
  return with_length(header, std::string(covered, 'x'));
}

std::vector<std::string> tokens_of(std::string_view header) {
  std::vector<std::string> tokens;
  for (std::size_t at = 0; at < header.size();) {
    std::size_t end = at + 1;
    if (header[at] == '"') {
      while (end < header.size() && header[end] != '"') end += header[end] == '\\' ? 2 : 1;
      end = std::min(end + 1, header.size());
    } else if (std::string_view("{}[],:").find(header[at]) == std::string_view::npos) {
      end = std::min(header.find_first_of("{}[],:\"", at), header.size());
    }
    tokens.emplace_back(header.substr(at, end - at));
    at = end;
  }
  return tokens;
}

void mutate_tokens(std::string& header, Random& random) {
  std::vector<std::string> tokens = tokens_of(header);
  for (std::size_t times = 1 + random.below(3); times-- > 0 && !tokens.empty();) {
    const std::size_t i = random.below(tokens.size());
    const auto place = tokens.begin() + static_cast<std::ptrdiff_t>(i);
    switch (random.below(6)) {
      case 0:
        tokens.erase(place);
        break;
      case 1:
        tokens.insert(place, tokens[random.below(tokens.size())]);
        break;
      case 2:
        std::swap(tokens[i], random.of(tokens));
        break;
      case 3:
        tokens.insert(place, std::string(random.of(kTokens)));
        break;
      case 4:
        tokens[i] = random.one_in(2) ? random.of(kNames) : random.of(kTokens);
        break;
      default: {
        // A number, if there is one from here on.
        const auto number = std::find_if(place, tokens.end(), [](const std::string& token) {
          return token.find_first_not_of("0123456789") == token.npos;
        });
        if (number != tokens.end()) {
          *number = std::to_string(random.other(std::strtoull(number->c_str(), nullptr, 10)));
        }
      }
    }
  }
  header.clear();
  for (const std::string& token : tokens) header += token;
}

}  // namespace

std::string mutate_safetensors(std::string_view file, Random& random) {
  if (file.size() < 8 || random.one_in(32)) return written(random);
  const std::uint64_t length =
      std::min<std::uint64_t>(little_endian<std::uint64_t>(file, 0), file.size() - 8);
  std::string header(file.substr(8, length));
  std::string data(file.substr(8 + length));
  switch (random.below(8)) {
    case 0:
      mutate_bytes(header);
      break;
    case 1:
      data.resize(random.below(data.size() + 9), 'y');
      break;
    case 2: {
      std::string whole(file);
      const std::uint64_t other = random.other(length);
      std::memcpy(whole.data(), &other, sizeof other);
      return whole;
    }
    case 3: {
      std::string whole(file);
      mutate_bytes(whole);
      return whole;
    }
    default:
      mutate_tokens(header, random);
  }
  return with_length(header, data);
}

}  // namespace weightlift::fuzz
