#include <gtest/gtest.h>

#include <algorithm>
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
#include "format/zip.h"
#include "result.h"

// tests/python/checkpoint/test_malformed.py compares the accepted files with the reference. These
// tests check codes, offsets and the Index.

namespace weightlift::format {
namespace {

using std::string_literals::operator""s;
using IndexResult = Result<std::shared_ptr<const Index>>;

constexpr std::string_view kPath = "a/model.safetensors";
constexpr std::string_view kEntry = R"({"dtype":"F32","shape":[1],"data_offsets":[0,4]})";

// Not operator+: for a literal and a temporary string, GCC 12 warns about an impossible overlap
// (GCC bug 105651).
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

// Like a reader of files. Both pieces are copied into vectors of their exact size, so that the
// address sanitizer finds every read outside them.
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
  // The header does not fit into the given file size.
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
  // Its key may be written with escapes, like any other.
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
  // Written in reverse, so that they must be sorted.
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

// Any changed file gives an error or an Index whose ranges lie inside it.
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

// --- A part of a file ---------------------------------------------------------------------------

TEST(FormatPart, OffsetsAreThoseOfTheWholeFile) {
  constexpr std::uint64_t kOrigin = 1'000'000;
  const std::string header = with_field("", "");
  const auto bytes = std::as_bytes(std::span(header));
  const std::uint64_t size = 8 + header.size() + 4;
  const IndexResult result = parse_header(bytes, size, std::string(kPath), kOrigin);
  ASSERT_TRUE(result.ok()) << result.error().describe();
  EXPECT_EQ((*result)->data_begin(), kOrigin + 8 + header.size());
  EXPECT_EQ((*result)->tensors()[0].begin, kOrigin + 8 + header.size());
  EXPECT_EQ(error_of(parse_header(bytes, size - 1, std::string(kPath), kOrigin)).offset,
            kOrigin + size - 1);
  const std::string prefix = length_prefix(header.size());
  const auto first = std::as_bytes(std::span(prefix));
  EXPECT_EQ(*header_length(first, size, std::string(kPath), kOrigin), header.size());
  const auto past = header_length(first, 20, std::string(kPath), kOrigin);
  ASSERT_FALSE(past.ok());
  EXPECT_EQ(past.error().code, ErrorCode::kHeaderPastEnd);
  EXPECT_EQ(past.error().offset, kOrigin);
}

// --- Tensors whose places are known -------------------------------------------------------------

TEST(FormatEntries, InTheOrderOfTheBytesThenOfTheNames) {
  const IndexResult result = make_index({{"b", Dtype::kF32, {2, 3}, 100},
                                         {"view of b", Dtype::kF32, {3}, 104},
                                         {"z", Dtype::kU8, {0, 7}, 100},
                                         {"y", Dtype::kU8, {0}, 100},
                                         {"scalar", Dtype::kC128, {}, 0},
                                         {"packed", Dtype::kF4, {4}, 998}},
                                        1000, std::string(kPath));
  ASSERT_TRUE(result.ok()) << result.error().describe();
  const Index& index = **result;
  std::vector<std::string_view> names;
  std::vector<std::uint64_t> sizes;
  for (const TensorInfo& tensor : index.tensors()) {
    EXPECT_EQ(index.find(tensor.name), names.size());
    names.push_back(tensor.name);
    sizes.push_back(tensor.bytes);
  }
  EXPECT_EQ(names, (std::vector<std::string_view>{"scalar", "y", "z", "b", "view of b", "packed"}));
  EXPECT_EQ(sizes, (std::vector<std::uint64_t>{16, 0, 0, 24, 12, 2}));
  EXPECT_EQ(index.tensors()[3].shape[1], 3u);
  EXPECT_EQ(index.tensors()[3].begin, 100u);
  EXPECT_EQ(index.metadata(), nullptr);
  EXPECT_TRUE((*make_index({}, 0, "p"))->tensors().empty());
}

TEST(FormatEntries, Refused) {
  const auto expect = [](std::vector<TensorEntry> entries, ErrorCode code) {
    const IndexResult result = make_index(std::move(entries), 1000, std::string(kPath));
    expect_code(result, code);
    EXPECT_EQ(error_of(result).tensor, "a");
  };
  expect({{"a", Dtype::kF32, {1}, 997}}, ErrorCode::kOffsetsInvalid);
  expect({{"a", Dtype::kF32, {0}, 1001}}, ErrorCode::kOffsetsInvalid);
  expect({{"a", Dtype::kU8, {1}, ~std::uint64_t{0}}}, ErrorCode::kOffsetsInvalid);
  expect({{"a", Dtype::kU8, {std::uint64_t{1} << 60}, 0}}, ErrorCode::kOffsetsInvalid);
  expect({{"a", Dtype::kF32, {1u << 31, 1u << 31, 4}, 0}}, ErrorCode::kShapeOverflow);
  expect({{"a", Dtype::kF4, {3}, 0}}, ErrorCode::kSubByteMisaligned);
  expect({{"a", Dtype::kU8, {1}, 0}, {"b", Dtype::kU8, {1}, 1}, {"a", Dtype::kU8, {1}, 2}},
         ErrorCode::kDuplicateName);
}

// --- Archives -----------------------------------------------------------------------------------

struct Record {
  std::string name;
  std::string data;
  std::uint16_t flags = 0;
  std::string extra = {};  // of its own header
  std::string central_extra = {};
  std::string descriptor = {};
  bool wide = false;  // sizes in a ZIP64 field
};

template <class Number>
std::string little(Number value) {
  std::string text;
  for (std::size_t i = 0; i < sizeof value; ++i) text += static_cast<char>(value >> (8 * i) & 0xff);
  return text;
}
std::string le16(std::size_t value) {
  return little(static_cast<std::uint16_t>(value));
}
std::string le32(std::size_t value) {
  return little(static_cast<std::uint32_t>(value));
}
std::string le64(std::uint64_t value) {
  return little(value);
}

// An archive, and the offsets of its parts, so that a test can change them.
struct Zip {
  std::string bytes;
  std::vector<std::size_t> local;
  std::vector<std::size_t> data;
  std::vector<std::size_t> central;
  std::size_t directory = 0;
  std::size_t end64 = 0;
  std::size_t locator = 0;
  std::size_t end = 0;

  Zip& put(std::size_t at, std::string_view text) {
    bytes.replace(at, text.size(), text);
    return *this;
  }
};

constexpr std::size_t kCrc = 0x12345678;

Zip make_zip(const std::vector<Record>& records, bool zip64 = false) {
  Zip zip;
  for (const Record& record : records) {
    zip.local.push_back(zip.bytes.size());
    const bool later = !record.descriptor.empty();
    const std::size_t size = record.wide ? 0xffff'ffff : later ? 0 : record.data.size();
    const std::string extra =
        (record.wide ? join(le16(1), le16(16), le64(record.data.size()), le64(record.data.size()))
                     : ""s) +
        record.extra;
    zip.bytes += join("PK\x03\x04", le16(20), le16(record.flags | (later ? 8 : 0)), le16(0),
                      le32(0), le32(later ? 0 : kCrc), le32(size), le32(size),
                      le16(record.name.size()), le16(extra.size()), record.name, extra);
    zip.data.push_back(zip.bytes.size());
    zip.bytes += record.data + record.descriptor;
  }
  zip.directory = zip.bytes.size();
  for (std::size_t i = 0; i < records.size(); ++i) {
    const Record& record = records[i];
    zip.central.push_back(zip.bytes.size());
    zip.bytes += join("PK\x01\x02", le16(20), le16(20),
                      le16(record.flags | (record.descriptor.empty() ? 0 : 8)), le16(0), le32(0),
                      le32(kCrc), le32(record.data.size()), le32(record.data.size()),
                      le16(record.name.size()), le16(record.central_extra.size()), le16(0), le16(0),
                      le16(0), le32(0), le32(zip.local[i]), record.name, record.central_extra);
  }
  const std::size_t size = zip.bytes.size() - zip.directory;
  if (zip64) {
    zip.end64 = zip.bytes.size();
    zip.bytes += join("PK\x06\x06", le64(44), le16(45), le16(45), le32(0), le32(0),
                      le64(records.size()), le64(records.size()), le64(size), le64(zip.directory));
    zip.locator = zip.bytes.size();
    zip.bytes += join("PK\x06\x07", le32(0), le64(zip.end64), le32(1));
  }
  zip.end = zip.bytes.size();
  zip.bytes += join("PK\x05\x06", le16(0), le16(0), le16(records.size()), le16(records.size()),
                    le32(size), le32(zip.directory), le16(0));
  return zip;
}

std::string descriptor(std::size_t size, bool signature = true, bool wide = false) {
  const auto number = [wide](std::size_t value) { return wide ? le64(value) : le32(value); };
  return join(signature ? "PK\x07\x08" : "", le32(kCrc), number(size), number(size));
}

using ZipResult = Result<std::vector<ZipRecord>>;

ReadBytes reader_of(const std::string& file) {
  return [&file](std::uint64_t offset, std::span<std::byte> target) -> Status {
    // The parser must ask only for bytes inside the file.
    EXPECT_LE(offset, file.size());
    EXPECT_LE(target.size(), file.size() - offset);
    std::copy_n(std::as_bytes(std::span(file)).begin() + static_cast<std::ptrdiff_t>(offset),
                target.size(), target.begin());
    return {};
  };
}

ZipResult parse_archive(const std::string& file) {
  return parse_zip(reader_of(file), file.size(), std::string(kPath));
}

void expect_archive_code(const std::string& file, ErrorCode code, std::string_view in_message = "",
                         std::optional<std::uint64_t> offset = std::nullopt) {
  const ZipResult result = parse_archive(file);
  ASSERT_FALSE(result.ok());
  const Error& error = result.error();
  EXPECT_EQ(error_name(error.code), error_name(code)) << error.describe();
  EXPECT_NE(error.message.find(in_message), std::string::npos) << error.describe();
  EXPECT_EQ(error.path, kPath);
  EXPECT_EQ(error_kind(error.code), ErrorKind::kFormat);
  EXPECT_LE(error.offset.value_or(0), file.size());
  EXPECT_EQ(error.offset, offset ? offset : error.offset) << error.describe();
}

void expect_records(const std::string& file, const std::vector<Record>& records) {
  const ZipResult result = parse_archive(file);
  ASSERT_TRUE(result.ok()) << result.error().describe();
  ASSERT_EQ(result->size(), records.size());
  for (std::size_t i = 0; i < records.size(); ++i) {
    const ZipRecord& found = (*result)[i];
    EXPECT_EQ(found.name, records[i].name);
    EXPECT_EQ(found.crc32, kCrc);
    EXPECT_EQ(found.zip64, records[i].wide);
    EXPECT_EQ(std::string_view(file).substr(found.begin, found.bytes), records[i].data);
  }
}

std::vector<Record> two_records() {
  return {{"x/data.pkl", "pickle"}, {"x/data/0", "0123456789"}};
}

TEST(FormatZipStart, WhatItIs) {
  const auto zip = [](std::string_view first, std::uint64_t size) {
    return is_zip(std::as_bytes(std::span(first)), size, std::string(kPath));
  };
  EXPECT_TRUE(*zip("PK\x03\x04 and so on", 100));
  EXPECT_FALSE(*zip("\x80\x02\x8a\x0a", 100));
  EXPECT_FALSE(*zip("PK", 2));
  EXPECT_EQ(zip("", 0).error().code, ErrorCode::kEmptyFile);
  EXPECT_EQ(zip("version https://git-lfs.github.com/spec/v1", 130).error().code,
            ErrorCode::kGitLfsPointer);
  EXPECT_EQ(zip("\n<!DOCTYPE html>", 130).error().code, ErrorCode::kNotWeights);
}

TEST(FormatZip, Accepted) {
  const std::string padding = join("FB", le16(5), "ZZZZZ");
  for (const bool zip64 : {false, true}) {
    for (const std::vector<Record>& records : std::vector<std::vector<Record>>{
             {},
             two_records(),
             {{"a", "", 0}, {"b", "b", 0, padding}, {"c", "", 0x800}, {"\xc3\xa9", "d", 0x800}},
             {{"a", "12", 0x800, padding, "", descriptor(2)}, {"b", "3", 0, "", "", descriptor(1)}},
             {{"a", "12", 0, "", "", descriptor(2, false)}, {"b", "1"}},
             {{"a", "12", 0, "", "", descriptor(2, true, true)}},
             {{"a", "12", 0, "", "", descriptor(2, false, true)}},
             {{"a", "", 0, "", "", descriptor(0)}, {"b", "1"}},
             {{"a", "12", 0, "", padding, "", true}, {"b", "", 0, padding, "", "", true}},
             {{"a", "12", 0, "", "", descriptor(2), true}},
             // Longer than what one read of a header gets.
             {{"a", "12", 0, join("FB", le16(60'000), std::string(60'000, 'Z'))}, {"b", "1"}}}) {
      expect_records(make_zip(records, zip64).bytes, records);
    }
  }
}

TEST(FormatZip, AsTorchWritesBehindFourGibibytes) {
  // An empty record there: no descriptor, small sizes, and a ZIP64 field with only the offset.
  const std::string field = join(le16(1), le16(8), le64(std::uint64_t{5} << 30));
  Zip zip = make_zip({{"a", "", 0x800, field}});
  const ZipResult result = parse_archive(zip.bytes);
  ASSERT_TRUE(result.ok()) << result.error().describe();
  EXPECT_EQ((*result)[0].bytes, 0u);
}

TEST(FormatZip, InTheOrderOfTheFile) {
  // The directory lists them backwards.
  Zip zip = make_zip(two_records());
  const std::string first = zip.bytes.substr(zip.central[0], zip.central[1] - zip.central[0]);
  const std::string second = zip.bytes.substr(zip.central[1], zip.end - zip.central[1]);
  expect_records(zip.put(zip.directory, second + first).bytes, two_records());
}

// A file of more than 4 GiB, of which only the ends are in memory.
TEST(FormatZip, Zip64) {
  const std::uint64_t size = (std::uint64_t{5} << 30) + 3;
  const std::string field = join(le16(1), le16(16), le64(size), le64(size));
  const std::string start =
      join("PK\x03\x04", le16(45), le16(0), le16(0), le32(0), le32(kCrc), le32(0xffff'ffff),
           le32(0xffff'ffff), le16(1), le16(20), "a", field);
  const std::uint64_t second = start.size() + size;
  const std::string header = join("PK\x03\x04", le16(45), le16(0), le16(0), le32(0), le32(kCrc),
                                  le32(2), le32(2), le16(1), le16(0), "b", "bb");
  const std::uint64_t directory = second + header.size();
  const auto entry = [](std::string_view name, std::size_t narrow, std::size_t place,
                        const std::string& extra) {
    return join("PK\x01\x02", le16(45), le16(45), le16(0), le16(0), le32(0), le32(kCrc),
                le32(narrow), le32(narrow), le16(1), le16(extra.size()), le16(0), le16(0), le16(0),
                le32(0), le32(place), name, extra);
  };
  const std::string entries = entry("a", 0xffff'ffff, 0, field) +
                              entry("b", 2, 0xffff'ffff, join(le16(1), le16(8), le64(second)));
  const std::string end =
      join("PK\x06\x06", le64(44), le16(45), le16(45), le32(0), le32(0), le64(2), le64(2),
           le64(entries.size()), le64(directory), "PK\x06\x07", le32(0),
           le64(directory + entries.size()), le32(1), "PK\x05\x06", le16(0), le16(0), le16(2),
           le16(2), le32(entries.size()), le32(0xffff'ffff), le16(0));
  const std::string tail = header + entries + end;
  const ReadBytes read = [&](std::uint64_t offset, std::span<std::byte> target) -> Status {
    for (std::size_t i = 0; i < target.size(); ++i) {
      const std::uint64_t at = offset + i;
      const char byte = at < start.size() ? start[at] : at < second ? '\0' : tail.at(at - second);
      target[i] = static_cast<std::byte>(byte);
    }
    return {};
  };
  const ZipResult result = parse_zip(read, second + tail.size(), "p");
  ASSERT_TRUE(result.ok()) << result.error().describe();
  EXPECT_EQ((*result)[0].bytes, size);
  EXPECT_TRUE((*result)[0].zip64);
  EXPECT_EQ((*result)[1].begin, directory - 2);
}

TEST(FormatZipEnd, Refused) {
  const Zip zip = make_zip(two_records());
  const auto changed = [&zip](std::size_t at, std::string_view text) {
    return Zip(zip).put(at, text).bytes;
  };
  expect_archive_code("", ErrorCode::kArchiveIncomplete);
  expect_archive_code("PK\x03\x04", ErrorCode::kArchiveIncomplete, "incomplete", 4);
  for (const std::size_t cut : {1u, 10u, 18u, 22u}) {
    expect_archive_code(zip.bytes.substr(0, zip.bytes.size() - cut), ErrorCode::kArchiveIncomplete);
  }
  expect_archive_code(zip.bytes + "x", ErrorCode::kTrailingBytes, "follow the archive",
                      zip.bytes.size());
  expect_archive_code(zip.bytes + std::string(1000, '\0'), ErrorCode::kTrailingBytes);
  expect_archive_code(changed(zip.end + 20, le16(4)) + "note", ErrorCode::kTrailingBytes);
  expect_archive_code(changed(zip.end + 20, le16(4)), ErrorCode::kArchiveMalformed, "comment");
  // Two end records: the same bytes again, and those of another archive in front.
  expect_archive_code(zip.bytes + zip.bytes.substr(zip.end), ErrorCode::kArchiveMalformed);
  expect_archive_code(zip.bytes + zip.bytes, ErrorCode::kArchiveMalformed);
  expect_archive_code("#!/bin/sh\n" + zip.bytes, ErrorCode::kArchiveMalformed);
  for (const std::size_t at : {4, 6, 8}) {
    expect_archive_code(changed(zip.end + at, le16(1)), ErrorCode::kArchiveUnsupported, "split");
  }
  for (const std::size_t count : {0, 1, 3, 0xffff}) {
    expect_archive_code(changed(zip.end + 8, le16(count) + le16(count)),
                        ErrorCode::kArchiveMalformed, "another number");
  }
  for (const std::size_t at : {12, 16}) {
    for (const std::size_t value : {zip.directory + 1, std::size_t{0xffff'ffff}, std::size_t{0}}) {
      expect_archive_code(changed(zip.end + at, le32(value)), ErrorCode::kArchiveMalformed, "",
                          zip.end);
    }
  }
}

TEST(FormatZipEnd, Zip64Refused) {
  const Zip zip = make_zip(two_records(), true);
  const auto changed = [&zip](std::size_t at, std::string_view text) {
    return Zip(zip).put(at, text).bytes;
  };
  for (const std::uint64_t place :
       {zip.end64 - 1, zip.end64 + 1, std::size_t{0}, zip.locator, ~std::size_t{0}}) {
    expect_archive_code(changed(zip.locator + 8, le64(place)), ErrorCode::kArchiveMalformed,
                        "locator", zip.locator);
  }
  expect_archive_code(changed(zip.locator, "PK\x06\x08"), ErrorCode::kArchiveMalformed);
  expect_archive_code(changed(zip.end64, "PK\x06\x07"), ErrorCode::kArchiveMalformed);
  expect_archive_code(changed(zip.end64 + 4, le64(45)), ErrorCode::kArchiveMalformed);
  for (const std::size_t at : {zip.locator + 4, zip.locator + 16, zip.end64 + 16, zip.end64 + 20}) {
    expect_archive_code(changed(at, le32(2)), ErrorCode::kArchiveUnsupported, "split");
  }
  expect_archive_code(changed(zip.end64 + 24, le64(1)), ErrorCode::kArchiveUnsupported);
  expect_archive_code(changed(zip.end64 + 24, le64(3) + le64(3)), ErrorCode::kArchiveMalformed,
                      "contradict");
  for (const std::size_t at : {40, 48}) {
    expect_archive_code(changed(zip.end64 + at, le64(1)), ErrorCode::kArchiveMalformed,
                        "contradict");
  }
  // Both say so.
  expect_archive_code(Zip(zip)
                          .put(zip.end64 + 40, le64(~std::uint64_t{0}))
                          .put(zip.end + 12, le32(0xffff'ffff))
                          .bytes,
                      ErrorCode::kArchiveMalformed);
  expect_archive_code(
      Zip(zip)
          .put(zip.end64 + 24, le64(std::uint64_t{1} << 60) + le64(std::uint64_t{1} << 60))
          .put(zip.end + 8, le16(0xffff) + le16(0xffff))
          .bytes,
      ErrorCode::kArchiveMalformed, "entries");
}

TEST(FormatZipEnd, TooLargeADirectoryIsNotRead) {
  const std::uint64_t size = kMaxDirectoryBytes + 1;
  const std::string end =
      join("PK\x05\x06", le16(0), le16(0), le16(1), le16(1), le32(size), le32(0), le16(0));
  const ReadBytes read = [&](std::uint64_t offset, std::span<std::byte> target) -> Status {
    EXPECT_LT(target.size(), 100u);
    std::fill(target.begin(), target.end(), std::byte{0});
    EXPECT_EQ(offset + target.size(), size + end.size());
    std::copy_n(std::as_bytes(std::span(end)).begin(), end.size(), target.end() - 22);
    return {};
  };
  const ZipResult result = parse_zip(read, size + end.size(), "p");
  ASSERT_FALSE(result.ok());
  EXPECT_EQ(result.error().code, ErrorCode::kArchiveTooLarge);
}

TEST(FormatZipDirectory, Refused) {
  const Zip zip = make_zip(two_records());
  const auto changed = [&zip](std::size_t at, std::string_view text) {
    return Zip(zip).put(at, text).bytes;
  };
  const std::size_t entry = zip.central[1];
  expect_archive_code(changed(entry, "PK\x01\x03"), ErrorCode::kArchiveMalformed, "", entry);
  for (const std::size_t at : {28, 30, 32}) {
    expect_archive_code(changed(entry + at, le16(0xffff)), ErrorCode::kArchiveMalformed,
                        "past the end");
  }
  for (const std::size_t flags : {0x1, 0x40, 0x2000, 0x2041}) {
    expect_archive_code(changed(entry + 8, le16(flags)), ErrorCode::kArchiveUnsupported,
                        "encrypted", entry);
  }
  expect_archive_code(changed(entry + 8, le16(0x20)), ErrorCode::kArchiveUnsupported, "patch");
  for (const std::size_t flags : {0x2, 0x10, 0x80, 0x4000, 0x8000}) {
    expect_archive_code(changed(entry + 8, le16(flags)), ErrorCode::kArchiveUnsupported, "unknown");
  }
  expect_archive_code(changed(entry + 6, le16(46)), ErrorCode::kArchiveUnsupported, "version");
  for (const std::size_t method : {8, 9, 12, 14, 93, 99}) {
    expect_archive_code(changed(entry + 10, le16(method)), ErrorCode::kArchiveUnsupported,
                        "compressed");
  }
  for (const std::size_t at : {20, 24}) {
    expect_archive_code(changed(entry + at, le32(9)), ErrorCode::kSizeMismatch, "x/data/0", entry);
  }
  for (const std::size_t at : {20, 24, 42}) {
    expect_archive_code(changed(entry + at, le32(0xffff'ffff)), ErrorCode::kArchiveMalformed,
                        "ZIP64");
  }
  expect_archive_code(changed(entry + 34, le16(1)), ErrorCode::kArchiveUnsupported, "split");
  expect_archive_code(changed(entry + 38, le32(0x10)), ErrorCode::kArchiveMalformed, "folder");
  expect_archive_code(make_zip({{"a/", "1"}}).bytes, ErrorCode::kArchiveMalformed, "folder");
  EXPECT_TRUE(parse_archive(make_zip({{"a/", ""}}).bytes).ok());
}

TEST(FormatZipDirectory, Names) {
  for (const std::string& name : {""s, "a\0b"s, "\xff"s, "\xc3"s, "\xed\xa0\x80"s}) {
    expect_archive_code(make_zip({{name, "x", 0x800}}).bytes, ErrorCode::kArchiveMalformed, "name");
  }
  expect_archive_code(make_zip({{"\xc3\xa9", "x", 0}}).bytes, ErrorCode::kArchiveMalformed, "name");
  expect_archive_code(make_zip({{"a", "1"}, {"b", "2"}, {"a", "3"}}).bytes,
                      ErrorCode::kDuplicateName, "'a'");
}

TEST(FormatZipDirectory, ExtraFields) {
  const auto expect = [](const std::string& extra) {
    expect_archive_code(make_zip({{"a", "x", 0, "", extra}}).bytes, ErrorCode::kArchiveMalformed);
    expect_archive_code(make_zip({{"a", "x", 0, extra}}).bytes, ErrorCode::kArchiveMalformed);
  };
  const std::string field = join(le16(1), le16(0));
  expect("F");
  expect("FB\1");
  expect(join("FB", le16(1)));
  expect(join("FB", le16(0), "FBB"));
  expect(join("FB", le16(0xffff), "Z"));
  expect(field + field);
  // A ZIP64 field with more values than needed.
  expect_archive_code(make_zip({{"a", "x", 0, "", join(le16(1), le16(8), le64(1))}}).bytes,
                      ErrorCode::kArchiveMalformed, "wrong size");
}

TEST(FormatZipRecord, ContradictsTheDirectory) {
  const Zip zip = make_zip(two_records());
  const std::size_t header = zip.local[1];
  const auto expect = [&](std::size_t at, std::string_view text, std::string_view in_message) {
    expect_archive_code(Zip(zip).put(header + at, text).bytes, ErrorCode::kArchiveMismatch,
                        in_message, header);
  };
  expect(0, "PK\x01\x02", "no header");
  expect(6, le16(0x800), "flag");
  expect(6, le16(8), "flag");
  expect(8, le16(8), "method");
  expect(14, le32(0), "checksum");
  for (const std::size_t at : {18, 22}) {
    for (const std::size_t size : {0u, 9u, 11u, 0xffff'ffffu}) expect(at, le32(size), "size");
  }
  expect(18, le32(0xffff'ffff) + le32(0xffff'ffff), "size");
  expect(26, le16(7), "name");
  expect(30, "y", "name");
  Zip wide = make_zip({{"a", "12", 0, "", "", "", true}});
  expect_archive_code(wide.put(wide.data[0] - 8, le64(3)).bytes, ErrorCode::kArchiveMismatch,
                      "size");
}

TEST(FormatZipRecord, Descriptors) {
  const auto expect = [](const std::string& text, ErrorCode code) {
    expect_archive_code(make_zip({{"a", "12", 0, "", "", text}, {"b", "1"}}).bytes, code);
    expect_archive_code(make_zip({{"a", "12", 0, "", "", text}}).bytes, code);
  };
  expect(descriptor(3), ErrorCode::kArchiveMismatch);
  expect(descriptor(2).substr(1), ErrorCode::kArchiveMismatch);
  expect("PK\x07\x09" + descriptor(2, false), ErrorCode::kArchiveMismatch);
  expect(join("PK\x07\x08", le32(0), le32(2), le32(2)), ErrorCode::kArchiveMismatch);
  expect(join("PK\x07\x08", le32(kCrc), le32(2), le32(0)), ErrorCode::kArchiveMismatch);
  expect(descriptor(2) + std::string(9, '\0'), ErrorCode::kOffsetsInvalid);
  // Stated but missing; present but not stated.
  Zip none = make_zip(two_records());
  none.put(none.local[0] + 6, le16(8)).put(none.central[0] + 8, le16(8));
  expect_archive_code(none.bytes, ErrorCode::kArchiveMismatch);
  Zip some = make_zip({{"a", "12", 0, "", "", descriptor(2)}, {"b", "1"}});
  some.put(some.local[0] + 6, le16(0)).put(some.central[0] + 8, le16(0));
  some.put(some.local[0] + 14, le32(kCrc) + le32(2) + le32(2));
  expect_archive_code(some.bytes, ErrorCode::kOffsetsInvalid, "belong to no record");
  // In the record's header: zeros, or the right values.
  Zip early = make_zip({{"a", "12", 0, "", "", descriptor(2)}});
  EXPECT_TRUE(parse_archive(Zip(early).put(18, le32(2) + le32(2)).bytes).ok());
  expect_archive_code(Zip(early).put(18, le32(2) + le32(3)).bytes, ErrorCode::kArchiveMismatch);
  expect_archive_code(Zip(early).put(14, le32(1)).bytes, ErrorCode::kArchiveMismatch);
}

TEST(FormatZipRecord, Places) {
  const Zip zip = make_zip(two_records());
  const auto resized = [&zip](std::size_t i, std::size_t size) {
    const std::string sizes = le32(size) + le32(size);
    return Zip(zip).put(zip.local[i] + 18, sizes).put(zip.central[i] + 20, sizes).bytes;
  };
  expect_archive_code(resized(0, 7), ErrorCode::kOffsetsInvalid, "overlaps");
  expect_archive_code(resized(0, 5), ErrorCode::kOffsetsInvalid, "no record", zip.local[1] - 1);
  expect_archive_code(resized(1, 9), ErrorCode::kOffsetsInvalid, "no record");
  expect_archive_code(resized(1, 11), ErrorCode::kOffsetsInvalid, "directory");
  expect_archive_code(resized(1, 1 << 20), ErrorCode::kOffsetsInvalid, "directory");
  expect_archive_code(resized(0, 1 << 20), ErrorCode::kOffsetsInvalid);
  const auto moved = [&zip](std::size_t i, std::size_t place) {
    return Zip(zip).put(zip.central[i] + 42, le32(place)).bytes;
  };
  expect_archive_code(moved(1, 0), ErrorCode::kOffsetsInvalid, "overlaps");  // two on one record
  expect_archive_code(moved(1, zip.local[1] - 1), ErrorCode::kOffsetsInvalid);
  expect_archive_code(moved(1, zip.local[1] + 1), ErrorCode::kOffsetsInvalid);
  expect_archive_code(moved(1, zip.directory), ErrorCode::kOffsetsInvalid);
  expect_archive_code(moved(1, zip.directory - 10), ErrorCode::kOffsetsInvalid);
  expect_archive_code(moved(1, 0xffff'fffe), ErrorCode::kOffsetsInvalid);
  expect_archive_code(moved(0, 4), ErrorCode::kOffsetsInvalid, "no record", 0);
  // A name or extra fields that reach into the directory.
  for (const std::size_t at : {26, 28}) {
    expect_archive_code(Zip(zip).put(zip.local[1] + at, le16(0xffff)).bytes,
                        ErrorCode::kOffsetsInvalid, "directory");
  }
  // One record inside another's bytes, both well-formed.
  const Zip inner = make_zip({{"b", "1"}});
  Zip outer = make_zip({{"a", inner.bytes.substr(0, inner.directory)}, {"b", "1"}});
  outer.put(outer.central[1] + 42, le32(outer.data[0]));
  expect_archive_code(outer.bytes, ErrorCode::kOffsetsInvalid, "overlaps");
}

TEST(FormatZip, ErrorsOfTheReaderComeThrough) {
  const std::string file = make_zip(two_records()).bytes;
  for (int failing = 0; failing < 4; ++failing) {
    int call = 0;
    const ReadBytes read = [&](std::uint64_t offset, std::span<std::byte> target) -> Status {
      if (call++ == failing) return Error{.code = ErrorCode::kReadFailed, .message = "no"};
      return reader_of(file)(offset, target);
    };
    const ZipResult result = parse_zip(read, file.size(), "p");
    ASSERT_FALSE(result.ok()) << failing;
    EXPECT_EQ(result.error().code, ErrorCode::kReadFailed);
  }
}

std::string small_archive() {
  return make_zip({{"x/data.pkl", "pickle", 0x800, join("FB", le16(2), "ZZ"), "", descriptor(6)},
                   {"x/version", "", 0x800},
                   {"x/data/0", "01234", 0, "", "", "", true},
                   {"x/data/1", "7", 0, "", "", descriptor(1, true, true)}},
                  true)
      .bytes;
}

// Any changed file gives an error or records that lie inside it and do not overlap.
void expect_sound_archive(const std::string& file) {
  const ZipResult result = parse_archive(file);
  if (!result.ok()) {
    EXPECT_EQ(error_kind(result.error().code), ErrorKind::kFormat);
    EXPECT_LE(result.error().offset.value_or(0), file.size());
    return;
  }
  std::uint64_t covered = 0;
  for (const ZipRecord& record : *result) {
    ASSERT_GE(record.begin, covered + 30);
    ASSERT_LE(record.begin, file.size());
    ASSERT_LE(record.bytes, file.size() - record.begin);
    covered = record.begin + record.bytes;
  }
}

TEST(FormatZipMutation, CutAtEveryByte) {
  const std::string file = small_archive();
  EXPECT_TRUE(parse_archive(file).ok());
  for (std::size_t size = 0; size < file.size(); ++size) {
    EXPECT_FALSE(parse_archive(file.substr(0, size)).ok()) << size;
    EXPECT_FALSE(parse_archive(file.substr(size + 1)).ok()) << size;
  }
}

TEST(FormatZipMutation, EveryBitFlipped) {
  const std::string file = small_archive();
  for (std::size_t bit = 0; bit < 8 * file.size(); ++bit) {
    std::string changed = file;
    changed[bit / 8] = static_cast<char>(changed[bit / 8] ^ 1 << bit % 8);
    expect_sound_archive(changed);
  }
}

TEST(FormatZipMutation, EveryByteReplacedLeftOutOrPutIn) {
  const std::string file = small_archive();
  for (std::size_t at = 0; at < file.size(); ++at) {
    for (const char byte : "\x01\x7f\x80\xfe\xffPK"s + '\0') {
      std::string changed = file;
      changed[at] = byte;
      expect_sound_archive(changed);
      EXPECT_FALSE(parse_archive(file.substr(0, at) + byte + file.substr(at)).ok()) << at;
    }
    EXPECT_FALSE(parse_archive(file.substr(0, at) + file.substr(at + 1)).ok()) << at;
  }
}

}  // namespace
}  // namespace weightlift::format
