// The loops of all host casts, compiled once for each instruction set. The including unit defines
// WL_CAST_ISA, and its compiler flags select the instructions.
//
// All of it except kernel() is in an anonymous namespace, and no functions of std:: are used: an
// inline function with external linkage would be compiled with AVX-512 here, and the linker might
// keep that copy for callers on all CPUs.

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(WL_CAST_NEON)
#include <arm_neon.h>
#endif

#include "convert/cast_kernels.h"
#include "convert/float_formats.h"

namespace weightlift::convert::WL_CAST_ISA {
namespace {

// fp32 elements between two loops: few enough to stay in the first-level cache beside the source.
constexpr std::size_t kBetween = 1024;

// Loads and stores of any alignment.
template <class T>
inline T load(const std::byte* from) {
  T value;
  memcpy(&value, from, sizeof(T));
  return value;
}
template <class T>
inline void store(std::byte* to, T value) {
  memcpy(to, &value, sizeof(T));
}

// The CPU's fp16 conversions are the fastest way. They neither flush subnormals nor follow the
// rounding mode (the immediate selects nearest), but keep a NaN's payload, so one_nan() replaces
// NaNs before or after. VCVTNEPS2BF16 is not used for bf16, because it flushes subnormals (Intel
// SDM, volume 2). Both functions return the number of elements they have converted; the plain loops
// convert the rest.
#if defined(__AVX512F__)

inline __m512i one_nan(__m512i bits) {
  const __m512i magnitude = _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff));
  const __mmask16 nan = _mm512_cmpgt_epi32_mask(magnitude, _mm512_set1_epi32(kF32Infinity));
  const __m512i sign = _mm512_andnot_si512(_mm512_set1_epi32(0x7fffffff), bits);
  return _mm512_mask_or_epi32(bits, nan, sign, _mm512_set1_epi32(static_cast<int>(kF32Nan)));
}

inline std::size_t decode_f16(const std::byte* source, std::byte* target, std::size_t count) {
  std::size_t i = 0;
  for (; i + 16 <= count; i += 16) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source + i * 2));
    _mm512_storeu_si512(target + i * 4, one_nan(_mm512_castps_si512(_mm512_cvtph_ps(half))));
  }
  return i;
}

inline std::size_t encode_f16(const std::byte* source, std::byte* target, std::size_t count) {
  std::size_t i = 0;
  for (; i + 16 <= count; i += 16) {
    const __m512 value = _mm512_castsi512_ps(one_nan(_mm512_loadu_si512(source + i * 4)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(target + i * 2),
                        _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  return i;
}

#elif defined(__AVX2__)

inline __m256i one_nan(__m256i bits) {
  const __m256i magnitude = _mm256_and_si256(bits, _mm256_set1_epi32(0x7fffffff));
  const __m256i nan = _mm256_cmpgt_epi32(magnitude, _mm256_set1_epi32(kF32Infinity));
  const __m256i sign = _mm256_andnot_si256(_mm256_set1_epi32(0x7fffffff), bits);
  const __m256i quiet = _mm256_or_si256(sign, _mm256_set1_epi32(static_cast<int>(kF32Nan)));
  return _mm256_blendv_epi8(bits, quiet, nan);
}

inline std::size_t decode_f16(const std::byte* source, std::byte* target, std::size_t count) {
  std::size_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i * 2));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(target + i * 4),
                        one_nan(_mm256_castps_si256(_mm256_cvtph_ps(half))));
  }
  return i;
}

inline std::size_t encode_f16(const std::byte* source, std::byte* target, std::size_t count) {
  std::size_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source + i * 4));
    _mm_storeu_si128(
        reinterpret_cast<__m128i*>(target + i * 2),
        _mm256_cvtps_ph(_mm256_castsi256_ps(one_nan(bits)), _MM_FROUND_TO_NEAREST_INT));
  }
  return i;
}

#elif defined(WL_CAST_NEON)

// FCVTN and FCVTL follow the thread's rounding mode, flush-to-zero and the alternative half format
// (Arm ARM, FPCR), so this sets the defaults for a scope. Both writes clobber memory, so that the
// compiler moves no load before the first and no store after the second.
class DefaultEnvironment {
 public:
  DefaultEnvironment() noexcept {
    __asm__ volatile("mrs %0, fpcr" : "=r"(before_));
    __asm__ volatile("msr fpcr, %0" : : "r"(std::uint64_t{0}) : "memory");
  }
  ~DefaultEnvironment() { __asm__ volatile("msr fpcr, %0" : : "r"(before_) : "memory"); }
  DefaultEnvironment(const DefaultEnvironment&) = delete;
  DefaultEnvironment& operator=(const DefaultEnvironment&) = delete;

 private:
  std::uint64_t before_;
};

inline uint32x4_t one_nan(uint32x4_t bits) {
  const uint32x4_t magnitude = vandq_u32(bits, vdupq_n_u32(0x7fffffff));
  const uint32x4_t nan = vcgtq_u32(magnitude, vdupq_n_u32(kF32Infinity));
  const uint32x4_t sign = vandq_u32(bits, vdupq_n_u32(0x80000000));
  return vbslq_u32(nan, vorrq_u32(sign, vdupq_n_u32(kF32Nan)), bits);
}

inline std::size_t decode_f16(const std::byte* source, std::byte* target, std::size_t count) {
  const DefaultEnvironment environment;
  std::size_t i = 0;
  for (; i + 4 <= count; i += 4) {
    const float16x4_t half = vreinterpret_f16_u16(load<uint16x4_t>(source + i * 2));
    store(target + i * 4, one_nan(vreinterpretq_u32_f32(vcvt_f32_f16(half))));
  }
  return i;
}

inline std::size_t encode_f16(const std::byte* source, std::byte* target, std::size_t count) {
  const DefaultEnvironment environment;
  std::size_t i = 0;
  for (; i + 4 <= count; i += 4) {
    const float32x4_t value = vreinterpretq_f32_u32(one_nan(load<uint32x4_t>(source + i * 4)));
    store(target + i * 2, vreinterpret_u16_f16(vcvt_f16_f32(value)));
  }
  return i;
}

#else

inline std::size_t decode_f16(const std::byte*, std::byte*, std::size_t) {
  return 0;
}
inline std::size_t encode_f16(const std::byte*, std::byte*, std::size_t) {
  return 0;
}

#endif

// Not inlined, because the 36 pairs share these functions.
template <FloatFormat from>
[[gnu::noinline]] void decode_all(const std::byte* __restrict source, std::byte* __restrict target,
                                  std::size_t count) {
  std::size_t i = 0;
  if constexpr (from == FloatFormat::kF16) i = decode_f16(source, target, count);
  for (; i < count; ++i) {
    store(target + i * 4, decode<from>(load<Bits<from>>(source + i * sizeof(Bits<from>))));
  }
}

template <FloatFormat to>
[[gnu::noinline]] void encode_all(const std::byte* __restrict source, std::byte* __restrict target,
                                  std::size_t count, const Fp8Rules& rules) {
  const Fp8Codes codes = fp8_codes(rules);
  std::size_t i = 0;
  if constexpr (to == FloatFormat::kF16) i = encode_f16(source, target, count);
  for (; i < count; ++i) {
    store(target + i * sizeof(Bits<to>), encode<to>(load<std::uint32_t>(source + i * 4), codes));
  }
}

// Five decoders and five encoders make all pairs. Passing the fp32 bits through the first-level
// cache costs little compared with the memory accesses.
template <FloatFormat from, FloatFormat to>
void cast(const std::byte* source, std::byte* target, std::size_t count, const Fp8Rules& rules) {
  if constexpr (from == to) {
    if (count != 0) memcpy(target, source, count * sizeof(Bits<from>));
  } else if constexpr (to == FloatFormat::kF32) {
    decode_all<from>(source, target, count);
  } else if constexpr (from == FloatFormat::kF32) {
    encode_all<to>(source, target, count, rules);
  } else {
    alignas(64) std::byte between[kBetween * 4];
    while (count != 0) {
      const std::size_t now = count < kBetween ? count : kBetween;
      decode_all<from>(source, between, now);
      encode_all<to>(between, target, now, rules);
      source += now * sizeof(Bits<from>);
      target += now * sizeof(Bits<to>);
      count -= now;
    }
  }
}

template <FloatFormat from>
HostCast of_target(FloatFormat to) noexcept {
  switch (to) {
    case FloatFormat::kF64:
      return &cast<from, FloatFormat::kF64>;
    case FloatFormat::kF32:
      return &cast<from, FloatFormat::kF32>;
    case FloatFormat::kBf16:
      return &cast<from, FloatFormat::kBf16>;
    case FloatFormat::kF16:
      return &cast<from, FloatFormat::kF16>;
    case FloatFormat::kF8E4M3:
      return &cast<from, FloatFormat::kF8E4M3>;
    case FloatFormat::kF8E5M2:
      return &cast<from, FloatFormat::kF8E5M2>;
  }
  return nullptr;
}

}  // namespace

HostCast kernel(FloatFormat from, FloatFormat to) noexcept {
  switch (from) {
    case FloatFormat::kF64:
      return of_target<FloatFormat::kF64>(to);
    case FloatFormat::kF32:
      return of_target<FloatFormat::kF32>(to);
    case FloatFormat::kBf16:
      return of_target<FloatFormat::kBf16>(to);
    case FloatFormat::kF16:
      return of_target<FloatFormat::kF16>(to);
    case FloatFormat::kF8E4M3:
      return of_target<FloatFormat::kF8E4M3>(to);
    case FloatFormat::kF8E5M2:
      return of_target<FloatFormat::kF8E5M2>(to);
  }
  return nullptr;
}

}  // namespace weightlift::convert::WL_CAST_ISA
