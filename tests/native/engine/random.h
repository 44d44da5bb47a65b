// Random numbers that are the same on every machine, and sizes.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <vector>

namespace weightlift::engine::test {

inline constexpr std::size_t kKiB = 1024;
inline constexpr std::size_t kMiB = 1024 * kKiB;
// A load that takes longer hangs.
inline constexpr std::chrono::seconds kHung{30};
inline constexpr int kUnknownError = 999;

// splitmix64, because the distributions of the standard library differ between implementations.
class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed * 0x9E3779B97F4A7C15U + 1) {}

  std::uint64_t next() {
    std::uint64_t z = (state_ += 0x9E3779B97F4A7C15U);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9U;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBU;
    return z ^ (z >> 31);
  }
  std::uint64_t below(std::uint64_t bound) { return bound == 0 ? 0 : next() % bound; }
  std::uint64_t between(std::uint64_t low, std::uint64_t high) {
    return low + below(high - low + 1);
  }
  bool chance(unsigned percent) { return below(100) < percent; }
  template <class T>
  T pick(std::initializer_list<T> choices) {
    return choices.begin()[below(choices.size())];
  }
  // Small and large sizes are equally likely.
  std::uint64_t spread(std::uint64_t high) {
    std::uint64_t bits = 0;
    while ((high >> bits) > 1) ++bits;
    return std::min(high, below(std::uint64_t{2} << below(bits + 1)));
  }

 private:
  std::uint64_t state_;
};

// Bytes that differ everywhere, so that a shifted copy is a wrong one.
inline const std::vector<std::byte>& noise() {
  static const std::vector<std::byte> bytes = [] {
    std::vector<std::byte> made(8 * kMiB);
    Random random(0xB0B);
    for (std::size_t i = 0; i + 8 <= made.size(); i += 8) {
      const std::uint64_t word = random.next();
      std::memcpy(&made[i], &word, sizeof word);
    }
    return made;
  }();
  return bytes;
}

inline std::vector<std::byte> some_noise(Random& random, std::uint64_t bytes) {
  const auto from =
      noise().begin() + static_cast<std::ptrdiff_t>(random.below(noise().size() - bytes + 1));
  return {from, from + static_cast<std::ptrdiff_t>(bytes)};
}

}  // namespace weightlift::engine::test
