// The kernel of scatter.h. It casts with float_formats.h, so the bits are those of the host.
// Compile it without -use_fast_math, whose flush-to-zero loses subnormals.
//
// A chunk arrives over a bus of tens of GB/s in device memory of hundreds to thousands of GB/s. So
// one element per thread and iteration is fast enough, and keeps the code for 30 pairs and all
// alignments small.

#include <cstddef>
#include <cstdint>

#include "convert/float_formats.h"
#include "convert/scatter.h"

// Tests also compile this file as C++, where compilers warn about the pragma.
#if defined(__CUDACC__)
#define WL_LOOP(how) _Pragma(how)
#else
#define WL_LOOP(how)
#endif

namespace weightlift::convert {
namespace {

__device__ bool aligned(const std::byte* address, std::uint32_t alignment) {
  return reinterpret_cast<std::uintptr_t>(address) % alignment == 0;
}

// Tensors need not be aligned in a file, nor elements in a chunk, and a GPU faults on a misaligned
// access. `whole` has the same value for all threads of a block.
template <class T>
__device__ T load(const std::byte* from, bool whole) {
  if (whole) return *reinterpret_cast<const T*>(from);
  T value = 0;
  WL_LOOP("unroll")
  for (std::uint32_t i = 0; i < sizeof(T); ++i) {
    value = static_cast<T>(value | static_cast<T>(from[i]) << (8 * i));
  }
  return value;
}

template <class T>
__device__ void store(std::byte* to, T value, bool whole) {
  if (whole) {
    *reinterpret_cast<T*>(to) = value;
    return;
  }
  WL_LOOP("unroll")
  for (std::uint32_t i = 0; i < sizeof(T); ++i) to[i] = static_cast<std::byte>(value >> (8 * i));
}

// __restrict__, because targets never lie in the chunk: reads may run ahead of writes and use the
// read-only path.
template <FloatFormat from, FloatFormat to>
__device__ void cast(const std::byte* __restrict__ source, std::byte* __restrict__ target,
                     std::uint32_t count, const Fp8Codes& codes) {
  if constexpr (from == to) return;  // copy() does these
  const bool whole_source = aligned(source, sizeof(Bits<from>));
  const bool whole_target = aligned(target, sizeof(Bits<to>));
  WL_LOOP("unroll 1")
  for (std::uint32_t i = threadIdx.x; i < count; i += kScatterThreads) {
    const auto bits = load<Bits<from>>(source + i * sizeof(Bits<from>), whole_source);
    store(target + i * sizeof(Bits<to>), encode<to>(decode<from>(bits), codes), whole_target);
  }
}

template <class T>
__device__ void copy_body(const std::byte* __restrict__ source, std::byte* __restrict__ target,
                          std::uint32_t count) {
  const auto* __restrict__ in = reinterpret_cast<const T*>(source);
  auto* __restrict__ out = reinterpret_cast<T*>(target);
  WL_LOOP("unroll 4")
  for (std::uint32_t i = threadIdx.x; i < count; i += kScatterThreads) out[i] = in[i];
}

// Copies with the widest word on which both addresses can be aligned together.
__device__ void copy(const std::byte* source, std::byte* target, std::uint32_t bytes) {
  const auto apart =
      reinterpret_cast<std::uintptr_t>(source) ^ reinterpret_cast<std::uintptr_t>(target);
  const std::uint32_t word = apart % 16 == 0  ? 16
                             : apart % 8 == 0 ? 8
                             : apart % 4 == 0 ? 4
                             : apart % 2 == 0 ? 2
                                              : 1;
  const auto past = static_cast<std::uint32_t>(reinterpret_cast<std::uintptr_t>(target) % word);
  const std::uint32_t to_word = past == 0 ? 0 : word - past;
  const std::uint32_t head = to_word < bytes ? to_word : bytes;
  const std::uint32_t words = (bytes - head) / word;
  const std::uint32_t tail = head + words * word;
  copy_body<std::uint8_t>(source, target, head);
  source += head;
  target += head;
  switch (word) {
    case 16:
      copy_body<uint4>(source, target, words);
      break;
    case 8:
      copy_body<std::uint64_t>(source, target, words);
      break;
    case 4:
      copy_body<std::uint32_t>(source, target, words);
      break;
    case 2:
      copy_body<std::uint16_t>(source, target, words);
      break;
    default:
      copy_body<std::uint8_t>(source, target, words);
      break;
  }
  copy_body<std::uint8_t>(source + (tail - head), target + (tail - head), bytes - tail);
}

template <FloatFormat from>
__device__ void cast_from(FloatFormat to, const std::byte* source, std::byte* target,
                          std::uint32_t count, const Fp8Codes& codes) {
  switch (to) {
    case FloatFormat::kF64:
      return cast<from, FloatFormat::kF64>(source, target, count, codes);
    case FloatFormat::kF32:
      return cast<from, FloatFormat::kF32>(source, target, count, codes);
    case FloatFormat::kBf16:
      return cast<from, FloatFormat::kBf16>(source, target, count, codes);
    case FloatFormat::kF16:
      return cast<from, FloatFormat::kF16>(source, target, count, codes);
    case FloatFormat::kF8E4M3:
      return cast<from, FloatFormat::kF8E4M3>(source, target, count, codes);
    case FloatFormat::kF8E5M2:
      return cast<from, FloatFormat::kF8E5M2>(source, target, count, codes);
  }
}

__device__ std::uint32_t bytes_of(FloatFormat format) {
  return format == FloatFormat::kF64                                   ? 8
         : format == FloatFormat::kF32                                 ? 4
         : format == FloatFormat::kBf16 || format == FloatFormat::kF16 ? 2
                                                                       : 1;
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kScatterThreads)
    weightlift_scatter(const std::byte* chunk, std::uint64_t tiles_offset, std::uint32_t tile_count,
                       Fp8Rules rules) {
  if (blockIdx.x >= tile_count) return;
  const Tile tile = reinterpret_cast<const Tile*>(chunk + tiles_offset)[blockIdx.x];
  const std::byte* source = chunk + tile.source;
  auto* target = reinterpret_cast<std::byte*>(tile.target);
  const auto from = static_cast<FloatFormat>(tile.cast / kFloatFormatCount);
  const auto to = static_cast<FloatFormat>(tile.cast % kFloatFormatCount);
  if (tile.cast == kTileCopy || from == to) {
    copy(source, target, tile.cast == kTileCopy ? tile.count : tile.count * bytes_of(to));
    return;
  }
  const Fp8Codes codes = fp8_codes(rules);
  switch (from) {
    case FloatFormat::kF64:
      return cast_from<FloatFormat::kF64>(to, source, target, tile.count, codes);
    case FloatFormat::kF32:
      return cast_from<FloatFormat::kF32>(to, source, target, tile.count, codes);
    case FloatFormat::kBf16:
      return cast_from<FloatFormat::kBf16>(to, source, target, tile.count, codes);
    case FloatFormat::kF16:
      return cast_from<FloatFormat::kF16>(to, source, target, tile.count, codes);
    case FloatFormat::kF8E4M3:
      return cast_from<FloatFormat::kF8E4M3>(to, source, target, tile.count, codes);
    case FloatFormat::kF8E5M2:
      return cast_from<FloatFormat::kF8E5M2>(to, source, target, tile.count, codes);
  }
}

}  // namespace weightlift::convert
