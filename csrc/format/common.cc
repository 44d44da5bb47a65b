#include "format/common.h"

#include <algorithm>
#include <cstring>

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

std::optional<Error> foreign_file(std::string_view first) {
  if (first.starts_with("version https://git-lfs.github.com/spec/")) {
    return make_error(ErrorCode::kGitLfsPointer,
                      "this is a git-lfs pointer, not the weights: run `git lfs pull` in its "
                      "repository, or download the file itself",
                      0);
  }
  std::string_view text = first;
  if (text.starts_with("\xef\xbb\xbf")) text.remove_prefix(3);
  text.remove_prefix(std::min(text.find_first_not_of(" \t\r\n"), text.size()));
  const auto starts_with = [text](std::string_view prefix) {
    return text.size() >= prefix.size() &&
           std::equal(prefix.begin(), prefix.end(), text.begin(), [](char wanted, char found) {
             return wanted == (found >= 'A' && found <= 'Z' ? found - 'A' + 'a' : found);
           });
  };
  if (starts_with("<!doctype") || starts_with("<html") || starts_with("<?xml")) {
    return make_error(
        ErrorCode::kNotWeights,
        "a web page was saved instead of the weights: download again, and look whether the link "
        "asks for a login",
        0);
  }
  return std::nullopt;
}

}  // namespace weightlift::format
