#include "format/common.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>

#include "dtype.h"
#include "result.h"

namespace weightlift::format {

Error make_error(ErrorCode code, std::string message, std::optional<std::uint64_t> offset,
                 std::string_view tensor) {
  Error error;
  error.code = code;
  error.message = std::move(message);
  error.offset = offset;
  error.tensor = tensor;
  return error;
}

std::string excerpt(std::string_view text, std::size_t limit) {
  if (text.size() <= limit) return std::string(text);
  std::size_t end = limit;
  while (end > 0 && (static_cast<unsigned char>(text[end]) & 0xc0) == 0x80) --end;
  return std::string(text.substr(0, end)) + "...";
}

std::string shape_text(std::span<const std::uint64_t> shape) {
  constexpr std::size_t kShown = 8;
  std::string text = "[";
  for (std::size_t i = 0; i < std::min(shape.size(), kShown); ++i) {
    if (i > 0) text += ", ";
    text += std::to_string(shape[i]);
  }
  if (shape.size() > kShown) text += ", ... " + std::to_string(shape.size()) + " in all";
  return text + "]";
}

std::string bytes_text(std::uint64_t count) {
  return std::to_string(count) + (count == 1 ? " byte" : " bytes");
}

std::size_t utf8_prefix(std::string_view text) noexcept {
  const auto byte = [&](std::size_t i) {
    return i < text.size() ? static_cast<unsigned char>(text[i]) : 0u;
  };
  const auto continues = [&](std::size_t i) { return (byte(i) & 0xc0) == 0x80; };
  std::size_t i = 0;
  while (i < text.size()) {
    // Headers are nearly all ASCII, which is checked eight bytes at a time.
    while (text.size() - i >= 8) {
      std::uint64_t word = 0;
      std::memcpy(&word, text.data() + i, 8);
      if ((word & 0x8080'8080'8080'8080) != 0) break;
      i += 8;
    }
    if (i == text.size()) break;
    const unsigned first = byte(i);
    if (first < 0x80) {
      ++i;
    } else if (first >= 0xc2 && first <= 0xdf) {
      if (!continues(i + 1)) return i;
      i += 2;
    } else if (first >= 0xe0 && first <= 0xef) {
      const unsigned low = first == 0xe0 ? 0xa0 : 0x80;   // below: an overlong form
      const unsigned high = first == 0xed ? 0x9f : 0xbf;  // above: a surrogate
      if (byte(i + 1) < low || byte(i + 1) > high || !continues(i + 2)) return i;
      i += 3;
    } else if (first >= 0xf0 && first <= 0xf4) {
      const unsigned low = first == 0xf0 ? 0x90 : 0x80;
      const unsigned high = first == 0xf4 ? 0x8f : 0xbf;  // above: past U+10FFFF
      if (byte(i + 1) < low || byte(i + 1) > high || !continues(i + 2) || !continues(i + 3)) {
        return i;
      }
      i += 4;
    } else {
      return i;
    }
  }
  return i;
}

Result<std::uint64_t> bytes_of(std::span<const std::uint64_t> shape, Dtype dtype) {
  constexpr unsigned __int128 kMax = ~std::uint64_t{0};
  const auto stated = [&] {
    return std::string(dtype_name(dtype)) + " of shape " + shape_text(shape);
  };
  const auto overflow = [&] {
    return make_error(ErrorCode::kShapeOverflow,
                      stated() + " has more bits than a 64-bit number can count");
  };
  unsigned __int128 bits = 1;
  for (const std::uint64_t extent : shape) {
    bits *= extent;
    if (bits > kMax) return overflow();
  }
  bits *= dtype_bits(dtype);
  if (bits > kMax) return overflow();
  const auto whole = static_cast<std::uint64_t>(bits);
  if (whole % 8 != 0) {
    return make_error(ErrorCode::kSubByteMisaligned, stated() + " has " + std::to_string(whole) +
                                                         " bits, which are not whole bytes");
  }
  return whole / 8;
}

std::optional<Error> empty_file(std::uint64_t file_size) {
  if (file_size != 0) return std::nullopt;
  return make_error(ErrorCode::kEmptyFile, "the file is empty: download it or save it again", 0);
}

namespace {

// A file with these `bytes` at offset `at` is `what`.
struct Magic {
  std::size_t at;
  std::string_view bytes;
  std::string_view what;
};

using namespace std::string_view_literals;

constexpr std::string_view kGgml =
    "this is a GGML file (llama.cpp's format before GGUF): convert it to GGUF with llama.cpp, or "
    "download the model's safetensors file";
constexpr std::string_view kPacked = "this is a compressed file: unpack it and load its content";

constexpr std::string_view kPicture =
    "this is a picture, not weights: give the path of the weights";
constexpr std::string_view kTable =
    "this is a data table (Parquet, Arrow or SQLite), not weights: give the path of the weights";

constexpr Magic kMagics[] = {
    {0, "GGUF"sv,
     "this is a GGUF file (llama.cpp's format), which weightlift does not read: load it with "
     "transformers' from_pretrained(gguf_file=...) or diffusers' from_single_file, or download the "
     "model's safetensors file"},
    {0, "lmgg"sv, kGgml},
    {0, "ggml"sv, kGgml},
    {0, "fmgg"sv, kGgml},
    {0, "tjgg"sv, kGgml},
    {0, "algg"sv, kGgml},
    {0, "# xet version"sv,
     "this is a Xet pointer, not the weights: download the file itself with huggingface_hub (or "
     "`git xet` in its repository)"},
    {0, "sys_info\0"sv,
     "this is torch's tar format from before 2017: if you trust it, load it with "
     "torch.load(weights_only=False) and save its state dict again"},
    {257, "ustar"sv,
     "this is a tar archive: unpack it and load its content (or, if torch wrote it before 2017 and "
     "you trust it, load it with torch.load(weights_only=False) and save it again)"},
    {0, "\x1f\x8b"sv, kPacked},
    {0, "BZh"sv, kPacked},
    {0, "\x1f\x9d"sv, kPacked},
    {0, "LZIP"sv, kPacked},
    {0, "\x04\x22\x4d\x18"sv, kPacked},
    {0, "PK\5\6"sv, "this is an empty zip archive: download it or save it again"},
    {0,
     "\xfd"
     "7zXZ\0"sv,
     kPacked},
    {0, "\x28\xb5\x2f\xfd"sv, kPacked},
    {0, "7z\xbc\xaf\x27\x1c"sv, kPacked},
    {0, "Rar!\x1a\x07"sv, kPacked},
    {0, "\x89HDF\r\n\x1a\n"sv,
     "this is an HDF5 file (Keras or TensorFlow): load it with h5py or Keras and save its tensors "
     "again"},
    {0, "\x93NUMPY"sv, "this is a numpy array: load it with numpy.load"},
    {4, "TFL3"sv, "this is a TensorFlow Lite model: run it with TensorFlow Lite"},
    {4, "ET12"sv, "this is an ExecuTorch program: run it with ExecuTorch"},
    {0,
     "\x7f"
     "ELF"sv,
     "this is a program or a shared library, not weights: give the path of the weights"},
    {0, "%PDF"sv, "this is a PDF document, not weights: give the path of the weights"},
    {0, "\x89PNG"sv, kPicture},
    {0, "\xff\xd8\xff"sv, kPicture},
    {0, "GIF8"sv, kPicture},
    {0, "PAR1"sv, kTable},
    {0, "ARROW1"sv, kTable},
    {0, "SQLite format 3"sv, kTable},
};

// Beginnings of texts, after white space and in lower case.
struct Text {
  std::string_view beginnings[7];
  std::string_view what;
};

constexpr std::string_view kLfs =
    "this is a git-lfs pointer, not the weights: run `git lfs pull` in its repository, or download "
    "the file itself";

constexpr Text kTexts[] = {
    {{"<!doctype", "<html", "<head", "<body", "<!--", "<script", "<title"},
     "this is a web page, which was saved instead of the weights: download them again, and check "
     "whether the link needs a login"},
    {{"<?xml", "<error"},
     "this is a web page or a server's answer (XML), which was saved instead of the weights: read "
     "it, and download the weights again"},
    {{"{\"error", "{ \"error", "{\"message", "{\"detail"},
     "this is a server's error message (JSON), which was saved instead of the weights: read "
     "it, and download the weights again"},
    {{"{\"", "{\n", "{ ", "{\r", "[{", "[\"", "[]"},
     "this is JSON text, not weights: give the path of the weights, or of an index whose name ends "
     "in .index.json"},
    {{"entry not found", "repository not found", "invalid username", "access to model"},
     "this is an error message of the Hub, which was saved instead of the weights: read it, and "
     "download the weights again"},
    {{"access denied", "forbidden", "unauthorized", "not found"},
     "this is a server's error message, which was saved instead of the weights: download them "
     "again"},
    {{"version https://git-lfs", "version https://hawser"}, kLfs},
    {{"/annex/objects/", "../.git/annex", ".git/annex"},
     "this is a git-annex pointer, not the weights: run `git annex get` in its repository"},
};

bool starts_with(std::string_view text, std::string_view prefix) {
  return text.size() >= prefix.size() &&
         std::equal(prefix.begin(), prefix.end(), text.begin(), [](char wanted, char found) {
           return wanted == (found >= 'A' && found <= 'Z' ? found - 'A' + 'a' : found);
         });
}

// If a file begins with this many zeros, it was never filled.
constexpr std::size_t kZeros = 64;
constexpr std::size_t kShown = 40;

// ONNX and msgpack have no magic bytes. An ONNX model begins with its version and its producer's
// name in protobuf; Flax's weights begin with a small map whose first key is text.
std::string_view by_structure(std::string_view first) {
  if (first.size() < 4) return {};
  const auto at = [first](std::size_t place) { return static_cast<unsigned char>(first[place]); };
  if (at(0) == 0x08 && at(1) > 0 && at(1) < 0x20 && at(2) == 0x12 && at(3) > 0 && at(3) < 0x40) {
    return "this seems to be an ONNX model: run it with onnxruntime";
  }
  const bool text_behind_one = (at(1) & 0xe0) == 0xa0 || at(1) == 0xd9;
  const bool text_behind_three = (at(3) & 0xe0) == 0xa0 || at(3) == 0xd9;
  if ((at(0) > 0x80 && at(0) < 0x90 && text_behind_one) || (at(0) == 0xde && text_behind_three)) {
    return "this seems to be msgpack, the format of Flax's weights: load it with "
           "weightlift.flax.load_file, or load the model with from_flax=True";
  }
  return {};
}

bool is_text(std::string_view first) {
  // Pickles of protocol 0 begin with these characters.
  for (const std::string_view pickle : {"(d"sv, "(l"sv, "(c"sv, "cc"sv, "cr"sv, "ct"sv}) {
    if (first.starts_with(pickle)) return false;
  }
  const auto printable = [](char c) {
    return (c >= ' ' && c <= '~') || c == '\n' || c == '\r' || c == '\t';
  };
  return first.size() >= 8 && std::ranges::all_of(first.substr(0, kZeros), printable);
}

std::optional<std::string> what_else(std::string_view first, std::string_view text) {
  if (first.size() >= kZeros && first.find_first_not_of('\0') == std::string_view::npos) {
    return "the file begins with zeros only: its download or copy is incomplete, so download it "
           "again";
  }
  if (const std::string_view what = by_structure(first); !what.empty()) return std::string(what);
  if (!is_text(text)) return std::nullopt;
  const std::string_view line = text.substr(0, std::min(text.find_first_of("\r\n"), kShown));
  return "this is text, not weights; it begins with \"" + std::string(line) +
         "\": download the weights again";
}

}  // namespace

std::optional<Error> foreign_file(std::string_view first) {
  // A length and the first byte of a header: this is safetensors, whatever the length resembles.
  if (first.size() > 8 && first.substr(4, 5) == "\0\0\0\0{"sv) return std::nullopt;
  for (const Magic& magic : kMagics) {
    if (first.size() > magic.at && first.substr(magic.at).starts_with(magic.bytes)) {
      return make_error(ErrorCode::kNotWeights, std::string(magic.what), 0);
    }
  }
  std::string_view text = first;
  if (text.starts_with("\xef\xbb\xbf")) text.remove_prefix(3);
  text.remove_prefix(std::min(text.find_first_not_of(" \t\r\n"), text.size()));
  for (const auto& [beginnings, what] : kTexts) {
    for (const std::string_view beginning : beginnings) {
      if (!beginning.empty() && starts_with(text, beginning)) {
        const bool pointer = what == kLfs;
        return make_error(pointer ? ErrorCode::kGitLfsPointer : ErrorCode::kNotWeights,
                          std::string(what), 0);
      }
    }
  }
  auto what = what_else(first, text);
  if (!what) return std::nullopt;
  return make_error(ErrorCode::kNotWeights, *std::move(what), 0);
}

}  // namespace weightlift::format
