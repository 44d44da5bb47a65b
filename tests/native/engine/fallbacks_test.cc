// Machines that lack this or that, and plans that cannot be.
#include <cuda.h>
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdint>
#include <optional>
#include <thread>
#include <utility>
#include <vector>

#include "engine/load.h"
#include "engine/runs.h"
#include "engine/scenario.h"
#include "simulated.h"

namespace weightlift::engine::test {
namespace {

// A module takes a millisecond or more to load: only plans that need the kernel load it.
TEST(LoadOfLargePlainTensors, LoadsNoModule) {
  Machine machine(2);
  {
    Scenario scenario(3, 2);
    const Origin file = scenario.add_file(2 * kMiB);
    for (const int device : {0, 1}) {
      scenario.add(file, 5, kMiB, Dtype::kU8, Dtype::kU8, device, 3);
      scenario.add(file, kMiB + 7, 200 * kKiB, Dtype::kF32, Dtype::kBf16, device, 0);
    }
    run_plainly(scenario, "plain, and narrowed on the host");
  }
  EXPECT_EQ(sim().sim_calls("cuModuleLoadData"), 0U);
  expect_machine_clean(machine, "plain");
}

TEST(LoadWithoutKernels, CastsOnTheHostTheSame) {
  for (const char* const call : {"cuModuleLoadData", "cuModuleGetFunction"}) {
    Machine machine(1);
    {
      Scenario scenario(2, 1);
      fill_with_one_of_everything(scenario);
      for (std::uint64_t i = 1; i <= 2; ++i) {  // machine code and PTX
        sim().sim_fail_call(call, i, CUDA_ERROR_NO_BINARY_FOR_GPU, 0);
      }
      auto load = scenario.prepare();
      ASSERT_NE(load, nullptr);
      ASSERT_TRUE(load->start().ok());
      wait_for(*load, call);
      const auto report = load->finish();
      ASSERT_TRUE(report.ok()) << report.error().describe();
      scenario.expect_everything(*load, *report, call);
      ASSERT_EQ(report->fallbacks.size(), 1U);
      EXPECT_NE(report->fallbacks[0].find("casts run on the host"), std::string::npos);
      EXPECT_EQ(sim().sim_calls("cuLaunchKernel"), 0U);
    }
    expect_machine_clean(machine, call);
  }
}

std::optional<ErrorCode> refusal(int device) {
  LoadPlan plan;
  static const std::vector<std::byte> source(64);
  Copy copy{.device = device, .source = address_of(source.data()), .target = 1, .elements = 64};
  plan.add_copy(copy);
  const auto load = Load::prepare(std::move(plan), Settings());
  return load.ok() ? std::nullopt : std::optional(load.error().code);
}

TEST(LoadPrepare, SaysWhyThereIsNoDevice) {
  {
    Machine machine(2);
    EXPECT_EQ(refusal(2), ErrorCode::kNoSuchDevice);
    EXPECT_EQ(refusal(-5), ErrorCode::kNoSuchDevice);
    EXPECT_EQ(refusal(1), std::nullopt);
  }
  {
    Machine machine(0);
    EXPECT_TRUE(refusal(0).has_value());
  }
  {
    Machine machine(1);
    sim().sim_set_version(11080);
    EXPECT_EQ(refusal(0), ErrorCode::kDriverTooOld);
  }
  {
    Machine machine(1);
    sim().sim_hide_symbol("cuEventRecord", SIM_HIDE_NOT_FOUND);
    EXPECT_EQ(refusal(0), ErrorCode::kDriverTooOld);
  }
  device::use_driver_for_testing("/nowhere/libcuda.so.1");
  EXPECT_EQ(refusal(0), ErrorCode::kNoDriver);
  device::use_driver_for_testing("");
}

TEST(LoadInForkedChild, ReachesTheHostAlone) {
  Machine machine(1);
  {
    Scenario before(1, 1);
    fill_with_one_of_everything(before);
    run_plainly(before, "the parent");
    const pid_t child = ::fork();
    if (child == 0) {
      if (refusal(0) != ErrorCode::kForkedProcess) ::_exit(1);
      Scenario scenario(2, 0);
      scenario.settings.threads = 2;
      const Origin file = scenario.add_file(kMiB);
      scenario.add(file, 5, 200'000, Dtype::kF32, Dtype::kBf16, kHostDevice, 0);
      run_plainly(scenario, "the child");
      ::_exit(::testing::Test::HasFailure() ? 2 : 0);
    }
    int status = -1;
    ASSERT_EQ(::waitpid(child, &status, 0), child);
    EXPECT_EQ(status, 0);
  }
  {
    Scenario after(3, 1);
    fill_with_one_of_everything(after);
    run_plainly(after, "the parent again");
  }
  expect_machine_clean(machine, "forked");
}

TEST(LoadPrepare, RefusesImpossiblePlans) {
  Machine machine(1);
  {
    Scenario scenario(1, 1);
    const Origin file = scenario.add_file(1000);
    const auto code = [&](Copy copy,
                          std::vector<Dimension> dimensions) -> std::optional<ErrorCode> {
      LoadPlan plan;
      copy.file = plan.add_file(scenario.plan.files[file.file]);
      copy.name = plan.add_name("w");
      if (dimensions.empty()) {
        plan.add_copy(copy);
      } else {
        plan.add_strided(copy, dimensions);
      }
      const auto load = Load::prepare(std::move(plan), Settings());
      if (load.ok()) return std::nullopt;
      EXPECT_EQ(load.error().tensor, "w");
      EXPECT_EQ(load.error().path, scenario.files[0].path());
      return load.error().code;
    };
    EXPECT_EQ(code({.source = 900, .target = 1, .elements = 101}, {}), ErrorCode::kInvalidArgument);
    EXPECT_EQ(code({.source = 900, .target = 1, .elements = 100}, {}), std::nullopt);
    EXPECT_EQ(
        code({.target = 1, .elements = 8, .source_dtype = Dtype::kI32, .target_dtype = Dtype::kF32},
             {}),
        ErrorCode::kUnsupportedDtype);
    EXPECT_EQ(code({.device = 0, .target = 1}, {{4, 2, 2}, {2, 100, 8}}),
              ErrorCode::kInvalidArgument);
    EXPECT_EQ(code({.target = 1}, {{10, 100, 10}, {11, 10, 1}}), ErrorCode::kInvalidArgument);
  }
  expect_machine_clean(machine, "refused plans");
}

TEST(LoadStart, RefusesMissingScratchMemory) {
  Machine machine(1);
  {
    Scenario scenario(1, 1);
    fill_with_one_of_everything(scenario);
    auto load = scenario.prepare();
    ASSERT_NE(load, nullptr);
    ASSERT_GT(load->plan().device(0).scratch_bytes, 0U);
    load->plan().device(0).scratch = 0;
    const Status started = load->start();
    ASSERT_FALSE(started.ok());
    EXPECT_NE(started.error().message.find("scratch"), std::string::npos);
  }
  expect_machine_clean(machine, "no scratch");
}

TEST(LoadWait, EndsWhenTheDriverIsGone) {
  for (std::uint64_t seed = 0; seed < 6; ++seed) {
    Machine machine(1, seed, static_cast<int>(seed));
    Scenario scenario(seed, 1);
    fill_with_one_of_everything(scenario);
    auto load = scenario.prepare();
    ASSERT_NE(load, nullptr);
    ASSERT_TRUE(load->start().ok());
    std::this_thread::sleep_for(std::chrono::microseconds(100 * seed));
    sim().sim_exit();
    wait_for(*load, "gone");
    const auto report = load->finish();
    if (!report.ok()) {
      EXPECT_EQ(report.error().code, ErrorCode::kDriverCallFailed);
    }
  }
}

}  // namespace
}  // namespace weightlift::engine::test
