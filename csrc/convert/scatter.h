// The device side of a staged chunk: one host-to-device copy brings a chunk, one kernel takes its
// parts to their places, casting on the way. The table of tiles travels behind the data in the same
// copy.
#pragma once

#include <cstdint>
#include <span>

#include "convert/cast.h"

namespace weightlift::convert {

inline constexpr std::uint32_t kTileBytes = 16 * 1024;  // of the wider side of a tile

// A run of elements inside the chunk and where it goes. Read by scatter.cu: plain data only.
struct Tile {
  std::uint64_t source;  // bytes from the start of the chunk on the device, any alignment
  std::uint64_t target;  // device address, any alignment
  std::uint32_t count;   // elements; bytes for a copy
  std::uint32_t cast;    // tile_cast(from, to), or kTileCopy
};
static_assert(sizeof(Tile) == 24);

inline constexpr std::uint32_t kTileCopy = ~std::uint32_t{0};
[[nodiscard]] constexpr std::uint32_t tile_cast(FloatFormat from, FloatFormat to) noexcept {
  return static_cast<std::uint32_t>(static_cast<std::uint32_t>(from) * kFloatFormatCount +
                                    static_cast<std::uint32_t>(to));
}

// extern "C" __global__ void weightlift_scatter(const std::byte* chunk, std::uint64_t tiles_offset,
//                                               std::uint32_t tile_count, Fp8Rules rules)
// One block a tile. Bit-identical to the host casts. `tiles_offset` is a multiple of alignof(Tile),
// and so is the chunk's address.
inline constexpr const char* kScatterKernel = "weightlift_scatter";
inline constexpr std::uint32_t kScatterThreads = 256;

// The fat binary built from scatter.cu; empty where the build had no nvcc.
[[nodiscard]] std::span<const std::byte> scatter_image() noexcept;

// What the kernel does, on the host: the simulated driver runs it, tests compare with it.
void scatter_on_host(const std::byte* chunk, std::span<const Tile> tiles, const Fp8Rules& rules);

}  // namespace weightlift::convert
