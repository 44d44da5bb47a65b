// The pages that new memory gets, with given costs.
#include "engine/page_choice.h"

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "engine/host_memory.h"
#include "engine/settings.h"
#include "io/machine.h"
#include "vm_flags.h"

namespace weightlift::engine {
namespace {

constexpr std::size_t kMiB = std::size_t{1} << 20;

bool has_small_pages(const std::byte* address) {
  return has_vm_flag(address, "nh");
}

io::AnonymousMemory block(std::size_t bytes) {
  auto made = io::AnonymousMemory::allocate(bytes);
  EXPECT_TRUE(made.ok());
  return std::move(*made);
}

TEST(PagesArriveSlowly, SaysWhatTheyCost) {
  constexpr std::uint64_t kBytes = 2 << 20;
  std::vector<std::uint64_t> offsets;
  const auto reader = [&](std::chrono::microseconds cost, bool can_read) {
    return [&offsets, cost, can_read](std::uint64_t offset) {
      offsets.push_back(offset);
      std::this_thread::sleep_for(cost);
      return can_read;
    };
  };
  using std::chrono::microseconds;
  EXPECT_TRUE(pages_arrive_slowly(reader(microseconds(10), true), 5000, kBytes));
  EXPECT_EQ(offsets.front(), 5000U);
  EXPECT_LT(offsets.back(), 5000 + kBytes);
  EXPECT_FALSE(pages_arrive_slowly([](std::uint64_t) { return true; }, 5000, kBytes));
  EXPECT_FALSE(pages_arrive_slowly(reader(microseconds(10), false), 5000, kBytes));  // unknown
  EXPECT_FALSE(pages_arrive_slowly(reader(microseconds(10), true), 5000, kBytes / 8));
}

TEST(PageChoice, FastHugePagesAreNotComparedWithSmallOnes) {
  std::vector<bool> asked;
  const PageRates rates = probe_pages(
      [&](std::size_t, std::size_t, bool small) {
        asked.push_back(small);
        return 5e9;
      },
      0);
  EXPECT_EQ(asked, std::vector<bool>{false});
  EXPECT_FALSE(rates.small_is_faster());
}

TEST(PageChoice, SlowHugePagesLoseToFasterSmallOnesAlone) {
  for (const auto& [huge, small, wanted] :
       {std::tuple{3e8, 9e8, true}, {3e8, 3.2e8, false}, {1e9, 5e8, false}}) {
    const PageRates rates =
        probe_pages([&](std::size_t, std::size_t, bool one) { return one ? small : huge; }, 0);
    EXPECT_EQ(rates.small_is_faster(), wanted) << huge << " " << small;
  }
}

TEST(PageChoice, TheRestOfABlockGetsSmallPagesFromTheStart) {
  const io::AnonymousMemory memory = block(256 * kMiB);
  const PageWatch watch(memory,
                        [](std::size_t, std::size_t, bool small) { return small ? 8e8 : 1e8; });
  EXPECT_TRUE(has_small_pages(memory.data() + 100 * kMiB));
  EXPECT_EQ(watch.reason().rfind("small pages: huge pages came at 0.1 GB/s, small ones at 0.8", 0),
            0U);
}

TEST(PageChoice, ABlockWhosePagesBecomeDearIsSwitchedWhileItFills) {
  const io::AnonymousMemory memory = block(512 * kMiB);
  const PageWatch watch(memory, [](std::size_t offset, std::size_t, bool small) {
    return offset < 128 * kMiB ? 5e9 : small ? 8e8 : 1e8;
  });
  EXPECT_EQ(watch.reason(), "huge pages");
  ASSERT_TRUE(memory.populate(0, 116 * kMiB).ok());  // a load, which stops there
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(30);
  while (watch.reason() == "huge pages" && std::chrono::steady_clock::now() < deadline) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  EXPECT_EQ(watch.reason().rfind("huge pages, small ones after ", 0), 0U) << watch.reason();
  EXPECT_LE(watch.small_from(), 116 * kMiB);  // less if the load was not there yet
  EXPECT_FALSE(has_small_pages(memory.data() + 60 * kMiB));
  EXPECT_TRUE(has_small_pages(memory.data() + 117 * kMiB));
  EXPECT_TRUE(has_small_pages(memory.data() + 400 * kMiB));
}

TEST(PageChoice, ALateLoadIsNotWaitedFor) {
  const io::AnonymousMemory memory = block(512 * kMiB);
  ASSERT_TRUE(memory.populate(0, 14 * kMiB).ok());
  const PageWatch watch(memory, [](std::size_t offset, std::size_t, bool small) {
    return offset < 32 * kMiB ? 5e9 : small ? 8e8 : 1e8;
  });
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(5);
  while (watch.reason() == "huge pages" && std::chrono::steady_clock::now() < deadline) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  EXPECT_EQ(watch.reason().rfind("huge pages, small ones after 14 MiB: ", 0), 0U) << watch.reason();
  EXPECT_EQ(watch.small_from(), 14 * kMiB);
}

TEST(PageChoice, ProbesStayNearALoadThatIsLate) {
  const io::AnonymousMemory memory = block(512 * kMiB);
  std::atomic<std::size_t> last = 0;
  const PageWatch watch(memory, [&](std::size_t offset, std::size_t, bool) {
    last = offset;
    return 5e9;
  });
  std::this_thread::sleep_for(std::chrono::milliseconds(200));
  EXPECT_LE(last, 64 * kMiB);
  EXPECT_EQ(watch.small_from(), memory.size());
}

TEST(PageChoice, OneSlowPageIsNotEnough) {
  const io::AnonymousMemory memory = block(64 * kMiB);
  int touched = 0;
  const PageWatch watch(memory, [&](std::size_t, std::size_t, bool small) {
    return small ? 2.5e9 : ++touched == 1 ? 6e8 : 5e9;
  });
  EXPECT_EQ(touched, 3);
  EXPECT_EQ(watch.reason(), "huge pages");
  EXPECT_FALSE(has_small_pages(memory.data() + 32 * kMiB));
}

TEST(PageChoice, MemoryThatTheMachineHasInPartCountsByItsAverage) {
  const io::AnonymousMemory memory = block(64 * kMiB);
  int touched = 0;
  const PageWatch watch(memory, [&](std::size_t, std::size_t, bool small) {
    return small ? 2.5e9 : ++touched == 1 ? 1e8 : 5e9;
  });
  EXPECT_TRUE(has_small_pages(memory.data() + 32 * kMiB));
}

TEST(PageChoice, AWatchOfMemoryThatNobodyFillsEndsAtOnce) {
  const auto start = std::chrono::steady_clock::now();
  {
    const io::AnonymousMemory memory = block(512 * kMiB);
    const PageWatch watch(memory, [](std::size_t, std::size_t, bool) { return 5e9; });
  }
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(5));
}

TEST(PageChoice, AChildDropsAWatchWhoseThreadItDoesNotHave) {
  const io::AnonymousMemory memory = block(512 * kMiB);
  auto watch =
      std::make_unique<PageWatch>(memory, [](std::size_t, std::size_t, bool) { return 5e9; });
  const pid_t child = ::fork();
  if (child == 0) {
    watch.reset();
    ::_exit(0);
  }
  int status = 0;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

TEST(PageChoice, WhatIsReallyTouchedHasARate) {
  const io::AnonymousMemory memory = block(64 * kMiB);
  const PageWatch watch(memory);
  EXPECT_TRUE(memory.is_backed(0));
  EXPECT_FALSE(memory.is_backed(32 * kMiB));
  EXPECT_FALSE(watch.reason().empty());
}

TEST(HostMemory, SaysWhichPartsGetSmallPages) {
  constexpr std::size_t kBytes = 32 * kMiB;
  for (const HugePages set : {HugePages::kNever, HugePages::kAlways}) {
    Settings settings;
    settings.huge_pages = set;
    const auto memory = HostMemory::allocate(kBytes, std::nullopt, settings);
    ASSERT_TRUE(memory.ok());
    const std::byte* const data = (*memory)->data();
    EXPECT_EQ((*memory)->gives_small_pages(data, data + kBytes),
              set == HugePages::kNever || !io::gives_huge_pages());
    EXPECT_FALSE((*memory)->gives_small_pages(data - 1, data + kBytes));
    EXPECT_FALSE((*memory)->gives_small_pages(data, data + kBytes + 1));
  }
}

}  // namespace
}  // namespace weightlift::engine
