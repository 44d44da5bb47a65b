// The one definition of what a cast gives, for the host kernels, the CUDA kernel and the simulated
// device. Every format goes through the bits of an fp32 number, because torch does: for fp64 to a
// narrow format that means two roundings, which must be the same two.
//
// Integer arithmetic and selects only, apart from int-to-float conversions whose results are exact
// and normal numbers: so the result depends neither on flush-to-zero and denormals-are-zero
// (torch.set_flush_denormal sets both) nor on the rounding mode, and compilers vectorise the loops.
//
// Formats: IEEE 754-2019; bfloat16 as the upper half of an fp32; Micikevicius et al., "FP8 Formats
// for Deep Learning", 2022 (e5m2 has infinities; e4m3 has none, and NaN is only S.1111.111).
#pragma once

#include <cstdint>
#include <cstring>

#include "convert/cast.h"

#if defined(__CUDACC__)
#define WL_HOST_DEVICE __host__ __device__
#else
#define WL_HOST_DEVICE
#endif

namespace weightlift::convert {

// Everything here is static: units built for different instruction sets include it, and with
// external linkage the linker would keep one of their copies for all of them.

template <FloatFormat format>
struct FormatBits;
template <>
struct FormatBits<FloatFormat::kF64> {
  using Type = std::uint64_t;
};
template <>
struct FormatBits<FloatFormat::kF32> {
  using Type = std::uint32_t;
};
template <>
struct FormatBits<FloatFormat::kBf16> {
  using Type = std::uint16_t;
};
template <>
struct FormatBits<FloatFormat::kF16> {
  using Type = std::uint16_t;
};
template <>
struct FormatBits<FloatFormat::kF8E4M3> {
  using Type = std::uint8_t;
};
template <>
struct FormatBits<FloatFormat::kF8E5M2> {
  using Type = std::uint8_t;
};
template <FloatFormat format>
using Bits = typename FormatBits<format>::Type;

// Fp8Rules as the codes to store, so that loops select a value and test no flag.
struct Fp8Codes {
  std::uint32_t e4m3_overflow;
  std::uint32_t e4m3_infinity;
  std::uint32_t e5m2_overflow;
};

WL_HOST_DEVICE static inline Fp8Codes fp8_codes(const Fp8Rules& rules) {
  return {rules.e4m3_saturates ? 0x7eU : 0x7fU, rules.e4m3_infinity_saturates ? 0x7eU : 0x7fU,
          rules.e5m2_saturates ? 0x7bU : 0x7cU};
}

// Masks rather than `?:`, from which compilers make branches around floating-point operations:
// those might trap, and then the loop is not vectorised.
WL_HOST_DEVICE static inline std::uint32_t select(bool condition, std::uint32_t yes,
                                                  std::uint32_t no) {
  const std::uint32_t mask = 0U - static_cast<std::uint32_t>(condition);
  return (yes & mask) | (no & ~mask);
}

WL_HOST_DEVICE static inline std::uint64_t select(bool condition, std::uint64_t yes,
                                                  std::uint64_t no) {
  const std::uint64_t mask = 0ULL - static_cast<std::uint64_t>(condition);
  return (yes & mask) | (no & ~mask);
}

WL_HOST_DEVICE static inline std::int32_t smaller(std::int32_t a, std::int32_t b) {
  return a < b ? a : b;
}
WL_HOST_DEVICE static inline std::int32_t larger(std::int32_t a, std::int32_t b) {
  return a > b ? a : b;
}
WL_HOST_DEVICE static inline std::int64_t smaller(std::int64_t a, std::int64_t b) {
  return a < b ? a : b;
}
WL_HOST_DEVICE static inline std::int64_t larger(std::int64_t a, std::int64_t b) {
  return a > b ? a : b;
}

// std::bit_cast would be an external function of each unit (see above) where it is not inlined.
WL_HOST_DEVICE static inline std::uint32_t bits_of(float value) {
  std::uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}
WL_HOST_DEVICE static inline std::uint64_t bits_of(double value) {
  std::uint64_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

inline constexpr std::int32_t kF32Infinity = 0x7f800000;
inline constexpr std::uint32_t kF32Nan = 0x7fc00000;

// The magnitude of a format with `mantissa` stored bits, at most 8 exponent bits and its bias, to
// fp32 bits. Subnormals are integers times a power of two; the all-ones exponent comes out as a
// large finite number, for the caller to replace.
template <int mantissa, int bias>
WL_HOST_DEVICE static inline std::uint32_t widen(std::uint32_t magnitude) {
  constexpr float kSubnormalUnit = 1.0F / static_cast<float>(1U << (bias - 1 + mantissa));
  const std::uint32_t normal =
      (magnitude << (23 - mantissa)) + (static_cast<std::uint32_t>(127 - bias) << 23);
  const std::uint32_t subnormal =
      bits_of(static_cast<float>(static_cast<std::int32_t>(magnitude)) * kSubnormalUnit);
  return select(magnitude < (1U << mantissa), subnormal, normal);
}

// The magnitude of an fp32 that is not a NaN to such a format, as if its exponent had no upper end:
// the caller caps the result. Below the smallest normal number the mantissa is shifted further;
// nothing is left of it after 25 places, where the shift stays.
template <int mantissa, int bias>
WL_HOST_DEVICE static inline std::uint32_t narrow(std::uint32_t magnitude) {
  constexpr std::int32_t kSmallestNormal = 127 - bias + 1;  // as an exponent of fp32
  const auto exponent = static_cast<std::int32_t>(magnitude >> 23);
  const std::uint32_t significand = (magnitude & 0x7fffffU) | 0x800000U;
  const auto shift = static_cast<std::uint32_t>(
      smaller(25, 23 - mantissa + larger(0, kSmallestNormal - exponent)));
  const std::uint32_t odd = (significand >> shift) & 1U;
  const std::uint32_t half = (1U << shift) >> 1;
  const std::uint32_t rounded = (significand + half - 1U + odd) >> shift;
  // A normal significand brings its own leading one, which is one step of the exponent.
  const auto steps = static_cast<std::uint32_t>(larger(0, exponent - kSmallestNormal));
  return rounded + (steps << mantissa);
}

// The bits of an element to the bits of the fp32 of the same value (fp64: of the nearest).
template <FloatFormat format>
WL_HOST_DEVICE static inline std::uint32_t decode(Bits<format> bits) {
  if constexpr (format == FloatFormat::kF64) {
    const std::uint64_t magnitude = bits & 0x7fffffffffffffffULL;
    const std::uint64_t sign = (bits ^ magnitude) >> 32;
    const bool nan = static_cast<std::int64_t>(magnitude) > 0x7ff0000000000000LL;
#if defined(__CUDA_ARCH__)
    const std::uint64_t value =
        __float_as_uint(__double2float_rn(__longlong_as_double(static_cast<long long>(magnitude))));
#else
    // As narrow() above, all in 64 bits. 2^128, infinity in fp32, stands for all beyond it.
    constexpr std::int64_t kSmallestNormal = 1023 - 127 + 1;
    const auto capped = static_cast<std::uint64_t>(
        smaller(static_cast<std::int64_t>(magnitude), std::int64_t{0x47f0000000000000}));
    const auto exponent = static_cast<std::int64_t>(capped >> 52);
    const std::uint64_t significand = (capped & 0xfffffffffffffULL) | 0x10000000000000ULL;
    const auto shift = static_cast<std::uint64_t>(
        smaller(std::int64_t{53}, 28 + larger(std::int64_t{0}, kSmallestNormal - exponent)));
    // One bit more than needed. (gcc does not vectorise a constant shifted by a variable here.)
    const std::uint64_t kept = significand >> shift;
    const auto lost = static_cast<std::uint64_t>((kept << shift) != significand);
    const std::uint64_t rounded = (kept + (((kept >> 1) & 1U) | lost)) >> 1;
    const auto steps =
        static_cast<std::uint64_t>(larger(std::int64_t{0}, exponent - kSmallestNormal));
    const std::uint64_t value = rounded + (steps << 23);
#endif
    return static_cast<std::uint32_t>(sign | select(nan, std::uint64_t{kF32Nan}, value));
  } else if constexpr (format == FloatFormat::kF32) {
    const std::uint32_t magnitude = bits & 0x7fffffffU;
    const bool nan = static_cast<std::int32_t>(magnitude) > kF32Infinity;
    return (bits & 0x80000000U) | select(nan, kF32Nan, magnitude);
  } else if constexpr (format == FloatFormat::kBf16) {
    return decode<FloatFormat::kF32>(static_cast<std::uint32_t>(bits) << 16);
  } else if constexpr (format == FloatFormat::kF16) {
    const std::uint32_t magnitude = bits & 0x7fffU;
    const std::uint32_t sign = (bits & 0x8000U) << 16;
    const std::uint32_t special = select(magnitude > 0x7c00U, kF32Nan, std::uint32_t{kF32Infinity});
    return sign | select(magnitude >= 0x7c00U, special, widen<10, 15>(magnitude));
  } else if constexpr (format == FloatFormat::kF8E4M3) {
    const std::uint32_t magnitude = bits & 0x7fU;
    const std::uint32_t sign = (bits & 0x80U) << 24;
    return sign | select(magnitude == 0x7fU, kF32Nan, widen<3, 7>(magnitude));
  } else {
    static_assert(format == FloatFormat::kF8E5M2);
    // The upper half of an fp16, as bf16 is of an fp32.
    return decode<FloatFormat::kF16>(static_cast<std::uint16_t>(bits << 8));
  }
}

// The bits of an fp32 to those of the nearest element, ties to even.
template <FloatFormat format>
WL_HOST_DEVICE static inline Bits<format> encode(std::uint32_t bits,
                                                 [[maybe_unused]] const Fp8Codes& codes) {
  const std::uint32_t magnitude = bits & 0x7fffffffU;
  const bool nan = static_cast<std::int32_t>(magnitude) > kF32Infinity;
  if constexpr (format == FloatFormat::kF64) {
    const std::uint64_t sign = static_cast<std::uint64_t>(bits & 0x80000000U) << 32;
    const std::uint64_t normal =
        (static_cast<std::uint64_t>(magnitude) << 29) + (std::uint64_t{1023 - 127} << 52);
    const std::uint64_t subnormal =
        bits_of(static_cast<double>(static_cast<std::int32_t>(magnitude)) * 0x1p-149);
    const std::uint64_t special =
        select(nan, std::uint64_t{0x7ff8000000000000}, std::uint64_t{0x7ff0000000000000});
    const std::uint64_t finite = select(magnitude < 0x800000U, subnormal, normal);
    return sign | select(static_cast<std::int32_t>(magnitude) >= kF32Infinity, special, finite);
  } else if constexpr (format == FloatFormat::kF32) {
    return (bits & 0x80000000U) | select(nan, kF32Nan, magnitude);
  } else if constexpr (format == FloatFormat::kBf16) {
    // A carry out of the largest number makes infinity.
    const std::uint32_t rounded = (magnitude + 0x7fffU + ((magnitude >> 16) & 1U)) >> 16;
    return static_cast<std::uint16_t>(((bits >> 16) & 0x8000U) | select(nan, 0x7fc0U, rounded));
  } else if constexpr (format == FloatFormat::kF16) {
    const auto rounded = static_cast<std::int32_t>(narrow<10, 15>(magnitude));
    const auto capped = static_cast<std::uint32_t>(smaller(rounded, 0x7c00));
    return static_cast<std::uint16_t>(((bits >> 16) & 0x8000U) | select(nan, 0x7e00U, capped));
  } else if constexpr (format == FloatFormat::kF8E4M3) {
    const std::uint32_t rounded = narrow<3, 7>(magnitude);
    const bool infinite = magnitude == static_cast<std::uint32_t>(kF32Infinity);
    const std::uint32_t beyond = select(infinite, codes.e4m3_infinity, codes.e4m3_overflow);
    const bool overflow = static_cast<std::int32_t>(rounded) > 0x7e;
    const std::uint32_t value = select(overflow, beyond, rounded);
    return static_cast<std::uint8_t>(((bits >> 24) & 0x80U) | select(nan, 0x7fU, value));
  } else {
    static_assert(format == FloatFormat::kF8E5M2);
    const std::uint32_t rounded = narrow<2, 15>(magnitude);
    const bool infinite = magnitude == static_cast<std::uint32_t>(kF32Infinity);
    const bool overflow = static_cast<std::int32_t>(rounded) > 0x7b;
    const std::uint32_t beyond = select(infinite, 0x7cU, codes.e5m2_overflow);
    const std::uint32_t value = select(overflow, beyond, rounded);
    return static_cast<std::uint8_t>(((bits >> 24) & 0x80U) | select(nan, 0x7fU, value));
  }
}

}  // namespace weightlift::convert
