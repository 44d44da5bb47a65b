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

// The compiled kernel for one architecture, or PTX that a driver compiles for newer ones.
struct KernelImage {
  int architecture = 0;  // 90 is compute capability 9.0
  bool is_ptx = false;
  const char* maker = "";              // "ptxas 12.9.86", "PTX 8.0"
  std::span<const std::byte> bytes{};  // an ELF file, or text that a zero follows
};

// Those built from scatter.cu, by architecture, PTX last; none where the build had no nvcc.
[[nodiscard]] std::span<const KernelImage> scatter_images() noexcept;
// What compiled them: "nvcc 13.0.88".
[[nodiscard]] const char* kernel_toolkit() noexcept;

// Whether a device can run an image: machine code runs within its major version, on what is as new
// or newer; PTX on all that is (CUDA C++ Programming Guide, "Binary Compatibility").
[[nodiscard]] constexpr bool runs_on(const KernelImage& image, int capability) noexcept {
  return image.architecture <= capability &&
         (image.is_ptx || image.architecture / 10 == capability / 10);
}

// What the kernel does, on the host: the simulated driver runs it, tests compare with it.
void scatter_on_host(const std::byte* chunk, std::span<const Tile> tiles, const Fp8Rules& rules);

}  // namespace weightlift::convert
