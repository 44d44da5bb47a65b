// Links of simulated devices kept busy, in real time.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>

#include "engine/runs.h"
#include "engine/scenario.h"
#include "simulated.h"

namespace weightlift::engine::test {
namespace {

// Bytes a second over all links, from the first copy's start to the last one's end.
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

// A model cut into one part a device, as device maps do; the first part `first_share` times as
// large as the others. Share of the best possible rate.
double link_share(int devices, double link, double host_memory, std::uint64_t first_share) {
  Machine machine(devices);
  double rate = 0;
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
  }
  expect_machine_clean(machine, "links");
  const double parts = static_cast<double>(devices) - 1 + static_cast<double>(first_share);
  double best = link * parts / static_cast<double>(first_share);
  if (host_memory > 0) best = std::min(best, host_memory);
  return rate / best;
}

// Other processes may hold the processors for a moment: the best of three.
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
  expect_full_links(4, 40e6, 0, 3);
}
TEST(LinkRate, OfOne) {
  expect_full_links(1, 60e6, 0, 1);
}

}  // namespace
}  // namespace weightlift::engine::test
