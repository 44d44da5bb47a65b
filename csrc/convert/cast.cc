#include "convert/cast.h"

#include <cstdint>
#include <optional>
#include <string_view>

#include "convert/cast_kernels.h"
#include "dtype.h"

#if defined(WEIGHTLIFT_CAST_X86)
#include <cpuid.h>
#elif defined(WEIGHTLIFT_CAST_NEON)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace weightlift::convert {

std::optional<FloatFormat> float_format(Dtype dtype) noexcept {
  switch (dtype) {
    case Dtype::kF64:
      return FloatFormat::kF64;
    case Dtype::kF32:
      return FloatFormat::kF32;
    case Dtype::kBf16:
      return FloatFormat::kBf16;
    case Dtype::kF16:
      return FloatFormat::kF16;
    case Dtype::kF8E4M3:
      return FloatFormat::kF8E4M3;
    case Dtype::kF8E5M2:
      return FloatFormat::kF8E5M2;
    default:
      return std::nullopt;
  }
}

std::uint32_t float_bytes(FloatFormat format) noexcept {
  switch (format) {
    case FloatFormat::kF64:
      return 8;
    case FloatFormat::kF32:
      return 4;
    case FloatFormat::kBf16:
    case FloatFormat::kF16:
      return 2;
    case FloatFormat::kF8E4M3:
    case FloatFormat::kF8E5M2:
      return 1;
  }
  return 0;
}

#if defined(WEIGHTLIFT_CAST_X86)

namespace {

// By cpuid, because __builtin_cpu_supports of some clang versions does not know "f16c". Whether the
// system saves the wide registers is the same question as for AVX2.
bool has_f16c() noexcept {
  unsigned a = 0;
  unsigned b = 0;
  unsigned c = 0;
  unsigned d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
}

Isa find_best_isa() noexcept {
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !has_f16c()) return Isa::kBaseline;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return avx512 ? Isa::kAvx512 : Isa::kAvx2;
}

}  // namespace

Isa best_isa() noexcept {
  static const Isa isa = find_best_isa();
  return isa;
}

HostCast host_cast_for(Isa isa, FloatFormat from, FloatFormat to) noexcept {
  switch (isa) {
    case Isa::kAvx512:
      return avx512::kernel(from, to);
    case Isa::kAvx2:
      return avx2::kernel(from, to);
    case Isa::kBaseline:
    case Isa::kNeon:
      break;
  }
  return baseline::kernel(from, to);
}

#elif defined(WEIGHTLIFT_CAST_NEON)

// NEON is optional in the architecture; the kernel says whether it exists (Linux, "ARM64 ELF
// hwcaps").
Isa best_isa() noexcept {
  static const Isa isa = (getauxval(AT_HWCAP) & HWCAP_ASIMD) != 0 ? Isa::kNeon : Isa::kBaseline;
  return isa;
}

HostCast host_cast_for(Isa isa, FloatFormat from, FloatFormat to) noexcept {
  return isa == Isa::kNeon ? neon::kernel(from, to) : baseline::kernel(from, to);
}

#else

Isa best_isa() noexcept {
  return Isa::kBaseline;
}

HostCast host_cast_for(Isa, FloatFormat from, FloatFormat to) noexcept {
  return baseline::kernel(from, to);
}

#endif

HostCast host_cast(FloatFormat from, FloatFormat to) noexcept {
  return host_cast_for(best_isa(), from, to);
}

std::string_view isa_name(Isa isa) noexcept {
  switch (isa) {
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kNeon:
      return "neon";
    case Isa::kBaseline:
      break;
  }
  return "baseline";
}

}  // namespace weightlift::convert
