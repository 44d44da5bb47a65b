// Memory of deleted blocks, kept and used again. Each test leaves the pool empty.
#include "engine/memory_pool.h"

#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstring>
#include <span>
#include <thread>
#include <utility>
#include <vector>

#include "engine/host_memory.h"
#include "engine/settings.h"
#include "io/anonymous_memory.h"

namespace weightlift::engine {
namespace {

constexpr std::size_t kHuge = io::kHugePageBytes;

class MemoryPoolTest : public testing::Test {
 protected:
  void TearDown() override { pool_.clear(); }

  static io::AnonymousMemory block(std::size_t bytes, int content = 0) {
    auto memory = io::AnonymousMemory::allocate(bytes);
    EXPECT_TRUE(memory.ok());
    std::memset(memory->data(), content, memory->size());
    return *std::move(memory);
  }
  // Whether a page is in the process's address space: mincore(2) fails elsewhere.
  static bool mapped(std::byte* page) {
    unsigned char resident = 0;
    return ::mincore(page, io::kPageBytes, &resident) == 0;
  }
  static bool holds(std::span<const std::byte> bytes, int value) {
    return std::ranges::all_of(bytes, [&](std::byte b) { return b == std::byte(value); });
  }

  MemoryPool& pool_ = MemoryPool::instance();
  const std::uint64_t reused_before_ = pool_.stats().reused_bytes;
};

TEST_F(MemoryPoolTest, HandsOutTheSmallestBlockThatIsLargeEnough) {
  io::AnonymousMemory small = block(2 * kHuge);
  io::AnonymousMemory middle = block(3 * kHuge);
  std::byte* const expected = middle.data();
  const io::AnonymousMemory between = block(kHuge);  // no two of them are neighbours
  pool_.keep(std::move(small), 16 * kHuge);
  pool_.keep(std::move(middle), 16 * kHuge);
  EXPECT_EQ(pool_.stats().kept_bytes, 5 * kHuge);
  const auto found = pool_.take(2 * kHuge + 1);
  ASSERT_TRUE(found);
  EXPECT_EQ(found->data(), expected);
  EXPECT_EQ(found->size(), 3 * kHuge);
  EXPECT_FALSE(pool_.take(2 * kHuge + 1));
  EXPECT_EQ(pool_.stats().kept_bytes, 2 * kHuge);
  EXPECT_EQ(pool_.stats().reused_bytes - reused_before_, 3 * kHuge);
}

TEST_F(MemoryPoolTest, SplitsABlockAndJoinsItAgain) {
  io::AnonymousMemory whole = block(8 * kHuge, 1);
  std::byte* const begin = whole.data();
  pool_.keep(std::move(whole), 8 * kHuge);
  auto first = pool_.take(2 * kHuge + 5);
  auto second = pool_.take(kHuge);
  ASSERT_TRUE(first && second);
  EXPECT_EQ(first->data(), begin);
  EXPECT_EQ(first->size(), 3 * kHuge);
  EXPECT_EQ(second->data(), begin + 3 * kHuge);
  EXPECT_EQ(second->size(), kHuge);
  std::memset(first->data(), 2, first->size());
  std::memset(second->data(), 3, second->size());
  EXPECT_TRUE(holds({first->data(), first->size()}, 2));  // the parts do not overlap
  pool_.keep(*std::move(first), 8 * kHuge);               // its neighbour is still out
  pool_.keep(*std::move(second), 8 * kHuge);
  const auto again = pool_.take(8 * kHuge);
  ASSERT_TRUE(again);
  EXPECT_EQ(again->data(), begin);
  EXPECT_EQ(pool_.stats().kept_bytes, 0);
}

TEST_F(MemoryPoolTest, KeepsTheNewestUpToItsLimit) {
  std::vector<std::byte*> pages;
  for (int i = 0; i < 3; ++i) {
    io::AnonymousMemory one = block((4 + static_cast<std::size_t>(i)) * kHuge);
    pages.push_back(one.data());
    pool_.keep(std::move(one), 11 * kHuge);
  }
  EXPECT_EQ(pool_.stats().kept_bytes, 11 * kHuge);
  EXPECT_FALSE(mapped(pages[0]));
  EXPECT_TRUE(mapped(pages[1]) && mapped(pages[2]));
  io::AnonymousMemory too_large = block(12 * kHuge);
  std::byte* const at = too_large.data();
  pool_.keep(std::move(too_large), 11 * kHuge);
  EXPECT_FALSE(mapped(at));
  EXPECT_EQ(pool_.stats().kept_bytes, 11 * kHuge);
  pool_.clear();
  EXPECT_FALSE(mapped(pages[1]) || mapped(pages[2]));
}

TEST_F(MemoryPoolTest, TakesNoBlockBelowOneHugePage) {
  pool_.keep(block(kHuge - io::kPageBytes), 8 * kHuge);
  EXPECT_EQ(pool_.stats().kept_bytes, 0);
}

// Four threads never get the same block at the same time.
TEST_F(MemoryPoolTest, ManyThreads) {
  constexpr std::size_t kLimit = 24 * kHuge;
  std::atomic<bool> overlap = false;
  std::vector<std::thread> threads;
  for (int id = 1; id <= 4; ++id) {
    threads.emplace_back([&, id] {
      for (std::size_t round = 0; round < 60; ++round) {
        const std::size_t bytes = (1 + (round * static_cast<std::size_t>(id)) % 5) * kHuge;
        auto memory = pool_.take(bytes);
        if (!memory) memory = block(bytes);
        for (std::size_t at = 0; at < bytes; at += io::kPageBytes) {
          memory->data()[at] = std::byte(id);
        }
        std::this_thread::yield();
        for (std::size_t at = 0; at < bytes; at += io::kPageBytes) {
          if (memory->data()[at] != std::byte(id)) overlap = true;
        }
        pool_.keep(*std::move(memory), kLimit);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_FALSE(overlap);
  EXPECT_LE(pool_.stats().kept_bytes, kLimit);
}

TEST_F(MemoryPoolTest, AChildHasItsOwn) {
  pool_.keep(block(4 * kHuge, 7), 8 * kHuge);
  const pid_t child = ::fork();
  if (child == 0) {
    auto memory = MemoryPool::instance().take(4 * kHuge);
    if (!memory) ::_exit(1);
    std::memset(memory->data(), 9, memory->size());
    MemoryPool::instance().keep(*std::move(memory), 8 * kHuge);
    ::_exit(0);
  }
  int status = -1;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
  const auto memory = pool_.take(4 * kHuge);
  ASSERT_TRUE(memory);
  // The old content, or zeros if the kernel has taken the page, but nothing from the child.
  EXPECT_FALSE(std::ranges::any_of(std::span(memory->data(), memory->size()),
                                   [](std::byte b) { return b == std::byte{9}; }));
}

TEST_F(MemoryPoolTest, ServesHostMemory) {
  const Settings settings{.pool_bytes = 64 * kHuge};
  auto first = HostMemory::allocate(16 * kHuge, std::nullopt, settings);
  ASSERT_TRUE(first.ok());
  std::byte* const at = (*first)->data();
  EXPECT_EQ((*first)->pages().find("used again"), std::string::npos);
  first->reset();
  EXPECT_EQ(pool_.stats().kept_bytes, 16 * kHuge);
  // A load that keeps nothing may still take a block.
  auto second = HostMemory::allocate(10 * kHuge, std::nullopt, {});
  ASSERT_TRUE(second.ok());
  EXPECT_EQ((*second)->data(), at);
  EXPECT_NE((*second)->pages().find("used again"), std::string::npos);
  second->reset();
  EXPECT_EQ(pool_.stats().kept_bytes, 6 * kHuge);
  // Memory on small pages does not go through the pool.
  const Settings small{.pool_bytes = 64 * kHuge, .huge_pages = HugePages::kNever};
  auto third = HostMemory::allocate(4 * kHuge, std::nullopt, small);
  ASSERT_TRUE(third.ok());
  third->reset();
  EXPECT_EQ(pool_.stats().kept_bytes, 6 * kHuge);
}

}  // namespace
}  // namespace weightlift::engine
