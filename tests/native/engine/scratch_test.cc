#include "engine/scratch.h"

#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>

#include "io/anonymous_memory.h"

namespace weightlift::engine {
namespace {

// The number of huge pages on which a buffer lies.
std::size_t huge_pages_under(const std::byte* data, std::size_t count) {
  const auto begin = reinterpret_cast<std::uintptr_t>(data);
  return (begin + count - 1) / io::kHugePageBytes - begin / io::kHugePageBytes + 1;
}

TEST(Scratch, ADirectReadGetsAHugePageOfItsOwn) {
  // What the engine asks for to read a mebibyte from an offset that is not aligned.
  constexpr std::size_t kBytes = (std::size_t{1} << 20) + 2 * io::kPageBytes;
  for (int i = 0; i < 4; ++i) {  // so that it is no chance
    Scratch scratch;
    const auto data = scratch.for_direct_read(kBytes);
    ASSERT_TRUE(data.ok());
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(*data) % io::kHugePageBytes, 0);
    EXPECT_EQ(huge_pages_under(*data, kBytes), 1);
    // It is kept for later reads that fit into it.
    const auto again = scratch.for_direct_read(io::kHugePageBytes);
    ASSERT_TRUE(again.ok());
    EXPECT_EQ(*again, *data);
  }
}

TEST(Scratch, ASmallReadTakesNoMoreThanItNeeds) {
  Scratch scratch;
  const auto data = scratch.for_direct_read(io::kPageBytes);
  ASSERT_TRUE(data.ok());
  const auto larger = scratch.bytes(2 * io::kPageBytes);
  ASSERT_TRUE(larger.ok());
  (*larger)[2 * io::kPageBytes - 1] = std::byte{1};
}

}  // namespace
}  // namespace weightlift::engine
