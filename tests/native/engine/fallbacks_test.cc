// Machines that lack a feature, and invalid plans.
#include <cuda.h>
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdint>
#include <optional>
#include <regex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "engine/load.h"
#include "engine/runs.h"
#include "engine/scenario.h"
#include "simulated.h"

namespace weightlift::engine::test {
namespace {

// Loading a module takes a millisecond or more, so only plans that need the kernel load it.
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

// The number of chunks that were copied in this way, by the report's text.
std::uint64_t chunks_by(const std::vector<std::string>& copies, const std::string& how) {
  std::uint64_t count = 0;
  for (const std::string& text : copies) {
    const std::regex pattern("(\\d+) chunks? by " + how);
    for (std::sregex_iterator match(text.begin(), text.end(), pattern), end; match != end;
         ++match) {
      count += std::stoull((*match)[1]);
    }
  }
  return count;
}

TEST(Report, SaysHowChunksWereCopiedAsTheDriverSawIt) {
  struct Case {
    int version;
    bool batch_copies;
    bool kernels;
    const char* form;
  };
  for (const Case& one : {Case{12070, true, false, nullptr}, Case{12080, true, false, "12\\.8"},
                          Case{13000, true, false, "13\\.0"}, Case{13000, false, false, nullptr},
                          Case{13000, true, true, "13\\.0"}}) {
    Machine machine(1);
    sim().sim_set_version(one.version);
    {
      Scenario scenario(5, 1);
      scenario.settings.batch_copies = one.batch_copies;
      scenario.settings.kernels = one.kernels;
      scenario.settings.chunk_bytes = 512 * kKiB;
      const Origin file = scenario.add_file(2 * kMiB);
      for (std::uint64_t i = 0; i < 40; ++i) {  // in runs that do not follow one another
        scenario.add(file, i * 16 * kKiB, 3 * kKiB, Dtype::kU8, Dtype::kU8, 0, 1);
      }
      const Origin large = scenario.add_file(2 * kMiB);
      scenario.add(large, 0, 2 * kMiB, Dtype::kU8, Dtype::kU8, 0, 0);
      auto load = scenario.prepare();
      ASSERT_NE(load, nullptr);
      ASSERT_TRUE(load->start().ok());
      wait_for(*load, "copies");
      const auto report = load->finish();
      ASSERT_TRUE(report.ok()) << report.error().describe();
      scenario.expect_everything(*load, *report, "copies");
      const std::uint64_t batches = sim().sim_calls("cuMemcpyBatchAsync");
      const std::uint64_t launches = sim().sim_calls("cuLaunchKernel");
      const std::string form = one.form == nullptr ? "none" : one.form;
      EXPECT_EQ(chunks_by(report->copies, "batch copies of CUDA " + form), batches);
      EXPECT_EQ(chunks_by(report->copies, "the kernel"), launches);
      EXPECT_GT(chunks_by(report->copies, "one copy"), 0U);
      const bool by_run = chunks_by(report->copies, "a copy for each run of bytes") != 0;
      EXPECT_EQ(by_run, batches == 0 && launches == 0);
      EXPECT_EQ(batches != 0, one.form != nullptr && !one.kernels);
    }
    expect_machine_clean(machine, "copies");
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
