// The only definition of the casts, for the host loops, the CUDA kernel and the simulated device.
// Every cast goes through the bits of an fp32 number, as in torch: from fp64 to a narrow format
// that means two roundings, which must be the same two.
//
// The code uses integer arithmetic and selects, and int-to-float conversions only if their results
// are exact, normal numbers. So results depend neither on flush-to-zero and denormals-are-zero
// (torch.set_flush_denormal sets both) nor on the rounding mode, and compilers can vectorise the
// loops.
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

// All functions are static, because units for different instruction sets include this file: with
// external linkage, the linker would keep one copy for all of them.

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

// Fp8Rules as the bits to store, so that the loops select values instead of testing flags.
struct Fp8Codes {
  std::uint32_t e4m3_overflow;
  std::uint32_t e4m3_infinity;
  std::uint32_t e5m2_overflow;
};

WL_HOST_DEVICE static inline Fp8Codes fp8_codes(const Fp8Rules& rules) {
  return {rules.e4m3_saturates ? 0x7eU : 0x7fU, rules.e4m3_infinity_saturates ? 0x7eU : 0x7fU,
          rules.e5m2_saturates ? 0x7bU : 0x7cU};
}

// Masks instead of `?:`, because compilers keep branches around floating-point operations that
// might trap, and then do not vectorise the loop.
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

// Not std::bit_cast: if it is not inlined, it has external linkage (see above).
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

// Converts a magnitude in a format with `mantissa` stored bits, at most 8 exponent bits and this
// bias to fp32 bits. Subnormals are integers times a power of two. An exponent of all ones becomes
// a large finite number, which the caller must replace.
template <int mantissa, int bias>
WL_HOST_DEVICE static inline std::uint32_t widen(std::uint32_t magnitude) {
  constexpr float kSubnormalUnit = 1.0F / static_cast<float>(1U << (bias - 1 + mantissa));
  const std::uint32_t normal =
      (magnitude << (23 - mantissa)) + (static_cast<std::uint32_t>(127 - bias) << 23);
  const std::uint32_t subnormal =
      bits_of(static_cast<float>(static_cast<std::int32_t>(magnitude)) * kSubnormalUnit);
  return select(magnitude < (1U << mantissa), subnormal, normal);
}

// Converts the magnitude of an fp32 that is not a NaN to such a format, as if the exponent had no
// upper limit: the caller must cap the result. Below the smallest normal number the mantissa is
// shifted further, up to 25 places, which leave nothing of it.
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
  // The leading one of a normal significand adds one step to the exponent.
  const auto steps = static_cast<std::uint32_t>(larger(0, exponent - kSmallestNormal));
  return rounded + (steps << mantissa);
}

// Converts the bits of an element to those of the fp32 with the same value (for fp64, the nearest
// value).
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
    // Like narrow(), in 64 bits. Larger values are capped at 2^128, which is infinity in fp32.
    constexpr std::int64_t kSmallestNormal = 1023 - 127 + 1;
    const auto capped = static_cast<std::uint64_t>(
        smaller(static_cast<std::int64_t>(magnitude), std::int64_t{0x47f0000000000000}));
    const auto exponent = static_cast<std::int64_t>(capped >> 52);
    const std::uint64_t significand = (capped & 0xfffffffffffffULL) | 0x10000000000000ULL;
    const auto shift = static_cast<std::uint64_t>(
        smaller(std::int64_t{53}, 28 + larger(std::int64_t{0}, kSmallestNormal - exponent)));
    // Keeps one bit more than needed, because GCC does not vectorise a constant that is shifted by
    // a variable.
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
    // e5m2 is the upper half of an fp16, as bf16 is of an fp32.
    return decode<FloatFormat::kF16>(static_cast<std::uint16_t>(bits << 8));
  }
}

// Converts the bits of an fp32 to those of the nearest element, ties to even.
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
    // Rounding up the largest number gives infinity.
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
