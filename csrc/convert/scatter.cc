#include "convert/scatter.h"

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>

#include "convert/cast.h"
#include "convert/float_formats.h"

namespace weightlift::convert {

namespace {

using Cast = void (*)(const std::byte* source, std::byte* target, std::uint32_t count,
                      const Fp8Codes& codes);

// Element by element like the kernel's threads, not with the host casts, which this checks.
template <FloatFormat from, FloatFormat to>
void cast_tile(const std::byte* source, std::byte* target, std::uint32_t count,
               const Fp8Codes& codes) {
  for (std::uint32_t i = 0; i < count; ++i) {
    Bits<from> in;
    std::memcpy(&in, source + i * sizeof(in), sizeof(in));
    Bits<to> out;
    if constexpr (from == to) {
      out = in;
    } else {
      out = encode<to>(decode<from>(in), codes);
    }
    std::memcpy(target + i * sizeof(out), &out, sizeof(out));
  }
}

template <FloatFormat from>
constexpr Cast kCastsFrom[kFloatFormatCount] = {
    cast_tile<from, FloatFormat::kF64>,    cast_tile<from, FloatFormat::kF32>,
    cast_tile<from, FloatFormat::kBf16>,   cast_tile<from, FloatFormat::kF16>,
    cast_tile<from, FloatFormat::kF8E4M3>, cast_tile<from, FloatFormat::kF8E5M2>,
};

constexpr const Cast* kCasts[kFloatFormatCount] = {
    kCastsFrom<FloatFormat::kF64>,    kCastsFrom<FloatFormat::kF32>,
    kCastsFrom<FloatFormat::kBf16>,   kCastsFrom<FloatFormat::kF16>,
    kCastsFrom<FloatFormat::kF8E4M3>, kCastsFrom<FloatFormat::kF8E5M2>,
};

}  // namespace

void scatter_on_host(const std::byte* chunk, std::span<const Tile> tiles, const Fp8Rules& rules) {
  const Fp8Codes codes = fp8_codes(rules);
  for (const Tile& tile : tiles) {
    const std::byte* source = chunk + tile.source;
    auto* target =
        reinterpret_cast<std::byte*>(static_cast<std::uintptr_t>(tile.target));  // NOLINT
    if (tile.cast == kTileCopy) {
      if (tile.count != 0) std::memcpy(target, source, tile.count);
    } else {
      kCasts[tile.cast / kFloatFormatCount][tile.cast % kFloatFormatCount](source, target,
                                                                           tile.count, codes);
    }
  }
}

}  // namespace weightlift::convert
