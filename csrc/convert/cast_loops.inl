// The loops of every host cast, compiled once for each instruction set: the unit that includes this
// defines WL_CAST_ISA, and its compiler flags do the rest.
//
// All of it but kernel() is in an anonymous namespace, and nothing of std:: that is code is used:
// an inline function with external linkage would be compiled with AVX-512 here, and the linker
// might keep that copy for callers on every CPU.

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "convert/cast_kernels.h"
#include "convert/float_formats.h"

namespace weightlift::convert::WL_CAST_ISA {
namespace {

constexpr std::size_t kLine = 64;

// Elements of fp32 that pass between two loops, and bytes that wait for streaming stores: small
// enough to stay in the first-level cache together with the source that comes in.
constexpr std::size_t kBetween = 1024;
constexpr std::size_t kWaiting = 4096;

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

// Where the CPU converts fp16 itself, that is the fastest way; the conversions neither flush
// subnormals nor heed the rounding mode (the immediate says nearest), but they keep a NaN's
// payload, so NaNs are made the one NaN beforehand or afterwards. Not VCVTNEPS2BF16 for bf16: it
// flushes subnormals (Intel SDM, volume 2). Both functions return how many elements they have done;
// the plain loops do the rest.
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

#else

inline std::size_t decode_f16(const std::byte*, std::byte*, std::size_t) {
  return 0;
}
inline std::size_t encode_f16(const std::byte*, std::byte*, std::size_t) {
  return 0;
}

#endif

// Not inlined: the 36 pairs share them.
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

// Five loops in and five out make all pairs: the trip of the fp32 bits through the first-level
// cache is little beside the memory's own time.
template <FloatFormat from, FloatFormat to>
void cast_cached(const std::byte* source, std::byte* target, std::size_t count,
                 const Fp8Rules& rules) {
  if constexpr (from == to) {
    if (count != 0) memcpy(target, source, count * sizeof(Bits<from>));
  } else if constexpr (to == FloatFormat::kF32) {
    decode_all<from>(source, target, count);
  } else if constexpr (from == FloatFormat::kF32) {
    encode_all<to>(source, target, count, rules);
  } else {
    alignas(kLine) std::byte between[kBetween * 4];
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

#if defined(__x86_64__)

// Whole lines, so that each leaves the write-combining buffer at once. The target is aligned to
// one.
inline void stream_lines(const std::byte* source, std::byte* target, std::size_t bytes) {
  for (std::size_t i = 0; i < bytes; i += kLine) {
#if defined(__AVX512F__)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(target + i), _mm512_loadu_si512(source + i));
#elif defined(__AVX2__)
    for (std::size_t j = i; j < i + kLine; j += 32) {
      _mm256_stream_si256(reinterpret_cast<__m256i*>(target + j),
                          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source + j)));
    }
#else
    for (std::size_t j = i; j < i + kLine; j += 16) {
      _mm_stream_si128(reinterpret_cast<__m128i*>(target + j),
                       _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + j)));
    }
#endif
  }
}

template <FloatFormat from, FloatFormat to>
void cast_streaming(const std::byte* source, std::byte* target, std::size_t count,
                    const Fp8Rules& rules) {
  // A copy has no elements to keep whole, so it can begin a line anywhere.
  constexpr std::size_t kFrom = from == to ? 1 : sizeof(Bits<from>);
  constexpr std::size_t kTo = from == to ? 1 : sizeof(Bits<to>);
  if constexpr (from == to) count *= sizeof(Bits<to>);
  const auto cast = [&rules](const std::byte* in, std::byte* out, std::size_t elements) {
    if constexpr (from == to) {
      if (elements != 0) memcpy(out, in, elements);
    } else {
      cast_cached<from, to>(in, out, elements, rules);
    }
  };

  const std::size_t to_line = (kLine - reinterpret_cast<std::uintptr_t>(target) % kLine) % kLine;
  const std::size_t head = to_line / kTo;
  if (to_line % kTo != 0 || head >= count) {
    cast(source, target, count);
    return;
  }
  cast(source, target, head);
  source += head * kFrom;
  target += head * kTo;
  count -= head;

  constexpr std::size_t kPerLine = kLine / kTo;
  std::size_t body = count / kPerLine * kPerLine;
  count -= body;
  if constexpr (from == to) {
    stream_lines(source, target, body);
    source += body;
    target += body;
  } else {
    alignas(kLine) std::byte waiting[kWaiting];
    while (body != 0) {
      const std::size_t now = body < kWaiting / kTo ? body : kWaiting / kTo;
      cast(source, waiting, now);
      stream_lines(waiting, target, now * kTo);
      source += now * kFrom;
      target += now * kTo;
      body -= now;
    }
  }
  cast(source, target, count);
  _mm_sfence();  // before anything that tells another thread or a device that the bytes are there
}

#else

template <FloatFormat from, FloatFormat to>
void cast_streaming(const std::byte* source, std::byte* target, std::size_t count,
                    const Fp8Rules& rules) {
  cast_cached<from, to>(source, target, count, rules);
}

#endif

template <FloatFormat from, FloatFormat to>
HostCast of_stores(Stores stores) noexcept {
  return stores == Stores::kStreaming ? &cast_streaming<from, to> : &cast_cached<from, to>;
}

template <FloatFormat from>
HostCast of_target(FloatFormat to, Stores stores) noexcept {
  switch (to) {
    case FloatFormat::kF64:
      return of_stores<from, FloatFormat::kF64>(stores);
    case FloatFormat::kF32:
      return of_stores<from, FloatFormat::kF32>(stores);
    case FloatFormat::kBf16:
      return of_stores<from, FloatFormat::kBf16>(stores);
    case FloatFormat::kF16:
      return of_stores<from, FloatFormat::kF16>(stores);
    case FloatFormat::kF8E4M3:
      return of_stores<from, FloatFormat::kF8E4M3>(stores);
    case FloatFormat::kF8E5M2:
      return of_stores<from, FloatFormat::kF8E5M2>(stores);
  }
  return nullptr;
}

}  // namespace

HostCast kernel(FloatFormat from, FloatFormat to, Stores stores) noexcept {
  switch (from) {
    case FloatFormat::kF64:
      return of_target<FloatFormat::kF64>(to, stores);
    case FloatFormat::kF32:
      return of_target<FloatFormat::kF32>(to, stores);
    case FloatFormat::kBf16:
      return of_target<FloatFormat::kBf16>(to, stores);
    case FloatFormat::kF16:
      return of_target<FloatFormat::kF16>(to, stores);
    case FloatFormat::kF8E4M3:
      return of_target<FloatFormat::kF8E4M3>(to, stores);
    case FloatFormat::kF8E5M2:
      return of_target<FloatFormat::kF8E5M2>(to, stores);
  }
  return nullptr;
}

}  // namespace weightlift::convert::WL_CAST_ISA
