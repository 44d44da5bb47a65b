// The element types of the safetensors 0.8 format, and those that only torch's own files have.
#pragma once

#include <cstdint>
#include <optional>
#include <string_view>

namespace weightlift {

enum class Dtype : std::uint8_t {
  kBool,
  kF4,
  kF6E2M3,
  kF6E3M2,
  kU8,
  kI8,
  kF8E5M2,
  kF8E4M3,
  kF8E8M0,
  kF8E4M3Fnuz,
  kF8E5M2Fnuz,
  kI16,
  kU16,
  kF16,
  kBf16,
  kI32,
  kU32,
  kF32,
  kC64,
  kF64,
  kI64,
  kU64,
  // Not in the safetensors format.
  kC32,
  kC128,
};
inline constexpr std::size_t kDtypeCount = 24;
inline constexpr std::size_t kSafetensorsDtypeCount = 22;

[[nodiscard]] std::uint32_t dtype_bits(Dtype dtype) noexcept;     // 4, 6, 8, 16, 32, 64, 128
[[nodiscard]] std::string_view dtype_name(Dtype dtype) noexcept;  // "BF16", "F8_E4M3"
[[nodiscard]] std::optional<Dtype> dtype_from_name(std::string_view name) noexcept;
[[nodiscard]] bool dtype_is_floating(Dtype dtype) noexcept;  // as torch's is_floating_point

// Bytes of one element. Only for dtypes whose elements are whole bytes.
[[nodiscard]] inline std::uint32_t dtype_bytes(Dtype dtype) noexcept {
  return dtype_bits(dtype) / 8;
}

}  // namespace weightlift
