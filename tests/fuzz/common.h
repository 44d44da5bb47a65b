// Shared by the targets: oracles that end the process, and random numbers from libFuzzer's seeds.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <span>
#include <string>
#include <string_view>

// libFuzzer's own mutations of bytes.
extern "C" std::size_t LLVMFuzzerMutate(std::uint8_t* data, std::size_t size, std::size_t max_size);

// An oracle. libFuzzer keeps the input of a process that aborts.
#define WL_REQUIRE(condition)                                                      \
  do {                                                                             \
    if (!(condition)) {                                                            \
      std::fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition); \
      std::abort();                                                                \
    }                                                                              \
  } while (false)

namespace weightlift::fuzz {

// SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014).
class Random {
 public:
  explicit Random(std::uint64_t seed) noexcept : state_(seed) {}

  std::uint64_t next() noexcept {
    std::uint64_t z = state_ += 0x9e37'79b9'7f4a'7c15;
    z = (z ^ z >> 30) * 0xbf58'476d'1ce4'e5b9;
    z = (z ^ z >> 27) * 0x94d0'49bb'1331'11eb;
    return z ^ z >> 31;
  }
  std::size_t below(std::size_t count) noexcept { return next() % count; }
  bool one_in(std::size_t count) noexcept { return below(count) == 0; }
  template <class Container>
  auto& of(Container& container) noexcept {
    return std::data(container)[below(std::size(container))];
  }

  // A new value for a field that has `value`.
  std::uint64_t other(std::uint64_t value) noexcept {
    const auto power = std::uint64_t{1} << below(64);
    switch (below(8)) {
      case 0:
        return 0;
      case 1:
        return value + 1;
      case 2:
        return value - 1;
      case 3:
        return power;
      case 4:
        return power - 1;
      case 5:
        return value ^ power;
      case 6:
        return value + power;
      default:
        return value + below(64);
    }
  }

 private:
  std::uint64_t state_;
};

inline std::string_view as_text(const std::uint8_t* data, std::size_t size) noexcept {
  return {reinterpret_cast<const char*>(data), size};
}

inline std::span<const std::byte> as_bytes(std::string_view text) noexcept {
  return std::as_bytes(std::span(text));
}

template <class Number>
Number little_endian(std::string_view bytes, std::size_t at) noexcept {
  Number value = 0;
  std::memcpy(&value, bytes.data() + at, sizeof value);
  return value;
}
static_assert(std::endian::native == std::endian::little);

template <class Number>
void append(std::string& text, Number value) {
  text.append(reinterpret_cast<const char*>(&value), sizeof value);
}

// libFuzzer's mutations of a text that may grow by a little.
inline void mutate_bytes(std::string& text) {
  const std::size_t size = text.size();
  text.resize(size + 16);
  text.resize(LLVMFuzzerMutate(reinterpret_cast<std::uint8_t*>(text.data()), size, text.size()));
}

// Returns a mutation to libFuzzer, or, if it is too long, one of libFuzzer's own.
inline std::size_t hand_back(const std::string& text, std::uint8_t* data, std::size_t size,
                             std::size_t max_size) {
  if (text.size() > max_size) return LLVMFuzzerMutate(data, size, max_size);
  std::memcpy(data, text.data(), text.size());
  return text.size();
}

}  // namespace weightlift::fuzz
