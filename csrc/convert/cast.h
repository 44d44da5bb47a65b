// Casts among the floating-point formats that engines load: the host side.
//
// The rule (shared by host and device, see float_formats.h): round to nearest, ties to even, with
// subnormals kept; fp64 goes through fp32, as tensor.to(dtype) does; a NaN becomes the quiet NaN of
// the target with the source's sign and no payload.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string_view>

#include "dtype.h"

namespace weightlift::convert {

enum class FloatFormat : std::uint8_t { kF64, kF32, kBf16, kF16, kF8E4M3, kF8E5M2 };
inline constexpr std::size_t kFloatFormatCount = 6;

[[nodiscard]] std::optional<FloatFormat> float_format(Dtype dtype) noexcept;
[[nodiscard]] std::uint32_t float_bytes(FloatFormat format) noexcept;

// What a finite value beyond the largest fp8 number, and infinity, become. The installed torch
// decides: its versions differ, so bind/ is told once what the probe found.
struct Fp8Rules {
  bool e4m3_saturates = false;           // else NaN
  bool e4m3_infinity_saturates = false;  // else NaN
  bool e5m2_saturates = false;           // else infinity; infinity itself stays
};

// Casts `count` elements. Any alignment, also of a fraction of an element; no overlap.
using HostCast = void (*)(const std::byte* source, std::byte* target, std::size_t count,
                          const Fp8Rules& rules);

// The fastest implementation that this CPU runs, chosen once. `from` may equal `to` (a copy).
[[nodiscard]] HostCast host_cast(FloatFormat from, FloatFormat to) noexcept;

// For tests and `weightlift doctor`: "avx512", "avx2" or "baseline" on x86-64, "neon" or "baseline"
// on aarch64, best first.
enum class Isa : std::uint8_t { kBaseline, kAvx2, kAvx512, kNeon };
[[nodiscard]] Isa best_isa() noexcept;
[[nodiscard]] std::string_view isa_name(Isa isa) noexcept;
[[nodiscard]] HostCast host_cast_for(Isa isa, FloatFormat from, FloatFormat to) noexcept;

}  // namespace weightlift::convert
