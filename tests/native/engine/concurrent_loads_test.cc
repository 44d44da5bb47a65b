// Several loads at once, and the pinned memory that they share.
#include <gtest/gtest.h>

#include <array>
#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "engine/load.h"
#include "engine/pinned_hoard.h"
#include "engine/random_plans.h"
#include "engine/runs.h"
#include "engine/scenario.h"
#include "simulated.h"

namespace weightlift::engine::test {
namespace {

TEST(ConcurrentLoads, OnTheSameDevices) {
  const std::uint64_t rounds = number_from_environment("WEIGHTLIFT_SEEDS", 200) / 6 + 1;
  for (std::uint64_t seed = 0; seed < rounds; ++seed) {
    SCOPED_TRACE(seed);
    const int devices = seed % 3 == 0 ? 1 : 2;
    Machine machine(devices, seed, static_cast<int>(seed % SIM_POLICIES));
    {
      const std::uint64_t count = 2 + seed % 3;
      std::vector<std::unique_ptr<Scenario>> scenarios;
      std::vector<std::unique_ptr<Load>> loads;
      for (std::uint64_t i = 0; i < count; ++i) {
        auto& scenario =
            *scenarios.emplace_back(std::make_unique<Scenario>(10 * seed + i, devices));
        scenario.settings = random_settings(scenario.random);
        PlanMaker(scenario, devices).make();
        scenario.queue_pending_writes();
        loads.push_back(scenario.prepare());
        ASSERT_NE(loads.back(), nullptr);
        ASSERT_TRUE(loads.back()->start().ok());
      }
      std::vector<std::thread> callers;
      for (std::uint64_t i = 0; i < count; ++i) {
        callers.emplace_back([&, i] { wait_for(*loads[i], "together"); });
      }
      for (std::thread& caller : callers) caller.join();
      for (std::uint64_t i = 0; i < count; ++i) {
        const auto report = loads[i]->finish();
        ASSERT_TRUE(report.ok()) << report.error().describe();
        scenarios[i]->expect_everything(*loads[i], *report, "load " + std::to_string(i));
      }
    }
    expect_machine_clean(machine, "together");
    if (HasFailure()) return;
  }
}

TEST(ConcurrentLoads, WaitForPinnedMemoryThatOthersHold) {
  Machine machine(1);
  {
    Scenario scenario(1, 1);
    fill_with_one_of_everything(scenario);
    Hoard hoard(1, 100 * kKiB);
    auto load = scenario.prepare();
    ASSERT_NE(load, nullptr);
    ASSERT_TRUE(load->start().ok());
    EXPECT_FALSE(load->wait(milliseconds(50)));
    hoard.give_back();
    wait_for(*load, "waiting for the pool");
    const auto report = load->finish();
    ASSERT_TRUE(report.ok()) << report.error().describe();
    scenario.expect_everything(*load, *report, "after the wait");
  }
  expect_machine_clean(machine, "waiting for the pool");
}

TEST(ConcurrentLoads, LanesShareTheLastSlot) {
  Machine machine(2);
  {
    Scenario scenario(1, 2);
    fill_for_two_devices(scenario);
    const Hoard hoard(2, scenario.settings.chunk_bytes);
    run_plainly(scenario, "the last slot");
  }
  expect_machine_clean(machine, "the last slot");
}

TEST(ConcurrentLoads, DoNotWaitForEachOthersSlots) {
  for (std::uint64_t seed = 0; seed < 6; ++seed) {
    Machine machine(2, seed, static_cast<int>(seed % SIM_POLICIES));
    {
      std::array<Scenario, 3> scenarios = {Scenario(seed, 2), Scenario(seed + 100, 2),
                                           Scenario(seed + 200, 2)};
      std::vector<std::unique_ptr<Load>> loads;
      const Hoard hoard(2, 2 * 256 * kKiB);
      for (Scenario& scenario : scenarios) {
        fill_for_two_devices(scenario);
        loads.push_back(scenario.prepare());
        ASSERT_NE(loads.back(), nullptr);
        ASSERT_TRUE(loads.back()->start().ok());
      }
      // In the order of their start, whichever ends first: nobody asks for another's report.
      for (std::size_t i = 0; i < loads.size(); ++i) {
        wait_for(*loads[i], "crossed slots");
        const auto report = loads[i]->finish();
        ASSERT_TRUE(report.ok()) << report.error().describe();
        scenarios[i].expect_everything(*loads[i], *report, "crossed slots");
      }
    }
    expect_machine_clean(machine, "crossed slots");
  }
}

}  // namespace
}  // namespace weightlift::engine::test
