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

std::size_t utf8_prefix(std::string_view text) noexcept {
  const auto byte = [&](std::size_t i) {
    return i < text.size() ? static_cast<unsigned char>(text[i]) : 0u;
  };
  const auto continues = [&](std::size_t i) { return (byte(i) & 0xc0) == 0x80; };
  std::size_t i = 0;
  while (i < text.size()) {
    // Headers are nearly all ASCII: eight bytes at a time.
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
      const unsigned low = first == 0xe0 ? 0xa0 : 0x80;   // below: longer than needed
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
    return make_error(ErrorCode::kShapeOverflow, stated() + " is more than 64 bits can count");
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
    return make_error(ErrorCode::kSubByteMisaligned,
                      stated() + " is " + std::to_string(whole) + " bits, not whole bytes");
  }
  return whole / 8;
}

std::optional<Error> empty_file(std::uint64_t file_size) {
  if (file_size != 0) return std::nullopt;
  return make_error(ErrorCode::kEmptyFile, "the file is empty: download it or save it again", 0);
}

namespace {

// Bytes at a place of the file, and what it is then.
struct Magic {
  std::size_t at;
  std::string_view bytes;
  std::string_view what;
};

using namespace std::string_view_literals;

constexpr std::string_view kGgml =
    "this is a GGML file (of llama.cpp from before GGUF): convert it to GGUF with llama.cpp, or "
    "download the model's safetensors";
constexpr std::string_view kPacked = "this is a compressed file: unpack it, and load what is in it";

constexpr Magic kMagics[] = {
    {0, "GGUF"sv,
     "this is a GGUF file (of llama.cpp), which is not read here: load it with transformers' "
     "from_pretrained(gguf_file=...) or diffusers' from_single_file, or download the model's "
     "safetensors"},
    {0, "lmgg"sv, kGgml},
    {0, "ggml"sv, kGgml},
    {0, "fmgg"sv, kGgml},
    {0, "tjgg"sv, kGgml},
    {0, "algg"sv, kGgml},
    {0, "# xet version"sv,
     "this is a Xet pointer, not the weights: download the file itself with huggingface_hub (or "
     "`git xet` in its repository)"},
    {0, "sys_info\0"sv,
     "this is torch's tar format of before 2017: load it with torch.load(weights_only=False) where "
     "it is trusted, and save its state dict again"},
    {257, "ustar"sv,
     "this is a tar archive: unpack it, and load what is in it (a file of torch from before 2017 "
     "is one too: load it with torch.load(weights_only=False) where it is trusted, and save it "
     "again)"},
    {0, "\x1f\x8b"sv, kPacked},
    {0, "BZh"sv, kPacked},
    {0,
     "\xfd"
     "7zXZ\0"sv,
     kPacked},
    {0, "\x28\xb5\x2f\xfd"sv, kPacked},
    {0, "7z\xbc\xaf\x27\x1c"sv, kPacked},
    {0, "Rar!\x1a\x07"sv, kPacked},
    {0, "\x89HDF\r\n\x1a\n"sv,
     "this is an HDF5 file (of Keras or TensorFlow): load it with h5py or Keras, and save its "
     "tensors again"},
    {0, "\x93NUMPY"sv, "this is an array of numpy: load it with numpy.load"},
    {4, "TFL3"sv, "this is a TensorFlow Lite model: its own library runs it"},
    {4, "ET12"sv, "this is a program of ExecuTorch: its own library runs it"},
    {0,
     "\x7f"
     "ELF"sv,
     "this is a program or a shared library, not weights"},
    {0, "%PDF"sv, "this is a PDF document, not weights"},
};

// Texts by their beginnings, in lower case, behind blanks.
struct Text {
  std::string_view beginnings[4];
  std::string_view what;
};

constexpr Text kTexts[] = {
    {{"<!doctype", "<html", "<head", "<body"},
     "a web page was saved instead of the weights: download again, and look whether the link asks "
     "for a login"},
    {{"<?xml", "<error"},
     "a web page or a server's answer (XML) was saved instead of the weights: look what it says, "
     "and "
     "download again"},
    {{"{\"error", "{ \"error", "{\"message", "{\"detail"},
     "an error of the server (JSON) was saved instead of the weights: look what it says, and "
     "download again"},
    {{"{\"", "{\n", "{ ", "{\r"},
     "this is JSON text, not weights: give the file of the weights themselves, or an index by a "
     "name that ends in .index.json"},
    {{"entry not found", "repository not found", "invalid username", "access to model"},
     "an error of the Hub was saved instead of the weights: look what it says, and download again"},
    {{"access denied", "forbidden", "unauthorized", "not found"},
     "an error of a server was saved instead of the weights: download again"},
    {{"/annex/objects/", "../.git/annex", ".git/annex", ""},
     "this is a git-annex pointer, not the weights: run `git annex get` in its repository"},
};

bool starts_with(std::string_view text, std::string_view prefix) {
  return text.size() >= prefix.size() &&
         std::equal(prefix.begin(), prefix.end(), text.begin(), [](char wanted, char found) {
           return wanted == (found >= 'A' && found <= 'Z' ? found - 'A' + 'a' : found);
         });
}

}  // namespace

std::optional<Error> foreign_file(std::string_view first) {
  if (first.starts_with("version https://git-lfs.github.com/spec/")) {
    return make_error(ErrorCode::kGitLfsPointer,
                      "this is a git-lfs pointer, not the weights: run `git lfs pull` in its "
                      "repository, or download the file itself",
                      0);
  }
  // A length and the header's first byte: whatever the length looks like, this is safetensors.
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
        return make_error(ErrorCode::kNotWeights, std::string(what), 0);
      }
    }
  }
  return std::nullopt;
}

}  // namespace weightlift::format
