// Lost devices. Memory that they may still read stays pinned, so these tests come last.
#include <cuda.h>
#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string>

#include "device/staging.h"
#include "engine/driver_sweep.h"
#include "engine/load.h"
#include "engine/runs.h"
#include "engine/scenario.h"
#include "simulated.h"

namespace weightlift::engine::test {
namespace {

TEST(LoadWithLostDevice, AtAnyCall) {
  sweep(nullptr, CUDA_ERROR_ILLEGAL_ADDRESS, true);
}

TEST(LoadWithLostDevice, AtAnyOperation) {
  sweep("(operation)", CUDA_ERROR_ILLEGAL_ADDRESS, false);
}

// Abandons a slot as large as the whole budget, because waiting for its copies fails.
void lose_a_slot() {
  Scenario scenario(1, 1);
  scenario.settings.threads = 1;
  scenario.settings.chunk_bytes = scenario.settings.pinned_bytes = 64 * kMiB;
  scenario.add(scenario.add_file(kMiB), 0, kMiB, Dtype::kU8, Dtype::kU8, 0, 0);
  sim().sim_fail_call("cuEventSynchronize", 1, CUDA_ERROR_LAUNCH_FAILED, 0);
  for (std::uint64_t i = 1; i <= 2; ++i) {
    sim().sim_fail_call("cuStreamSynchronize", i, CUDA_ERROR_LAUNCH_FAILED, 0);
  }
  const auto load = scenario.prepare();
  ASSERT_NE(load, nullptr);
  ASSERT_TRUE(load->start().ok());
  wait_for(*load, "losing a slot");
  EXPECT_FALSE(load->finish().ok());
}

void load_after_lost_slots() {
  Machine machine(1);
  const std::size_t slot = 64 * kMiB;
  lose_a_slot();
  EXPECT_EQ(device::StagingPool::instance().abandoned_bytes(), slot);
  {
    Scenario healthy(2, 1);
    fill_with_one_of_everything(healthy);
    run_plainly(healthy, "after one lost slot");
  }
  lose_a_slot();
  EXPECT_EQ(device::StagingPool::instance().abandoned_bytes(), 2 * slot);
  Scenario refused(3, 1);
  fill_with_one_of_everything(refused);
  const auto load = refused.prepare();
  ASSERT_NE(load, nullptr);
  ASSERT_TRUE(load->start().ok());
  wait_for(*load, "after two lost slots");
  const auto report = load->finish();
  ASSERT_FALSE(report.ok());
  EXPECT_EQ(report.error().code, ErrorCode::kDriverCallFailed);
  EXPECT_NE(report.error().message.find("128 MiB of pinned memory were abandoned"),
            std::string::npos)
      << report.error().message;
}

// After any events, a load ends, with its data or with an error that says why. In a separate
// process, because abandoned slots stay abandoned.
TEST(LoadAfterLostSlots, EndsWithItsDataOrSaysWhy) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  const auto in_child = [] {
    load_after_lost_slots();
    std::_Exit(::testing::Test::HasFailure() ? 1 : 0);
  };
  EXPECT_EXIT(in_child(), ::testing::ExitedWithCode(0), "");
}

}  // namespace
}  // namespace weightlift::engine::test
