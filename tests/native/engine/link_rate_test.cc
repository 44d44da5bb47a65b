// Links of simulated devices kept busy, in real time.
#include <cuda.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <string>

#include "engine/runs.h"
#include "engine/scenario.h"
#include "simulated.h"

namespace weightlift::engine::test {
namespace {

// The rate of all links in bytes/s, from the start of the first copy to the end of the last.
double link_rate(int devices) {
  double first = 1e30;
  double last = 0;
  std::uint64_t bytes = 0;
  for (int i = 0; i < devices; ++i) {
    SimLink link;
    sim().sim_link(i, &link);
    if (link.bytes_to_device == 0) continue;
    first = std::min(first, link.first_start);
    last = std::max(last, link.last_finish);
    bytes += link.bytes_to_device;
  }
  return static_cast<double>(bytes) / (last - first);
}

// The smallest share of its rate that a link reached, from its first byte to its last.
double least_share(int devices, double rate) {
  double least = 1;
  for (int device = 0; device < devices; ++device) {
    SimLink link;
    sim().sim_link(device, &link);
    const double seconds = link.last_finish - link.first_start;
    least = std::min(least, static_cast<double>(link.bytes_to_device) / seconds / rate);
  }
  return least;
}

// A model with one part for each device, as in a device map; the first part is `first_share` times
// as large as the others. Returns the share of the best possible rate, or that of the least busy
// link if it is smaller.
double link_share(int devices, double link, double host_memory, std::uint64_t first_share) {
  Machine machine(devices);
  double rate = 0;
  double least = 1;
  {
    Scenario scenario(1, devices);
    scenario.settings.threads = 2;
    scenario.settings.chunk_bytes = 512 * kKiB;
    scenario.settings.pinned_bytes = 4 * kMiB;
    const Origin file = scenario.add_file(8 * kMiB);
    constexpr std::uint64_t kTensor = 1'000'003;
    for (int device = 0; device < devices; ++device) {
      for (std::uint64_t i = 0; i < 6 * (device == 0 ? first_share : 1); ++i) {
        scenario.add(file, i % 7 * kTensor, kTensor, Dtype::kU8, Dtype::kU8, device, 0);
      }
    }
    sim().sim_set_hashing(0);
    sim().sim_set_time(SIM_TIME_REAL);
    for (int device = 0; device < devices; ++device) sim().sim_set_link(device, link);
    sim().sim_set_host_memory(host_memory);
    run_plainly(scenario, "links");
    rate = link_rate(devices);
    if (host_memory == 0) least = least_share(devices, link);
  }
  expect_machine_clean(machine, "links");
  const double parts = static_cast<double>(devices) - 1 + static_cast<double>(first_share);
  double best = link * parts / static_cast<double>(first_share);
  if (host_memory > 0) best = std::min(best, host_memory);
  return std::min(rate / best, least);
}

// The best of three, because other processes may use the processors for a moment.
void expect_full_links(int devices, double link, double host_memory, std::uint64_t first_share) {
  double best = 0;
  for (int i = 0; i < 3 && best < 0.9; ++i) {
    best = std::max(best, link_share(devices, link, host_memory, first_share));
  }
  EXPECT_GE(best, 0.9) << devices << " links of " << link << " bytes/s, host " << host_memory;
}

TEST(LinkRate, OfAllAtOnce) {
  expect_full_links(8, 30e6, 0, 1);
}
TEST(LinkRate, UnderALimitOfTheHostsMemory) {
  expect_full_links(8, 100e6, 200e6, 1);
}
TEST(LinkRate, OfALopsidedPlan) {
  expect_full_links(8, 30e6, 0, 3);
}

// One link of eight has a quarter of the others' rate: all must be busy until their ends. Returns
// the smallest share of its own rate that a link reached, from its first byte to its last.
double least_share_beside_a_slow_link() {
  constexpr int kDevices = 8;
  constexpr double kLink = 40e6;
  Machine machine(kDevices);
  double least = 1;
  {
    Scenario scenario(2, kDevices);
    scenario.settings.threads = 2;
    scenario.settings.chunk_bytes = 512 * kKiB;
    scenario.settings.pinned_bytes = 4 * kMiB;
    const Origin file = scenario.add_file(8 * kMiB);
    for (int device = 0; device < kDevices; ++device) {
      for (std::uint64_t i = 0; i < 6; ++i) {
        scenario.add(file, i * 1'000'003, 1'000'003, Dtype::kU8, Dtype::kU8, device, 0);
      }
    }
    const auto rate = [](int device) { return device == 5 ? kLink / 4 : kLink; };
    sim().sim_set_hashing(0);
    sim().sim_set_time(SIM_TIME_REAL);
    for (int device = 0; device < kDevices; ++device) sim().sim_set_link(device, rate(device));
    run_plainly(scenario, "a slow link");
    for (int device = 0; device < kDevices; ++device) {
      SimLink link;
      sim().sim_link(device, &link);
      const double seconds = link.last_finish - link.first_start;
      least = std::min(least, static_cast<double>(link.bytes_to_device) / seconds / rate(device));
    }
  }
  expect_machine_clean(machine, "a slow link");
  return least;
}

TEST(LinkRate, BesideASlowLink) {
  double best = 0;
  for (int i = 0; i < 3 && best < 0.9; ++i) best = std::max(best, least_share_beside_a_slow_link());
  EXPECT_GE(best, 0.9);
}

// The load ends with that device's error. The others are drained, and nothing is left behind.
TEST(LinkFailure, OfOneOfEightLate) {
  for (const std::uint64_t late : {20U, 40U, 55U}) {
    Machine machine(8);
    {
      Scenario scenario(3, 8);
      scenario.settings.threads = 2;
      scenario.settings.chunk_bytes = 512 * kKiB;
      const Origin file = scenario.add_file(8 * kMiB);
      for (int device = 0; device < 8; ++device) {
        for (std::uint64_t i = 0; i < 6; ++i) {
          scenario.add(file, i * 1'000'003, 1'000'003, Dtype::kU8, Dtype::kU8, device, 0);
        }
      }
      auto load = scenario.prepare();
      ASSERT_NE(load, nullptr);
      sim().sim_fail_call("cuMemcpyHtoDAsync", late, CUDA_ERROR_LAUNCH_FAILED, 0);
      ASSERT_TRUE(load->start().ok());
      wait_for(*load, "late");
      const auto report = load->finish();
      ASSERT_FALSE(report.ok()) << "there were fewer copies than " << late;
      EXPECT_NE(report.error().message.find("cuMemcpyHtoDAsync"), std::string::npos);
      load.reset();
      EXPECT_EQ(sim().ledger().pending, 0U);
      scenario.expect_no_traces("late");
      run_plainly(scenario, "the load after it");
    }
    expect_machine_clean(machine, "late");
  }
}

// A chunk of 4 MiB takes 76 us on a link of 55 GB/s. Here it takes about a hundred times as long,
// and so do a call that queues (3 us) and waking a thread (50 us). One thread fills the slots, and
// the link must stay busy.
double share_with_costs() {
  constexpr double kLink = 60e6;
  constexpr double kChunk = 512 * kKiB / kLink;
  Machine machine(1);
  double share = 0;
  {
    Scenario scenario(1, 1);
    scenario.settings.threads = scenario.settings.io_depth = 1;
    scenario.settings.chunk_bytes = 512 * kKiB;
    scenario.settings.pinned_bytes = 4 * kMiB;
    const Origin file = scenario.add_file(8 * kMiB);
    for (std::uint64_t i = 0; i < 32; ++i) {
      scenario.add(file, i % 7 * 1'000'003, 1'000'003, Dtype::kU8, Dtype::kU8, 0, 0);
    }
    sim().sim_set_hashing(0);
    sim().sim_set_time(SIM_TIME_REAL);
    sim().sim_set_link(0, kLink);
    sim().sim_set_costs(kChunk * 3 / 76, kChunk * 50 / 76);
    run_plainly(scenario, "costs");
    share = least_share(1, kLink);
  }
  expect_machine_clean(machine, "costs");
  return share;
}

TEST(LinkRate, WithWhatCallsAndWakingCost) {
  double best = 0;
  for (int i = 0; i < 3 && best < 0.9; ++i) best = std::max(best, share_with_costs());
  EXPECT_GE(best, 0.9);
}

// As many tensors as a large mixture of experts with separate experts; half a million in a deep
// run.
double share_of_small_tensors() {
  constexpr int kDevices = 8;
  const bool deep = number_from_environment("WEIGHTLIFT_SEEDS", 0) >= 1000;
  const std::uint64_t tensors = deep ? 500'000 : 50'000;
  const double rate = 1.2e6;
  Machine machine(kDevices);
  double least = 1;
  {
    Scenario scenario(4, kDevices);
    scenario.settings.threads = 2;
    scenario.settings.chunk_bytes = 256 * kKiB;
    scenario.settings.pinned_bytes = 2 * kMiB;
    constexpr std::uint64_t kTensor = 15;
    const Origin file = scenario.add_file(tensors * kTensor);
    for (std::uint64_t i = 0; i < tensors; ++i) {
      scenario.add(file, i * kTensor, kTensor, Dtype::kU8, Dtype::kU8,
                   static_cast<int>(i * kDevices / tensors), i % 3);
    }
    sim().sim_set_hashing(0);
    sim().sim_set_time(SIM_TIME_REAL);
    for (int device = 0; device < kDevices; ++device) sim().sim_set_link(device, rate);
    run_plainly(scenario, "small tensors");
    least = least_share(kDevices, rate);
  }
  expect_machine_clean(machine, "small tensors");
  return least;
}

TEST(LinkRate, OfHundredsOfThousandsOfTensors) {
  double best = 0;
  for (int i = 0; i < 3 && best < 0.9; ++i) best = std::max(best, share_of_small_tensors());
  EXPECT_GE(best, 0.9);
}

TEST(LinkRate, OfOne) {
  expect_full_links(1, 60e6, 0, 1);
}

}  // namespace
}  // namespace weightlift::engine::test
