// Slots that are pinned, and the kernel that is loaded, while a load is planned.
#include "engine/slots_ahead.h"

#include <cuda.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <thread>

#include "convert/scatter.h"
#include "device/context.h"
#include "device/staging.h"
#include "engine/runs.h"
#include "engine/scenario.h"
#include "engine/settings.h"
#include "simulated.h"

namespace weightlift::engine::test {
namespace {

Settings four_slots() {
  Settings settings;
  settings.threads = 2;
  settings.chunk_bytes = kMiB;
  settings.pinned_bytes = 4 * kMiB;
  return settings;
}

std::size_t free_slots() {
  return device::StagingPool::instance().free_slots(kMiB);
}

// Until there are so many, or there should have been.
void wait_for_slots(std::size_t count) {
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(10);
  while (free_slots() < count && std::chrono::steady_clock::now() < end) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  EXPECT_EQ(free_slots(), count);
}

void run_a_load(const Machine& machine, const char* what) {
  Scenario scenario(1, 1);
  scenario.settings = four_slots();
  const Origin file = scenario.add_file(6 * kMiB);
  scenario.add(file, 0, 6 * kMiB, Dtype::kU8, Dtype::kU8, 0, 0);
  run_plainly(scenario, what);
  expect_released(scenario, machine, what);
}

TEST(SlotsAhead, AreThoseThatTheLoadTakes) {
  Machine machine(1);
  const std::uint64_t of_torch = sim().sim_alloc(0, 1);
  {
    const SlotsAhead ahead(0, {.bytes = 6 * kMiB}, four_slots());
    wait_for_slots(4);
  }
  EXPECT_EQ(sim().sim_calls("cuMemHostRegister"), 4U);
  run_a_load(machine, "with slots");
  EXPECT_EQ(sim().sim_calls("cuMemHostRegister"), 4U);
  EXPECT_EQ(sim().sim_calls("cuModuleLoadData"), 0U) << "no chunk wants the kernel";
  {
    const SlotsAhead again(0, {.bytes = 6 * kMiB}, four_slots());
  }
  EXPECT_EQ(free_slots(), 4U);
  EXPECT_EQ(sim().sim_calls("cuMemHostRegister"), 4U);
  sim().sim_free(of_torch);
  expect_machine_clean(machine, "ahead");
}

TEST(SlotsAhead, AreNoMoreThanTheBytesFill) {
  Machine machine(1);
  const std::uint64_t of_torch = sim().sim_alloc(0, 1);
  {
    const SlotsAhead few(0, {.bytes = 3 * kMiB - 1}, four_slots());
    wait_for_slots(2);
  }
  {
    const SlotsAhead none(0, {.bytes = kMiB - 1}, four_slots());
  }
  EXPECT_EQ(free_slots(), 2U);
  sim().sim_free(of_torch);
  expect_machine_clean(machine, "few");
}

// As of a plan that fails, or is given up: what is being pinned is the last.
TEST(SlotsAhead, EndWithThePlan) {
  Machine machine(1);
  const std::uint64_t of_torch = sim().sim_alloc(0, 1);
  {
    const SlotsAhead ahead(0, {.bytes = 64 * kMiB}, four_slots());
  }
  const std::size_t left = free_slots();
  EXPECT_LE(left, 4U);
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  EXPECT_EQ(free_slots(), left);
  run_a_load(machine, "after it");
  sim().sim_free(of_torch);
  expect_machine_clean(machine, "ended");
}

// The files are opened with one, and the plan has another. To back a slot of this size takes much
// longer than to start a thread, so both are at work at the same time.
TEST(SlotsAhead, OfTwoForOneLoadAreNoMore) {
  Machine machine(1);
  const std::uint64_t of_torch = sim().sim_alloc(0, 1);
  auto& pool = device::StagingPool::instance();
  Settings settings;
  settings.chunk_bytes = 32 * kMiB;
  settings.pinned_bytes = 64 * kMiB;
  for (const bool stops : {false, true}) {
    {
      SlotsAhead of_the_file(0, {.bytes = 40 * kMiB}, settings);
      const SlotsAhead of_the_plan(0, {.bytes = 40 * kMiB}, settings);
      const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(10);
      while (pool.free_slots(settings.chunk_bytes) == 0 && std::chrono::steady_clock::now() < end) {
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
      }
      if (stops) of_the_file.stop();
    }
    EXPECT_EQ(pool.free_slots(settings.chunk_bytes), 1U);
    pool.clear();
  }
  sim().sim_free(of_torch);
  expect_machine_clean(machine, "two");
}

TEST(SlotsAhead, AreNoMoreAfterAStop) {
  Machine machine(1);
  const std::uint64_t of_torch = sim().sim_alloc(0, 1);
  SlotsAhead ahead(0, {.bytes = 64 * kMiB}, four_slots());
  ahead.stop();
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  const std::size_t left = free_slots();
  EXPECT_LE(left, 4U);
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  EXPECT_EQ(free_slots(), left);
  sim().sim_free(of_torch);
  expect_machine_clean(machine, "stopped");
}

// Only where the plan will certainly need it: a module takes a millisecond or more.
TEST(SlotsAhead, LoadTheKernel) {
  struct Case {
    Expected expected;
    bool kernels;
    bool loads;
  };
  constexpr std::uint64_t kEnough = 1000;
  for (const Case& one : {Case{{.bytes = 6 * kMiB}, true, false},
                          Case{{.bytes = 6 * kMiB, .casts = true}, true, true},
                          Case{{.bytes = 6 * kMiB, .casts = true}, false, false},
                          Case{{.bytes = 1, .casts = true}, true, true},
                          Case{{.bytes = 6 * kMiB, .separate = kEnough}, true, true},
                          Case{{.bytes = 6 * kMiB, .separate = 20}, true, false}}) {
    Machine machine(1);
    const std::uint64_t of_torch = sim().sim_alloc(0, 1);
    Settings settings = four_slots();
    settings.kernels = one.kernels;
    {
      const SlotsAhead ahead(0, one.expected, settings);
      wait_for_slots(std::min<std::size_t>(4, one.expected.bytes / kMiB));
    }  // which ends after the kernel is loaded
    const bool built = !convert::scatter_images().empty();
    EXPECT_EQ(sim().sim_calls("cuModuleLoadData"), one.loads && built ? 1U : 0U)
        << one.expected.bytes << " bytes, " << one.expected.separate << " separate";
    sim().sim_free(of_torch);
    expect_machine_clean(machine, "kernel");
  }
}

// Loaded or refused: the second finds out without a thread, and asks the driver nothing.
TEST(SlotsAhead, RequestTheKernelOnce) {
  for (const bool refused : {false, true}) {
    Machine machine(1);
    const std::uint64_t of_torch = sim().sim_alloc(0, 1);
    const std::size_t images = convert::scatter_images().size();
    for (std::size_t n = 1; refused && n <= images; ++n) {
      sim().sim_fail_call("cuModuleLoadData", n, CUDA_ERROR_NO_BINARY_FOR_GPU, 0);
    }
    const Expected expected{.bytes = 1, .casts = true};
    EXPECT_FALSE(device::Device::kernel_is_requested(0));
    {
      const SlotsAhead first(0, expected, four_slots());
    }
    EXPECT_TRUE(device::Device::kernel_is_requested(0));
    EXPECT_FALSE(device::Device::kernel_is_requested(1));
    const std::uint64_t calls = sim().ledger().calls;
    {
      const SlotsAhead second(0, expected, four_slots());
    }
    EXPECT_EQ(sim().ledger().calls, calls);
    sim().sim_free(of_torch);
    expect_machine_clean(machine, "requested");
  }
}

TEST(SlotsAhead, StartNoDevice) {
  Machine machine(2);
  {
    const SlotsAhead ahead(0, {.bytes = 6 * kMiB}, four_slots());
  }
  EXPECT_EQ(sim().sim_calls("cuInit"), 0U);
  const std::uint64_t of_torch = sim().sim_alloc(0, 1);
  {
    const SlotsAhead other(1, {.bytes = 6 * kMiB}, four_slots());
    const SlotsAhead beyond(7, {.bytes = 6 * kMiB}, four_slots());
    const SlotsAhead kernel(1, {.bytes = 6 * kMiB, .casts = true}, four_slots());
  }
  EXPECT_EQ(sim().ledger().contexts, 0U);
  EXPECT_EQ(free_slots(), 0U);
  sim().sim_free(of_torch);
  expect_machine_clean(machine, "not in use");
}

TEST(SlotsAhead, AreLeftToTheLoadWhereTheyFail) {
  Machine machine(1);
  const std::uint64_t of_torch = sim().sim_alloc(0, 1);
  sim().sim_fail_call("cuMemHostRegister", 1, kUnknownError, 0);
  sim().sim_fail_call("cuMemHostAlloc", 1, kUnknownError, 0);
  {
    const SlotsAhead ahead(0, {.bytes = 6 * kMiB}, four_slots());
    while (sim().sim_faults_left() != 0) std::this_thread::yield();
  }
  EXPECT_EQ(sim().ledger().pinned_bytes, 0U);
  run_a_load(machine, "after it");
  sim().sim_free(of_torch);
  expect_machine_clean(machine, "failed");
}

TEST(SlotsAhead, AreNotNeededWhereTheDeviceReadsPageableMemory) {
  Machine machine(1);
  sim().sim_set_attribute(0, CU_DEVICE_ATTRIBUTE_PAGEABLE_MEMORY_ACCESS, 1);
  sim().sim_set_attribute(0, CU_DEVICE_ATTRIBUTE_PAGEABLE_MEMORY_ACCESS_USES_HOST_PAGE_TABLES, 1);
  const std::uint64_t of_torch = sim().sim_alloc(0, 1);
  {
    const SlotsAhead ahead(0, {.bytes = 6 * kMiB}, four_slots());
    while (sim().ledger().contexts == 0) std::this_thread::yield();
  }
  EXPECT_EQ(sim().sim_calls("cuMemHostRegister"), 0U);
  sim().sim_free(of_torch);
  expect_machine_clean(machine, "page tables");
}

TEST(SlotsAhead, BreakNoCapture) {
  Machine machine(1);
  const std::uint64_t stream = sim().sim_stream_create(0);
  std::thread([&] { EXPECT_EQ(sim().sim_begin_capture(0, stream, SIM_CAPTURE_GLOBAL), 1); }).join();
  {
    const SlotsAhead ahead(0, {.bytes = 6 * kMiB}, four_slots());
    wait_for_slots(4);
  }
  EXPECT_EQ(sim().sim_end_capture(0, stream), 1);
  sim().sim_stream_destroy(stream);
  expect_machine_clean(machine, "captured");
}

}  // namespace
}  // namespace weightlift::engine::test
