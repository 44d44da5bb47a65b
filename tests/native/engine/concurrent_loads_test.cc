// Several loads at once, and the pinned memory that they share.
#include <gtest/gtest.h>

#include <array>
#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "device/context.h"
#include "device/staging.h"
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
      // In the order of their start, whichever ends first.
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

// A load that began with one slot takes more when others return theirs.
TEST(ConcurrentLoads, GrowWhenOthersGiveBack) {
  Machine machine(1);
  {
    Scenario scenario(1, 1);
    scenario.settings.threads = 4;
    scenario.settings.chunk_bytes = 256 * kKiB;
    scenario.settings.pinned_bytes = 4 * scenario.settings.chunk_bytes;
    const Origin file = scenario.add_file(4 * kMiB);
    for (int i = 0; i < 3; ++i) {
      scenario.add(file, 0, 4 * kMiB, Dtype::kU8, Dtype::kU8, 0, 0);
    }
    sim().sim_set_time(SIM_TIME_REAL);
    sim().sim_set_link(0, 1e6);  // until the hoard is given back, on however busy a machine
    Hoard hoard(1, scenario.settings.chunk_bytes);
    auto load = scenario.prepare();
    ASSERT_NE(load, nullptr);
    ASSERT_TRUE(load->start().ok());
    while (load->progress().done == 0) ASSERT_FALSE(load->wait(milliseconds(1)));
    sim().sim_set_link(0, 40e6);
    hoard.give_back();
    wait_for(*load, "growing");
    const auto report = load->finish();
    ASSERT_TRUE(report.ok()) << report.error().describe();
    EXPECT_EQ(report->peak_staging_bytes, scenario.settings.pinned_bytes);
    scenario.expect_everything(*load, *report, "growing");
  }
  expect_machine_clean(machine, "growing");
}

TEST(StagingPoolTake, RefusesAFurtherSlotWhileOthersWaitForTheirFirst) {
  Machine machine(1);
  {
    auto& pool = device::StagingPool::instance();
    const auto take = [&](device::SlotClaim claim) {
      auto slot = pool.take(**device::Device::get(0), 256 * kKiB, 64 * kMiB, claim);
      EXPECT_TRUE(slot.ok());
      return slot.ok() && slot->has_value();
    };
    std::optional<device::StagingPool::Waiting> waiting(std::in_place, pool);
    EXPECT_EQ(pool.waiting(), 1U);
    EXPECT_FALSE(take(device::SlotClaim::kFurther));
    EXPECT_TRUE(take(device::SlotClaim::kFirst));
    const std::uint64_t before = pool.changes();
    waiting.reset();
    EXPECT_NE(pool.changes(), before) << "nobody asks again";
    EXPECT_TRUE(take(device::SlotClaim::kFurther));
  }
  expect_machine_clean(machine, "claims");
}

// A returned slot goes to a load without slots before one that wants more.
TEST(ConcurrentLoads, ServeThoseWithoutASlotFirst) {
  Machine machine(1);
  {
    Scenario large(1, 1);
    Scenario small(2, 1);
    for (Scenario* const scenario : {&large, &small}) {
      scenario->settings.threads = 4;
      scenario->settings.chunk_bytes = 256 * kKiB;
      scenario->settings.pinned_bytes = 4 * scenario->settings.chunk_bytes;
    }
    const Origin file = large.add_file(4 * kMiB);
    for (int i = 0; i < 5; ++i) large.add(file, 0, 4 * kMiB, Dtype::kU8, Dtype::kU8, 0, 0);
    small.add(small.add_file(100 * kKiB), 0, 100 * kKiB, Dtype::kU8, Dtype::kU8, 0, 0);
    sim().sim_set_time(SIM_TIME_REAL);
    sim().sim_set_link(0, 1e6);  // until the small load waits, on however busy a machine
    const Hoard hoard(1, 2 * 256 * kKiB);
    std::optional one =
        device::StagingPool::instance().take(**device::Device::get(0), 256 * kKiB, 64 * kMiB);
    ASSERT_TRUE(one->ok());
    auto first = large.prepare();
    auto second = small.prepare();
    ASSERT_NE(first, nullptr);
    ASSERT_NE(second, nullptr);
    ASSERT_TRUE(first->start().ok());
    while (first->progress().done == 0) ASSERT_FALSE(first->wait(milliseconds(1)));
    ASSERT_TRUE(second->start().ok());
    while (device::StagingPool::instance().waiting() == 0) {
      ASSERT_FALSE(second->wait(milliseconds(1)));
    }
    sim().sim_set_link(0, 40e6);
    one.reset();
    wait_for(*second, "small");
    EXPECT_LT(first->progress().done, first->progress().total) << "the small load came last";
    wait_for(*first, "large");
    for (auto* const load : {first.get(), second.get()}) {
      const auto report = load->finish();
      ASSERT_TRUE(report.ok()) << report.error().describe();
      (load == first.get() ? large : small).expect_everything(*load, *report, "both");
    }
  }
  expect_machine_clean(machine, "served first");
}

}  // namespace
}  // namespace weightlift::engine::test
