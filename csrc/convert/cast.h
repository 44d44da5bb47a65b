// Casts between floating-point formats on the host.
//
// Host and device follow the same rule (float_formats.h): round to nearest, ties to even; keep
// subnormals; cast fp64 through fp32, as tensor.to(dtype) does; a NaN becomes the target's quiet
// NaN with the source's sign and no payload.
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

// The results for infinity and for finite values beyond the largest fp8 number. Versions of torch
// differ, so Python probes the installed one and sets these.
struct Fp8Rules {
  bool e4m3_saturates = false;           // else NaN
  bool e4m3_infinity_saturates = false;  // else NaN
  bool e5m2_saturates = false;           // else infinity; infinity itself stays
};

// Casts `count` elements. Source and target may have any alignment, but must not overlap.
using HostCast = void (*)(const std::byte* source, std::byte* target, std::size_t count,
                          const Fp8Rules& rules);

// The fastest implementation for this CPU, chosen once. If `from` equals `to`, it copies.
[[nodiscard]] HostCast host_cast(FloatFormat from, FloatFormat to) noexcept;

// For tests and `weightlift doctor`. The names are, best first, "avx512", "avx2", "baseline" on
// x86-64 and "neon", "baseline" on aarch64.
enum class Isa : std::uint8_t { kBaseline, kAvx2, kAvx512, kNeon };
[[nodiscard]] Isa best_isa() noexcept;
[[nodiscard]] std::string_view isa_name(Isa isa) noexcept;
[[nodiscard]] HostCast host_cast_for(Isa isa, FloatFormat from, FloatFormat to) noexcept;

}  // namespace weightlift::convert
