#include "dtype.h"

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string_view>

namespace weightlift {
namespace {

struct DtypeRow {
  std::string_view name;
  std::uint32_t bits;
  bool floating;
};

// In the order of the enum.
constexpr std::array<DtypeRow, kDtypeCount> kRows = {{
    {"BOOL", 8, false},   {"F4", 4, true},          {"F6_E2M3", 6, true},     {"F6_E3M2", 6, true},
    {"U8", 8, false},     {"I8", 8, false},         {"F8_E5M2", 8, true},     {"F8_E4M3", 8, true},
    {"F8_E8M0", 8, true}, {"F8_E4M3FNUZ", 8, true}, {"F8_E5M2FNUZ", 8, true}, {"I16", 16, false},
    {"U16", 16, false},   {"F16", 16, true},        {"BF16", 16, true},       {"I32", 32, false},
    {"U32", 32, false},   {"F32", 32, true},        {"C64", 64, false},       {"F64", 64, true},
    {"I64", 64, false},   {"U64", 64, false},       {"C32", 32, false},       {"C128", 128, false},
}};

const DtypeRow& row(Dtype dtype) noexcept {
  return kRows[static_cast<std::size_t>(dtype)];
}

}  // namespace

std::uint32_t dtype_bits(Dtype dtype) noexcept {
  return row(dtype).bits;
}
std::string_view dtype_name(Dtype dtype) noexcept {
  return row(dtype).name;
}
bool dtype_is_floating(Dtype dtype) noexcept {
  return row(dtype).floating;
}

std::optional<Dtype> dtype_from_name(std::string_view name) noexcept {
  for (std::size_t i = 0; i < kRows.size(); ++i) {
    if (kRows[i].name == name) return static_cast<Dtype>(i);
  }
  return std::nullopt;
}

}  // namespace weightlift
