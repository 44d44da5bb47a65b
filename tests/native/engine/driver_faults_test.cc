// Driver calls that fail.
#include <cuda.h>
#include <gtest/gtest.h>

#include <array>
#include <cstdint>
#include <string>

#include "engine/driver_sweep.h"
#include "engine/load.h"
#include "engine/runs.h"
#include "engine/scenario.h"
#include "simulated.h"

namespace weightlift::engine::test {
namespace {

TEST(LoadWithFailingDriver, AnyCallOnce) {
  sweep(nullptr, kUnknownError, false);
  sweep(nullptr, CUDA_ERROR_OUT_OF_MEMORY, false);
}

TEST(LoadWithFailingDriver, EachFunctionAtEachCall) {
#define WL_NAME(name, version) #name,
  constexpr std::array kFunctions = {WL_DRIVER_REQUIRED(WL_NAME) "cuMemcpyBatchAsync"};
#undef WL_NAME
  for (const char* const name : kFunctions) sweep(name, CUDA_ERROR_LAUNCH_FAILED, false);
}

TEST(LoadWithFailingDriver, NoSlotIsAnErrorThatNamesTheCalls) {
  Machine machine(1);
  {
    Scenario scenario(1, 1);
    fill_with_one_of_everything(scenario);
    for (std::uint64_t i = 1; i <= 4; ++i) {
      sim().sim_fail_call("cuMemHostRegister", i, CUDA_ERROR_NOT_SUPPORTED, 0);
      sim().sim_fail_call("cuMemHostAlloc", i, CUDA_ERROR_OUT_OF_MEMORY, 0);
    }
    auto load = scenario.prepare();
    ASSERT_NE(load, nullptr);
    ASSERT_TRUE(load->start().ok());
    wait_for(*load, "refused");
    const auto report = load->finish();
    ASSERT_FALSE(report.ok());
    for (const char* const part : {"cuMemHostRegister", "cuMemHostAlloc", "ulimit -l"}) {
      EXPECT_NE(report.error().message.find(part), std::string::npos) << report.error().message;
    }
    load.reset();
    scenario.expect_no_traces("refused");
  }
  expect_machine_clean(machine, "refused");
}

TEST(LoadWithFailingDriver, OneSlotIsEnough) {
  Machine machine(1);
  {
    Scenario scenario(1, 1);
    fill_with_one_of_everything(scenario);
    for (std::uint64_t i = 1; i <= 3; ++i) {
      sim().sim_fail_call("cuMemHostAlloc", i, CUDA_ERROR_OUT_OF_MEMORY, 0);
      sim().sim_fail_call("cuMemHostRegister", i + 1, CUDA_ERROR_OUT_OF_MEMORY, 0);
    }
    auto load = scenario.prepare();
    ASSERT_NE(load, nullptr);
    ASSERT_TRUE(load->start().ok());
    wait_for(*load, "one slot");
    const auto report = load->finish();
    ASSERT_TRUE(report.ok()) << report.error().describe();
    EXPECT_EQ(report->peak_staging_bytes, scenario.settings.chunk_bytes);
    ASSERT_EQ(report->fallbacks.size(), 1U);
    EXPECT_NE(report->fallbacks[0].find("fewer staging slots"), std::string::npos);
    scenario.expect_everything(*load, *report, "one slot");
  }
  expect_machine_clean(machine, "one slot");
}

}  // namespace
}  // namespace weightlift::engine::test
