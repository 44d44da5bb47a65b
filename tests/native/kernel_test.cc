// Runs the kernel's source with blocks and threads in any order, under ASan and UBSan with
// alignment checks, on random tables of tiles. The kernel has no barriers and no shared memory, so
// running each thread to its end is an order that a GPU may choose.
//
// Built twice: as the host compiles float_formats.h, and (WL_CUDA_ARM) with __CUDA_ARCH__ and
// replacements for CUDA's intrinsics. Runs for WEIGHTLIFT_KERNEL_SECONDS, by default 1 s.
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "convert/cast.h"

#if defined(WL_CUDA_ARM)
#define __CUDA_ARCH__ 900
namespace {
// "Round-to-nearest-even mode" (CUDA Math API), which is the host's mode here too.
float __double2float_rn(double value) {
  return static_cast<float>(value);
}
std::uint32_t __float_as_uint(float value) {
  return std::bit_cast<std::uint32_t>(value);
}
double __longlong_as_double(long long value) {
  return std::bit_cast<double>(value);
}
}  // namespace
#endif
#define __global__
#define __device__
#define __launch_bounds__(threads)
namespace {
struct Coordinates {
  std::uint32_t x;
};
Coordinates threadIdx;
Coordinates blockIdx;
struct alignas(16) uint4 {
  std::uint32_t x, y, z, w;
};
}  // namespace
#include "convert/scatter.cu"

namespace weightlift::convert {
namespace {

class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed) {}
  std::uint64_t next() {  // splitmix64
    std::uint64_t z = (state_ += 0x9E3779B97F4A7C15U);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9U;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBU;
    return z ^ (z >> 31);
  }
  std::uint64_t below(std::uint64_t bound) { return next() % bound; }

 private:
  std::uint64_t state_;
};

std::size_t bytes(std::uint32_t format) {
  return float_bytes(static_cast<FloatFormat>(format));
}

// A tile with its own memory, which ends at the tile's last byte. ASan finds writes after it; the
// test finds writes before it.
struct Target {
  std::unique_ptr<std::byte[]> memory;
  std::size_t at = 0;
  std::size_t size = 0;
  std::vector<std::byte> expected;
};

struct Table {
  std::vector<std::byte> data;
  std::vector<Tile> tiles;
  std::vector<Target> targets;
  Fp8Rules rules;

  explicit Table(Random& random) {
    rules = {.e4m3_saturates = random.below(2) != 0,
             .e4m3_infinity_saturates = random.below(2) != 0,
             .e5m2_saturates = random.below(2) != 0};
    const std::uint64_t count = 1 + random.below(12);
    for (std::uint64_t i = 0; i < count; ++i) add(random);
  }

  void add(Random& random) {
    constexpr auto kFormats = static_cast<std::uint32_t>(kFloatFormatCount);
    const bool copies = random.below(4) == 0;
    const auto from = static_cast<std::uint32_t>(random.below(kFormats));
    const auto to = static_cast<std::uint32_t>(random.below(kFormats));
    const std::size_t in = copies ? 1 : bytes(from);
    const std::size_t out = copies ? 1 : bytes(to);
    const std::uint64_t most = kTileBytes / std::max(in, out);
    const std::uint64_t elements = random.below(4) == 0
                                       ? random.below(most + 1)
                                       : random.below(std::min<std::uint64_t>(most, 700));
    data.resize(data.size() + random.below(33), std::byte{0xee});
    const std::size_t source = data.size();
    for (std::size_t i = 0; i < elements * in; ++i) {
      data.push_back(static_cast<std::byte>(random.next() >> 17));
    }
    Target target;
    target.at = 1 + random.below(40);
    target.size = elements * out;
    target.memory = std::make_unique<std::byte[]>(target.at + target.size);
    std::fill_n(target.memory.get(), target.at + target.size, std::byte{0xd7});
    target.expected.resize(target.size);
    if (copies) {
      std::copy_n(data.data() + source, target.size, target.expected.data());
    } else if (from == to) {
      std::copy_n(data.data() + source, target.size, target.expected.data());
    } else {
      host_cast_for(Isa::kBaseline, static_cast<FloatFormat>(from), static_cast<FloatFormat>(to))(
          data.data() + source, target.expected.data(), elements, rules);
    }
    tiles.push_back(
        {.source = source,
         .target = reinterpret_cast<std::uint64_t>(target.memory.get() + target.at),
         .count = static_cast<std::uint32_t>(elements),
         .cast = copies ? kTileCopy
                        : tile_cast(static_cast<FloatFormat>(from), static_cast<FloatFormat>(to))});
    targets.push_back(std::move(target));
  }
};

void run_in_any_order(const Table& table, Random& random) {
  // The chunk ends where its table does.
  const std::size_t tiles_offset = (table.data.size() + 31) / 32 * 32;
  const std::size_t table_bytes = table.tiles.size() * sizeof(Tile);
  const auto chunk = std::make_unique<std::byte[]>(tiles_offset + table_bytes);
  std::copy(table.data.begin(), table.data.end(), chunk.get());
  std::memcpy(chunk.get() + tiles_offset, table.tiles.data(), table_bytes);
  const auto tile_count = static_cast<std::uint32_t>(table.tiles.size());

  std::vector<std::uint32_t> order((tile_count + 1) * kScatterThreads);  // one block has no tile
  for (std::uint32_t i = 0; i < order.size(); ++i) order[i] = i;
  for (std::size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random.below(i)]);
  for (const std::uint32_t one : order) {
    blockIdx.x = one / kScatterThreads;
    threadIdx.x = one % kScatterThreads;
    weightlift_scatter(chunk.get(), tiles_offset, tile_count, table.rules);
  }
}

TEST(Kernel, RandomTablesInAnyOrder) {
  const char* const given = std::getenv("WEIGHTLIFT_KERNEL_SECONDS");
  const double seconds = given != nullptr ? std::strtod(given, nullptr) : 1;
  const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
  std::uint64_t seed = 0;
  for (; seed < 20 || std::chrono::steady_clock::now() < end; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    Random random(seed);
    const Table table(random);
    run_in_any_order(table, random);
    for (std::size_t i = 0; i < table.targets.size(); ++i) {
      const Target& target = table.targets[i];
      const std::byte* const begin = target.memory.get();
      ASSERT_TRUE(std::equal(target.expected.begin(), target.expected.end(), begin + target.at))
          << "tile " << i << ", cast " << table.tiles[i].cast;
      ASSERT_TRUE(std::all_of(begin, begin + target.at,
                              [](std::byte byte) { return byte == std::byte{0xd7}; }))
          << "before tile " << i;
    }
  }
  std::printf("%llu tables\n", static_cast<unsigned long long>(seed));
}

}  // namespace
}  // namespace weightlift::convert
