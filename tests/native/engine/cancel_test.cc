// Loads that are cancelled.
#include <gtest/gtest.h>
#include <sys/mman.h>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <thread>
#include <utility>
#include <vector>

#include "engine/load.h"
#include "engine/pinned_hoard.h"
#include "engine/runs.h"
#include "engine/scenario.h"
#include "io/anonymous_memory.h"
#include "simulated.h"

namespace weightlift::engine::test {
namespace {

// Such a small load has no threads: the caller of wait() does the work. Each target lies on its own
// huge page, because a cancel takes effect between two of them.
TEST(LoadCancel, OnTheCallersThread) {
  constexpr std::size_t kCopies = 1024;
  constexpr std::size_t kRegion = kCopies * io::kHugePageBytes;
  const TestFile file(std::vector<std::byte>(kCopies * 8 * kKiB));
  void* const region = ::mmap(nullptr, kRegion, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  ASSERT_NE(region, MAP_FAILED);
  ::madvise(region, kRegion, MADV_NOHUGEPAGE);
  LoadPlan plan;
  const std::uint32_t index = plan.add_file(file.open());
  for (std::size_t i = 0; i < kCopies; ++i) {
    plan.add_copy({.file = index,
                   .source = i * 8 * kKiB,
                   .target = reinterpret_cast<std::uintptr_t>(region) + i * io::kHugePageBytes,
                   .elements = 16});
  }
  bool cancelled = false;
  for (int tries = 0; tries < 100 && !cancelled; ++tries) {
    auto load = Load::prepare(plan, {});
    ASSERT_TRUE(load.ok()) << load.error().describe();
    ASSERT_TRUE((*load)->start().ok());
    std::thread other([&load] {
      while ((*load)->progress().done == 0) std::this_thread::yield();
      (*load)->cancel();
    });
    EXPECT_TRUE((*load)->wait(milliseconds(0)));
    other.join();
    const auto report = (*load)->finish();
    if (report.ok()) continue;  // the other thread was late
    EXPECT_EQ(report.error().code, ErrorCode::kCancelled);
    EXPECT_LT((*load)->progress().done, (*load)->progress().total);
    cancelled = true;
  }
  EXPECT_TRUE(cancelled);
  ::munmap(region, kRegion);
}

TEST(LoadCancel, WhileItWaitsForPinnedMemory) {
  Machine machine(1);
  {
    Scenario scenario(1, 1);
    fill_with_one_of_everything(scenario);
    const Hoard hoard(1, 100 * kKiB);
    auto load = scenario.prepare();
    ASSERT_NE(load, nullptr);
    ASSERT_TRUE(load->start().ok());
    EXPECT_FALSE(load->wait(milliseconds(10)));
    load->cancel();
    wait_for(*load, "cancelled");
    EXPECT_EQ(load->finish().error().code, ErrorCode::kCancelled);
  }
  expect_machine_clean(machine, "cancelled");
}

TEST(LoadCancel, WaitsForCopiesInFlight) {
  Machine machine(2);
  {
    Scenario scenario(1, 2);
    fill_for_two_devices(scenario);
    scenario.settings.threads = 2;
    sim().sim_set_time(SIM_TIME_REAL);
    for (int device = 0; device < 2; ++device) sim().sim_set_link(device, 4e6);
    auto load = scenario.prepare();
    ASSERT_NE(load, nullptr);
    ASSERT_TRUE(load->start().ok());
    EXPECT_FALSE(load->wait(milliseconds(30)));
    load->cancel();
    wait_for(*load, "cancelled");
    EXPECT_EQ(load->finish().error().code, ErrorCode::kCancelled);
    load.reset();
    scenario.free_blocks();
  }
  expect_machine_clean(machine, "cancelled");
}

}  // namespace
}  // namespace weightlift::engine::test
