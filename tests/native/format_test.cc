#include <gtest/gtest.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "dtype.h"
#include "format/index.h"
#include "format/safetensors.h"
#include "result.h"

// What is accepted and refused is held against the reference itself by
// tests/python/test_malformed.py; here are the codes, the places and the Index.

namespace weightlift::format {
namespace {

using std::string_literals::operator""s;
using IndexResult = Result<std::shared_ptr<const Index>>;

constexpr std::string_view kPath = "a/model.safetensors";
constexpr std::string_view kEntry = R"({"dtype":"F32","shape":[1],"data_offsets":[0,4]})";

// Not operator+: for a literal and a string that is about to die, GCC 12 warns of an overlap that
// cannot be (GCC bug 105651).
template <class... Parts>
std::string join(const Parts&... parts) {
  std::string text;
  (text.append(std::string_view(parts)), ...);
  return text;
}

std::string length_prefix(std::uint64_t length) {
  std::string prefix;
  for (int i = 0; i < 8; ++i) {
    prefix.push_back(static_cast<char>(length >> (8 * i) & 0xff));
  }
  return prefix;
}

std::string file_of(std::string_view header, std::size_t data_bytes) {
  return length_prefix(header.size()) + std::string(header) + std::string(data_bytes, '\0');
}

// As a reader of files does it. Both pieces are copied into vectors of their exact size, so that
// the address sanitizer sees every read outside of them.
IndexResult parse_file(std::string_view file, std::optional<std::uint64_t> size = std::nullopt) {
  const auto copy = [file](std::size_t from, std::size_t count) {
    const auto bytes = std::as_bytes(std::span(file)).subspan(from, count);
    return std::vector<std::byte>(bytes.begin(), bytes.end());
  };
  const std::uint64_t file_size = size.value_or(file.size());
  const auto first = copy(0, std::min<std::size_t>(file.size(), 512));
  WL_ASSIGN_OR_RETURN(const std::uint64_t length,
                      header_length(first, file_size, std::string(kPath)));
  return parse_header(copy(kLengthBytes, static_cast<std::size_t>(length)), file_size,
                      std::string(kPath));
}

IndexResult parse(std::string_view header, std::size_t data_bytes = 4) {
  return parse_file(file_of(header, data_bytes));
}

Error error_of(const IndexResult& result) {
  EXPECT_FALSE(result.ok());
  if (result.ok()) return {};
  EXPECT_EQ(result.error().path, kPath);
  EXPECT_FALSE(result.error().message.empty());
  EXPECT_EQ(error_kind(result.error().code), ErrorKind::kFormat);
  return result.error();
}

void expect_code(const IndexResult& result, ErrorCode code, std::string_view in_message = "") {
  const Error error = error_of(result);
  EXPECT_EQ(error_name(error.code), error_name(code)) << error.describe();
  EXPECT_NE(error.message.find(in_message), std::string::npos) << error.describe();
}

void expect_ok(const IndexResult& result) {
  EXPECT_TRUE(result.ok()) << result.error().describe();
}

// The header of one tensor "a" of four bytes, one of its fields replaced.
std::string with_field(std::string_view field, std::string_view value) {
  const auto pick = [&](std::string_view name, std::string_view otherwise) {
    return join("\"", name, "\":", field == name ? value : otherwise);
  };
  return join(R"({"a":{)", pick("dtype", R"("F32")"), ",", pick("shape", "[1]"), ",",
              pick("data_offsets", "[0,4]"), "}}");
}

std::string with_extra(std::string_view value) {
  return join(R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"extra":)", value, "}}");
}

std::string nested(std::size_t depth) {
  return std::string(depth, '[') + std::string(depth, ']');
}

TEST(FormatFileStart, EmptyFile) {
  expect_code(parse_file(""), ErrorCode::kEmptyFile);
}

TEST(FormatFileStart, GitLfsPointer) {
  expect_code(parse_file("version https://git-lfs.github.com/spec/v1\n"
                         "oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1\nsize 12345\n"),
              ErrorCode::kGitLfsPointer, "git lfs pull");
}

TEST(FormatFileStart, WebPage) {
  for (const std::string_view page :
       {"<!DOCTYPE html><html>", "<!doctype HTML>", "\r\n\t <HTML lang=en>", "<html>",
        "\xef\xbb\xbf<?xml version=\"1.0\"?><Error>"}) {
    expect_code(parse_file(page), ErrorCode::kNotWeights, "web page");
  }
}

TEST(FormatFileStart, Zip) {
  expect_code(parse_file("PK\x03\x04\x00\x00\x08\x08\x00\x00\x00\x00"s), ErrorCode::kNotWeights,
              "rename");
}

TEST(FormatFileStart, LooksLikeAZipButIsAHeader) {
  // "PK\3\4" read as a length is 67,324,752: legal, so the header decides.
  std::string file = "PK\x03\x04\x00\x00\x00\x00{}"s;
  file.resize(8 + 0x04034b50, ' ');
  expect_ok(parse_file(file));
}

TEST(FormatFileStart, HeaderTooSmall) {
  expect_code(parse_file("1234567"), ErrorCode::kHeaderTooSmall, "7 bytes");
  expect_code(parse_file(length_prefix(0)), ErrorCode::kHeaderTooSmall);
  expect_code(parse("{"), ErrorCode::kHeaderTooSmall);
}

TEST(FormatFileStart, HeaderTooLarge) {
  const auto length = [](std::uint64_t stated) {
    const std::string first = length_prefix(stated);
    return header_length(std::as_bytes(std::span(first)), std::uint64_t{1} << 40, "p");
  };
  ASSERT_TRUE(length(kMaxHeaderBytes).ok());
  EXPECT_EQ(*length(kMaxHeaderBytes), kMaxHeaderBytes);
  for (const std::uint64_t stated :
       {kMaxHeaderBytes + 1, std::numeric_limits<std::uint64_t>::max()}) {
    ASSERT_FALSE(length(stated).ok());
    EXPECT_EQ(length(stated).error().code, ErrorCode::kHeaderTooLarge);
    EXPECT_EQ(length(stated).error().path, "p");
    EXPECT_EQ(length(stated).error().offset, 0u);
  }
}

TEST(FormatFileStart, HeaderPastEnd) {
  expect_code(parse_file(length_prefix(3) + "{}"), ErrorCode::kHeaderPastEnd, "10 bytes");
  expect_code(parse_file(length_prefix(2)), ErrorCode::kHeaderPastEnd);
  // A caller whose file does not hold the header that it gives.
  const std::string header = "{}";
  expect_code(parse_header(std::as_bytes(std::span(header)), 9, std::string(kPath)),
              ErrorCode::kHeaderPastEnd);
}

TEST(FormatHeader, NotUtf8) {
  for (const std::string_view bad :
       {"\xff", "\xc3", "\xc0\x80", "\xe0\x80\x80", "\xed\xa0\x80", "\xf0\x80\x80\x80",
        "\xf4\x90\x80\x80", "\xf8\x88\x80\x80\x80", "\xe2\x82", "\x80"}) {
    const IndexResult result = parse(join(R"({")", bad, R"(":)", kEntry, "}"));
    expect_code(result, ErrorCode::kHeaderNotUtf8);
    EXPECT_EQ(error_of(result).offset, 10u);
  }
  // Cut at the end of the header, wherever the eight-byte steps end.
  for (std::size_t before = 0; before < 20; ++before) {
    const IndexResult result = parse(join("{}", std::string(before, ' '), "\xf0\x9f\x98"));
    expect_code(result, ErrorCode::kHeaderNotUtf8);
    EXPECT_EQ(error_of(result).offset, 10 + before);
  }
}

TEST(FormatHeader, NotJson) {
  for (const std::string_view header :
       {"  ", "{]", "{}{}", "{} x", "{\"__metadata__\":{},}", "{\"__metadata__\" {}}", "{'a':1}",
        "{a:1}", "// c\n{}", "nul"}) {
    expect_code(parse(header), ErrorCode::kHeaderNotJson);
  }
  for (const std::string_view value :
       {"01", "+1", ".5", "1.", "1e", "NaN", "Infinity", "-", "tru", "1e400", "\"\\x\"",
        "\"\\u12\"", "\"\\ud800\"", "\"\\udc00\"", "\"\\ud800\\ud800\"", "\"a\nb\"", "/**/1"}) {
    expect_code(parse(with_extra(value)), ErrorCode::kHeaderNotJson);
  }
}

TEST(FormatHeader, NotJsonSaysWhere) {
  EXPECT_EQ(error_of(parse(R"({"a":x})")).offset, 8u + 5u);
  EXPECT_EQ(error_of(parse(R"({"a":)")).offset, 8u + 5u);  // its end
  const std::string deep_inside = join("{", std::string(1000, '\n'), "!}");
  EXPECT_EQ(error_of(parse(deep_inside)).offset, 8u + 1001u);
}

TEST(FormatHeader, ByteOrderMarkAndNulAreNotJson) {
  expect_code(parse("\xef\xbb\xbf{}", 0), ErrorCode::kHeaderNotJson, "byte order mark");
  const IndexResult after = parse("{}\0\0"s, 0);
  expect_code(after, ErrorCode::kHeaderNotJson, "NUL");
  EXPECT_EQ(error_of(after).offset, 10u);
  expect_code(parse("\0{}"s, 0), ErrorCode::kHeaderNotJson, "NUL");
  expect_code(parse("{\"\0\":1}"s, 0), ErrorCode::kHeaderNotJson, "NUL");
}

TEST(FormatHeader, LongTextsAreCutInMessages) {
  const std::string name(1 << 20, 'n');
  const Error error = error_of(parse(with_field("dtype", join("\"", name, "\""))));
  EXPECT_EQ(error.code, ErrorCode::kUnknownDtype);
  EXPECT_LT(error.message.size(), 400u);
  const Error digits = error_of(parse(with_extra(std::string(1 << 20, '9'))));
  EXPECT_EQ(digits.code, ErrorCode::kHeaderNotJson);
  EXPECT_LT(digits.message.size(), 400u);
  // Cut between two characters: 79 bytes and then a character of two.
  const std::string odd = join(std::string(79, 'n'), "\xc3\xa9", "more");
  EXPECT_NE(error_of(parse(with_field("dtype", join("\"", odd, "\"")))).message.find("n...'"),
            std::string::npos);
}

TEST(FormatHeader, TooDeep) {
  expect_ok(parse(with_extra(nested(125))));  // in the header and in the tensor: 127
  expect_code(parse(with_extra(nested(126))), ErrorCode::kHeaderTooDeep);
  expect_code(parse(with_extra(nested(1'000'000))), ErrorCode::kHeaderTooDeep);
}

TEST(FormatHeader, NotObject) {
  for (const std::string_view header :
       {"[]", "null", "17", "\"{}\"", "true", "-1", "1.5", "[{}]"}) {
    expect_code(parse(header), ErrorCode::kHeaderNotObject);
  }
}

TEST(FormatHeader, MetadataInvalid) {
  for (const std::string_view metadata :
       {"[]", "1", "\"text\"", R"({"k":1})", R"({"k":null})", R"({"k":{}})", R"({"k":["v"]})"}) {
    expect_code(parse(join(R"({"__metadata__":)", metadata, "}"), 0), ErrorCode::kMetadataInvalid);
  }
  expect_code(parse(R"({"__metadata__":{},"__metadata__":{}})", 0), ErrorCode::kMetadataInvalid,
              "twice");
  expect_code(parse(R"({"__metadata__":null,"__metadata__":{}})", 0), ErrorCode::kMetadataInvalid);
}

TEST(FormatTensor, Invalid) {
  for (const std::string_view entry :
       {"null", "1", "\"F32\"", "{}", "[]", R"(["F32",[1]])", R"(["F32",[1],[0,4],null])",
        R"({"dtype":"F32","shape":[1]})", R"({"dtype":"F32","data_offsets":[0,4]})",
        R"({"shape":[1],"data_offsets":[0,4]})",
        R"({"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]})",
        R"({"dtype":"F32","shape":[1],"shape":[1],"data_offsets":[0,4]})",
        R"({"dtype":"F32","shape":[1],"data_offsets":[0,4],"data_offsets":[0,4]})"}) {
    const IndexResult result = parse(join(R"({"a":)", entry, "}"));
    expect_code(result, ErrorCode::kTensorInvalid);
    EXPECT_EQ(error_of(result).tensor, "a");
    EXPECT_TRUE(error_of(result).offset.has_value());
  }
}

TEST(FormatTensor, FieldOfTheWrongKind) {
  for (const std::string_view number :
       {"-1", "-0", "1.0", "1e0", "18446744073709551616", "\"1\"", "null", "true", "[1]", "{}"}) {
    expect_code(parse(with_field("shape", join("[", number, "]"))), ErrorCode::kTensorInvalid,
                "in shape");
    expect_code(parse(with_field("data_offsets", join("[0,", number, "]"))),
                ErrorCode::kTensorInvalid, "in data_offsets");
  }
  for (const std::string_view value : {"null", "1", "\"1\"", "{}", "false", "1.5"}) {
    expect_code(parse(with_field("shape", value)), ErrorCode::kTensorInvalid);
    expect_code(parse(with_field("data_offsets", value)), ErrorCode::kTensorInvalid);
  }
  for (const std::string_view value : {"[]", "[0]", "[0,4,4]", "[0,4,4,4]"}) {
    expect_code(parse(with_field("data_offsets", value)), ErrorCode::kTensorInvalid, "two");
  }
  for (const std::string_view value :
       {"null", "13", "[\"F32\"]", "{}", R"({"F32":{}})", R"({"F32":[]})", R"({"F32":1})",
        R"({"F32":null,"F32":null})"}) {
    expect_code(parse(with_field("dtype", value)), ErrorCode::kTensorInvalid, "dtype");
  }
}

TEST(FormatTensor, DuplicateName) {
  const std::string entry(kEntry);
  const IndexResult same = parse(join(R"({"a":)", entry, R"(,"a":)", entry, "}"));
  expect_code(same, ErrorCode::kDuplicateName);
  EXPECT_EQ(error_of(same).tensor, "a");
  EXPECT_EQ(error_of(same).offset,
            8 + std::strlen(R"({"a":)") + entry.size() + std::strlen(R"(,"a")"));
  // Two that would both fit, the second written with an escape.
  expect_code(parse(join(R"({"a":)", entry,
                         R"(,"\u0061":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}})"),
                    8),
              ErrorCode::kDuplicateName);
}

TEST(FormatTensor, UnknownDtype) {
  for (const std::string_view name : {"F128", "f32", "", "F32 ", "C32", "C128"}) {
    const IndexResult result = parse(with_field("dtype", join("\"", name, "\"")));
    expect_code(result, ErrorCode::kUnknownDtype, join("'", name, "'"));
    EXPECT_EQ(error_of(result).tensor, "a");
  }
}

TEST(FormatTensor, ShapeOverflow) {
  for (const std::string_view shape :
       {"[9223372036854775808,4,0]", "[4294967296,4294967296]", "[18446744073709551615]",
        "[4611686018427387906]", "[576460752303423488]"}) {
    expect_code(parse(with_field("shape", shape)), ErrorCode::kShapeOverflow);
  }
  expect_ok(
      parse(R"({"a":{"dtype":"F32","shape":[0,9223372036854775808,4],"data_offsets":[0,0]}})", 0));
}

TEST(FormatTensor, SubByteMisaligned) {
  const auto header = [](std::string_view dtype, int count, int bytes) {
    return join(R"({"a":{"dtype":")", dtype, R"(","shape":[)", std::to_string(count),
                R"(],"data_offsets":[0,)", std::to_string(bytes), "]}}");
  };
  expect_code(parse(header("F4", 7, 4)), ErrorCode::kSubByteMisaligned, "28 bits");
  expect_code(parse(header("F6_E2M3", 5, 4)), ErrorCode::kSubByteMisaligned);
  expect_ok(parse(header("F4", 8, 4)));
  expect_ok(parse(header("F6_E3M2", 4, 3), 3));
}

TEST(FormatTensor, SizeMismatch) {
  const IndexResult result = parse(with_field("shape", "[2,3]"));
  expect_code(result, ErrorCode::kSizeMismatch, "F32 of shape [2, 3] takes 24 bytes");
  EXPECT_EQ(error_of(result).tensor, "a");
  expect_code(parse(with_field("data_offsets", "[0,18446744073709551615]")),
              ErrorCode::kSizeMismatch);
}

TEST(FormatTensor, OffsetsInvalid) {
  for (const std::string_view offsets :
       {"[1,5]", "[4,0]", "[18446744073709551615,18446744073709551615]", "[5,1]"}) {
    expect_code(parse(with_field("data_offsets", offsets)), ErrorCode::kOffsetsInvalid);
  }
  const auto two = [](std::string_view offsets) {
    return join(R"({"a":)", kEntry, R"(,"b":{"dtype":"F32","shape":[1],"data_offsets":)", offsets,
                "}}");
  };
  expect_code(parse(two("[2,6]"), 6), ErrorCode::kOffsetsInvalid, "overlap");
  expect_code(parse(two("[8,12]"), 12), ErrorCode::kOffsetsInvalid, "hole");
  EXPECT_EQ(error_of(parse(two("[8,12]"), 12)).tensor, "b");
  expect_ok(parse(two("[4,8]"), 8));
}

TEST(FormatFileEnd, DataIncompleteAndTrailingBytes) {
  const std::string header = with_field("", "");
  for (std::size_t data = 0; data < 9; ++data) {
    const IndexResult result = parse(header, data);
    if (data < 4) {
      expect_code(result, ErrorCode::kDataIncomplete);
      EXPECT_EQ(error_of(result).offset, 8 + header.size() + data);
    } else if (data > 4) {
      expect_code(result, ErrorCode::kTrailingBytes);
      EXPECT_EQ(error_of(result).offset, 8 + header.size() + 4);
    } else {
      expect_ok(result);
    }
  }
  expect_code(parse("{}", 1), ErrorCode::kTrailingBytes);
  expect_code(parse(R"({"a":{"dtype":"U8","shape":[2305843009213693951],)"
                    R"("data_offsets":[0,2305843009213693951]}})"),
              ErrorCode::kDataIncomplete);
}

TEST(FormatAccepted, NoTensors) {
  for (const std::string_view header :
       {"{}", " {} ", "\r\n\t {\n}\t\r\n ", R"({"__metadata__":{}})"}) {
    const IndexResult result = parse(header, 0);
    ASSERT_TRUE(result.ok()) << result.error().describe();
    EXPECT_TRUE((*result)->tensors().empty());
    EXPECT_EQ((*result)->data_begin(), 8 + header.size());
    EXPECT_FALSE((*result)->find("").has_value());
  }
}

TEST(FormatAccepted, Metadata) {
  const auto metadata = [](std::string_view value) {
    return *parse(join(R"({"__metadata__":)", value, "}"), 0);
  };
  EXPECT_EQ((*parse("{}", 0))->metadata(), nullptr);
  EXPECT_EQ(metadata("null")->metadata(), nullptr);
  EXPECT_TRUE(metadata("{}")->metadata()->empty());
  const auto index = metadata(R"({"b":"1","a":"\u00e9","b":"2","":"\n"})");
  using Pairs = std::vector<std::pair<std::string, std::string>>;
  EXPECT_EQ(*index->metadata(), (Pairs{{"b", "2"}, {"a", "\xc3\xa9"}, {"", "\n"}}));
  // Its key may be written with escapes, as any other.
  const IndexResult escaped = parse(R"({"\u005f_metadata__":{"k":"v"}})", 0);
  ASSERT_TRUE(escaped.ok());
  ASSERT_NE((*escaped)->metadata(), nullptr);
}

TEST(FormatAccepted, FieldsThatAreNotKnown) {
  for (const std::string_view value :
       {"1", "-1.5e3", "null", "true", "\"dtype\"", "[]", "{}", R"([1,{"dtype":[2,{}]},"x"])",
        R"({"dtype":1,"dtype":2})", "18446744073709551616", "1e308", "-0", "\"\\ud83d\\ude00\"",
        "\"\\u0000\\/\""}) {
    expect_ok(parse(with_extra(value)));
  }
  expect_ok(parse(R"({"a":{"x":[{}],"dtype":"F32","y":{"z":[]},"shape":[1],"x":1,)"
                  R"("data_offsets":[0,4]}})"));
}

TEST(FormatAccepted, TensorAsAListAndDtypeAsAnObject) {
  for (const std::string_view header :
       {R"({"a":["F32",[2],[0,8]]})", R"({"a":[{"F32":null},[2],[0,8]]})",
        R"({"a":{"dtype":{"F32":null},"shape":[2],"data_offsets":[0,8]}})"}) {
    const IndexResult result = parse(header, 8);
    ASSERT_TRUE(result.ok()) << result.error().describe();
    ASSERT_EQ((*result)->tensors().size(), 1u);
    const TensorInfo& tensor = (*result)->tensors()[0];
    EXPECT_EQ(tensor.dtype, Dtype::kF32);
    EXPECT_EQ(tensor.bytes, 8u);
    EXPECT_EQ(std::vector(tensor.shape.begin(), tensor.shape.end()), std::vector<std::uint64_t>{2});
  }
  // The form of one tensor says nothing about the next.
  expect_ok(parse(R"({"a":["F32",[1],[0,4]],"b":{"dtype":"F32","shape":[1],"data_offsets":[4,8]},)"
                  R"("c":["F32",[1],[8,12]]})",
                  12));
}

TEST(FormatAccepted, AnyName) {
  const IndexResult result = parse(R"({"":["U8",[1],[0,1]],"\u0000":["U8",[1],[1,2]],)"
                                   R"("../x":["U8",[1],[2,3]],"\ud83d\ude00":["U8",[1],[3,4]],)"
                                   R"("a\"\\\n":["U8",[1],[4,5]]})",
                                   5);
  ASSERT_TRUE(result.ok()) << result.error().describe();
  const std::array names = {""s, "\0"s, "../x"s, "\xf0\x9f\x98\x80"s, "a\"\\\n"s};
  ASSERT_EQ((*result)->tensors().size(), names.size());
  for (std::uint32_t i = 0; i < names.size(); ++i) {
    EXPECT_EQ((*result)->tensors()[i].name, names[i]);
    EXPECT_EQ((*result)->find(names[i]), i);
  }
}

TEST(FormatAccepted, RankOfAThousand) {
  std::string shape = "[1";
  for (int i = 1; i < 1000; ++i) shape += ",1";
  const IndexResult result = parse(with_field("shape", shape + "]"));
  ASSERT_TRUE(result.ok()) << result.error().describe();
  EXPECT_EQ((*result)->tensors()[0].shape.size(), 1000u);
}

TEST(FormatIndex, EveryDtype) {
  for (std::size_t i = 0; i < kDtypeCount; ++i) {
    const auto dtype = static_cast<Dtype>(i);
    const std::size_t bytes = 8 * dtype_bits(dtype) / 8;
    const IndexResult result =
        parse(join(R"({"a":{"dtype":")", std::string(dtype_name(dtype)),
                   R"(","shape":[2,4],"data_offsets":[0,)", std::to_string(bytes), "]}}"),
              bytes);
    if (i >= kSafetensorsDtypeCount) {
      expect_code(result, ErrorCode::kUnknownDtype);
      continue;
    }
    ASSERT_TRUE(result.ok()) << result.error().describe();
    EXPECT_EQ((*result)->tensors()[0].dtype, dtype);
    EXPECT_EQ((*result)->tensors()[0].bytes, bytes);
  }
}

TEST(FormatIndex, InTheOrderOfTheBytesThenOfTheNames) {
  const std::string header =
      R"({"z":["U8",[2],[3,5]],"n2":["U8",[0],[3,3]],"scalar":["U8",[],[2,3]],)"
      R"("n1":["F32",[4,0],[3,3]],"last":["U8",[0],[5,5]],"first":["U8",[0],[0,0]],)"
      R"("a":["BF16",[1],[0,2]]})";
  const IndexResult result = parse(header, 5);
  ASSERT_TRUE(result.ok()) << result.error().describe();
  const Index& index = **result;
  std::vector<std::string_view> names;
  std::uint64_t at = index.data_begin();
  EXPECT_EQ(at, 8 + header.size());
  for (const TensorInfo& tensor : index.tensors()) {
    names.push_back(tensor.name);
    EXPECT_EQ(tensor.begin, at);
    at += tensor.bytes;
  }
  EXPECT_EQ(names,
            (std::vector<std::string_view>{"first", "a", "scalar", "n1", "n2", "z", "last"}));
  for (std::uint32_t i = 0; i < names.size(); ++i) EXPECT_EQ(index.find(names[i]), i);
  for (const std::string_view absent : {"", "n", "n3", "scalar ", "__metadata__"}) {
    EXPECT_FALSE(index.find(absent).has_value());
  }
  EXPECT_TRUE(index.tensors()[2].shape.empty());
  EXPECT_EQ(index.tensors()[3].shape[0], 4u);
}

TEST(FormatIndex, OutlivesItsHeader) {
  std::shared_ptr<const Index> index;
  {
    std::string header = R"({"short":["U8",[1],[0,1]]})";
    const std::string path = "p";
    index = *parse_header(std::as_bytes(std::span(header)), 8 + header.size() + 1, path);
    header.assign(header.size(), '#');
  }
  EXPECT_EQ(index->tensors()[0].name, "short");
  EXPECT_EQ(index->find("short"), 0u);
}

TEST(FormatIndex, HundredThousandTensors) {
  constexpr std::uint32_t kCount = 100'000;
  std::string header = "{";
  // Written backwards, so that they have to be put in order.
  for (std::uint32_t i = kCount; i-- > 0;) {
    header += join("\"model.layers.", std::to_string(i), R"(.weight":{"dtype":"BF16",)",
                   R"("shape":[2,1],"data_offsets":[)", std::to_string(4 * i), ",",
                   std::to_string(4 * i + 4), i > 0 ? "]}," : "]}}");
  }
  const std::uint64_t file_size = 8 + header.size() + 4 * kCount;
  const IndexResult result = parse_file(length_prefix(header.size()) + header, file_size);
  ASSERT_TRUE(result.ok()) << result.error().describe();
  const Index& index = **result;
  ASSERT_EQ(index.tensors().size(), kCount);
  for (std::uint32_t i = 0; i < kCount; ++i) {
    const TensorInfo& tensor = index.tensors()[i];
    ASSERT_EQ(tensor.begin, index.data_begin() + 4 * i);
    ASSERT_EQ(tensor.shape.size(), 2u);
    ASSERT_EQ(index.find(join("model.layers.", std::to_string(i), ".weight")), i);
  }
  EXPECT_FALSE(index.find("model.layers.100000.weight").has_value());
}

// A header of every construct that the parser knows, and a few that it skips.
std::string small_file() {
  return file_of(
      R"({"__metadata__":{"k":"\u00e9\ud83d\ude00"},"a":{"dtype":"F32","shape":[1,2],)"
      R"("data_offsets":[0,8],"x":[{"y":null},-1.5e3,true]},"b":[{"U8":null},[],[8,9]],"é":)"
      R"({"dtype":"F4","shape":[4],"data_offsets":[9,11]}})",
      11);
}

// Whatever becomes of a changed file, it is an error or an Index that lies within it.
void expect_sound(const std::string& file) {
  const IndexResult result = parse_file(file);
  if (!result.ok()) {
    EXPECT_EQ(error_kind(result.error().code), ErrorKind::kFormat);
    EXPECT_LE(result.error().offset.value_or(0), file.size());
    return;
  }
  std::uint64_t at = (*result)->data_begin();
  for (const TensorInfo& tensor : (*result)->tensors()) {
    ASSERT_EQ(tensor.begin, at);
    at += tensor.bytes;
  }
  ASSERT_EQ(at, file.size());
}

TEST(FormatMutation, CutAtEveryByte) {
  const std::string file = small_file();
  expect_ok(parse_file(file));
  for (std::size_t size = 0; size < file.size(); ++size) {
    EXPECT_FALSE(parse_file(file.substr(0, size)).ok()) << size;
    // The same cut inside a header whose length says so.
    if (size >= 8) expect_sound(file_of(std::string_view(file).substr(8, size - 8), 11));
  }
}

TEST(FormatMutation, EveryBitFlipped) {
  const std::string file = small_file();
  for (std::size_t bit = 0; bit < 8 * file.size(); ++bit) {
    std::string changed = file;
    changed[bit / 8] = static_cast<char>(changed[bit / 8] ^ 1 << bit % 8);
    expect_sound(changed);
  }
}

TEST(FormatMutation, EveryByteReplacedLeftOutOrPutIn) {
  const std::string file = small_file();
  const std::size_t header_size = file.size() - 8 - 11;
  const std::string_view header = std::string_view(file).substr(8, header_size);
  for (std::size_t at = 0; at <= header.size(); ++at) {
    const std::string before(header.substr(0, at));
    for (const char byte : "{}[],:\"\\ 0-9.eEnt\n\x01\x7f\xc3\xff"s + '\0') {
      expect_sound(file_of(before + byte + std::string(header.substr(at)), 11));
      if (at < header.size()) {
        expect_sound(file_of(before + byte + std::string(header.substr(at + 1)), 11));
      }
    }
    if (at < header.size()) expect_sound(file_of(before + std::string(header.substr(at + 1)), 11));
  }
}

}  // namespace
}  // namespace weightlift::format
