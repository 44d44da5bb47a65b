// Random plans under random schedules, judged by general oracles: after each load, bytes, bounds,
// violations, the ledger, reports, threads and descriptors must be right, for every plan and every
// failure.
//
// WEIGHTLIFT_SEEDS says how many seeds to try, WEIGHTLIFT_SEED runs one. With one reader thread the
// schedule of a seed replays but for the lanes' own threads.
#include "engine/random_plans.h"

#include <cuda.h>
#include <gtest/gtest.h>

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <thread>
#include <tuple>

#include "device/context.h"
#include "engine/load.h"
#include "engine/random.h"
#include "engine/runs.h"
#include "engine/scenario.h"
#include "simulated.h"

namespace weightlift::engine::test {
namespace {

enum class Disturbance : std::uint8_t { kNone, kCancel, kFault, kAbandoned };

// A load that ends with or without an error must leave nothing behind.
void run_disturbed(Scenario& scenario, Disturbance how, const std::string& what) {
  Random& random = scenario.random;
  if (how == Disturbance::kFault) {
    const int code = random.pick<int>({CUDA_ERROR_OUT_OF_MEMORY, CUDA_ERROR_LAUNCH_FAILED,
                                       kUnknownError, CUDA_ERROR_INVALID_VALUE});
    sim().sim_fail_call(nullptr, random.between(1, 70), code, 0);
  }
  auto load = scenario.prepare();
  if (load == nullptr) {
    EXPECT_EQ(how, Disturbance::kFault) << what;
    return;
  }
  if (!load->start().ok()) {
    EXPECT_EQ(how, Disturbance::kFault) << what;
    load.reset();
    scenario.expect_no_traces(what);
    return;
  }
  if (how == Disturbance::kAbandoned) {
    if (random.chance(50)) std::ignore = load->wait(milliseconds(random.below(2)));
    load.reset();
    scenario.expect_no_traces(what);
    return;
  }
  if (how == Disturbance::kCancel) {
    std::this_thread::sleep_for(std::chrono::microseconds(random.spread(3000)));
    load->cancel();
  }
  wait_for(*load, what);
  const auto report = load->finish();
  if (report.ok()) {
    scenario.expect_everything(*load, *report, what);
    return;
  }
  if (how == Disturbance::kCancel) {
    EXPECT_EQ(report.error().code, ErrorCode::kCancelled) << what;
  } else {
    EXPECT_EQ(error_kind(report.error().code), report.error().code == ErrorCode::kOutOfMemory
                                                   ? ErrorKind::kMemory
                                                   : ErrorKind::kDevice)
        << what << ": " << report.error().describe();
    EXPECT_NE(report.error().message.find("cu"), std::string::npos) << report.error().message;
  }
  load.reset();
  scenario.free_scratch();
  scenario.expect_no_traces(what);
}

void one_seed(std::uint64_t seed) {
  Random random(seed ^ 0x5EED);
  const int devices = random.pick({1, 1, 2, 2, 8});
  const int policy = static_cast<int>(random.below(SIM_POLICIES));
  const std::string what = "seed " + std::to_string(seed) + ", " +
                           simulation::kPolicyNames[policy] + ", " + std::to_string(devices) +
                           " devices";
  SCOPED_TRACE(what);
  Machine machine(devices, seed, policy);
  sim().sim_set_version(random.pick({12000, 12080, 12090, 13000, 13000, 13000}));
  if (random.chance(15)) {
    sim().sim_hide_symbol("cuMemcpyBatchAsync",
                          random.chance(50) ? SIM_HIDE_NULL : SIM_HIDE_NOT_FOUND);
  }
  if (random.chance(8)) {
    const std::uint64_t refused = random.between(1, 3);  // of machine code and PTX
    for (std::uint64_t i = 1; i <= refused; ++i) {
      sim().sim_fail_call("cuModuleLoadData", i, CUDA_ERROR_NO_BINARY_FOR_GPU, 0);
    }
  }
  if (random.chance(10)) {
    const std::uint64_t refused = random.between(1, 3);
    for (std::uint64_t i = 1; i <= refused; ++i) {
      sim().sim_fail_call("cuMemHostRegister", i, CUDA_ERROR_NOT_SUPPORTED, 0);
    }
  }
  {
    Scenario scenario(seed, devices);
    scenario.settings = random_settings(scenario.random);
    PlanMaker(scenario, devices).make();
    ASSERT_TRUE(device::Device::count().ok());
    const Baseline baseline;
    scenario.queue_pending_writes();
    auto how = Disturbance::kNone;
    if (random.chance(25)) {
      how = random.pick({Disturbance::kCancel, Disturbance::kFault, Disturbance::kFault,
                         Disturbance::kAbandoned});
    }
    if (how != Disturbance::kNone) {
      run_disturbed(scenario, how, what + ", disturbed");
      expect_released(scenario, machine, what + ", disturbed");
      // A fault that did not occur must not hit the next load.
      for (std::uint64_t i = 0; sim().sim_faults_left() != 0 && i < 50; ++i) {
        std::ignore = device::Device::count();
      }
    }
    run_plainly(scenario, what);
    scenario.free_scratch();
    expect_released(scenario, machine, what);
    baseline.expect_same(what);
  }
  expect_machine_clean(machine, what);
}

TEST(Load, DeliversRandomPlans) {
  std::uint64_t first = 0;
  std::uint64_t last = number_from_environment("WEIGHTLIFT_SEEDS", 200);
  if (std::getenv("WEIGHTLIFT_SEED") != nullptr) {
    first = number_from_environment("WEIGHTLIFT_SEED", 0);
    last = first + 1;
  }
  for (std::uint64_t seed = first; seed < last; ++seed) {
    one_seed(seed);
    if (HasFailure()) {
      std::printf("WEIGHTLIFT_SEED=%llu runs this one alone\n",
                  static_cast<unsigned long long>(seed));
      return;
    }
  }
}

}  // namespace
}  // namespace weightlift::engine::test
