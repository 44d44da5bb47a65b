// The device side of a staged chunk: one host-to-device copy brings the chunk, and one kernel
// copies or casts its parts to their targets. The table of tiles follows the data in the same copy.
#pragma once

#include <cstdint>
#include <span>

#include "convert/cast.h"

namespace weightlift::convert {

inline constexpr std::uint32_t kTileBytes = 16 * 1024;  // the wider side of a tile

// A run of elements in the chunk and its target. scatter.cu reads it, so it is plain data.
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
// One block for each tile. Bit-identical to the host casts. `tiles_offset` and the chunk's address
// are multiples of alignof(Tile).
inline constexpr const char* kScatterKernel = "weightlift_scatter";
inline constexpr std::uint32_t kScatterThreads = 256;

// The compiled kernel for one architecture, or PTX that a driver compiles for newer ones.
struct KernelImage {
  int architecture = 0;  // 90 is compute capability 9.0
  bool is_ptx = false;
  const char* maker = "";              // "ptxas 12.9.86", "PTX 8.0"
  std::span<const std::byte> bytes{};  // an ELF file, or zero-terminated text
};

// The images built from scatter.cu, by architecture, PTX last; none if the build had no nvcc.
[[nodiscard]] std::span<const KernelImage> scatter_images() noexcept;
// The compiler of the images: "nvcc 13.0.88".
[[nodiscard]] const char* kernel_toolkit() noexcept;

// Whether a device can run an image. PTX runs on its own and all newer compute capabilities;
// machine code only on those with the same major version (CUDA C++ Programming Guide, "Binary
// Compatibility").
[[nodiscard]] constexpr bool runs_on(const KernelImage& image, int capability) noexcept {
  return image.architecture <= capability &&
         (image.is_ptx || image.architecture / 10 == capability / 10);
}

// Does on the host what the kernel does. The simulated driver runs it, and tests compare with it.
void scatter_on_host(const std::byte* chunk, std::span<const Tile> tiles, const Fp8Rules& rules);

}  // namespace weightlift::convert
