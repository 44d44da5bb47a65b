// Loads in an order of use, whose caller waits for single tensors.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <memory>
#include <numeric>
#include <string>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#include "engine/order_of_use.h"
#include "engine/runs.h"
#include "engine/scenario.h"
#include "engine/schedule.h"
#include "engine/sources.h"
#include "io/residency.h"
#include "simulated.h"
#include "vm_flags.h"

namespace weightlift::engine::test {
namespace {

constexpr milliseconds kLong{20'000};

// The last tensor of the plan first.
void reverse(LoadPlan& plan) {
  plan.ranks.resize(plan.names.size());
  std::iota(plan.ranks.rbegin(), plan.ranks.rend(), 0U);
}

// Larger than the noise that files are made of.
Origin add_large_file(Scenario& scenario, std::uint64_t bytes) {
  std::vector<std::byte> content;
  while (content.size() < bytes) {
    const std::uint64_t part = std::min<std::uint64_t>(bytes - content.size(), 7 * kMiB);
    const std::vector<std::byte> more = some_noise(scenario.random, part);
    content.insert(content.end(), more.begin(), more.end());
  }
  scenario.files.emplace_back(std::move(content));
  const std::uint32_t index = scenario.plan.add_file(scenario.files.back().open());
  return {.file = index, .bytes = &scenario.files.back().bytes()};
}

std::vector<std::uint32_t> all_of(const LoadPlan& plan) {
  std::vector<std::uint32_t> names(plan.names.size());
  std::iota(names.begin(), names.end(), 0U);
  return names;
}

TEST(BatchesOfUse, FollowTheRanksAndNotTheFile) {
  LoadPlan plan;
  const std::vector<std::byte> bytes(kKiB);
  const TestFile file(bytes);
  const std::uint32_t index = plan.add_file(file.open());
  for (const char* name : {"a", "b", "c", "d"}) {
    const std::uint32_t number = plan.add_name(name);
    plan.add_copy({.file = index, .elements = 6 * kMiB, .name = number});
  }
  plan.ranks = {3, 1, 0, 2};  // c, b, d, a
  EXPECT_EQ(batches_of_use(plan), (std::vector<std::uint32_t>{1, 0, 0, 1}));
}

// The tensor that is used first arrives first, though it lies last in the file.
TEST(Schedule, OfAnOrderOfUse) {
  Machine machine(0);
  Scenario scenario(1, 0);
  const Origin file = add_large_file(scenario, 48 * kMiB);
  for (std::uint64_t i = 0; i < 6; ++i) {
    scenario.add(file, i * 8 * kMiB, 8 * kMiB, Dtype::kU8, Dtype::kU8, kHostDevice, 64);
  }
  reverse(scenario.plan);
  auto schedule = Schedule::make(scenario.plan, scenario.settings.resolved());
  ASSERT_TRUE(schedule.ok());
  std::vector<std::uint32_t> order;
  for (const Unit& unit : schedule->lanes.front().units) {
    for (std::uint32_t i = 0; i < unit.piece_count; ++i) {
      const Piece& piece = schedule->lanes.front().pieces[unit.first_piece + i];
      const std::uint32_t name = scenario.plan.copies[piece.copy].name;
      if (order.empty() || order.back() != name) order.push_back(name);
    }
  }
  EXPECT_EQ(order, (std::vector<std::uint32_t>{5, 4, 3, 2, 1, 0}));
}

// On the host, each tensor has its bytes when wait_for() returns, in any order of calls.
TEST(WaitFor, TensorsOnTheHost) {
  for (std::uint64_t seed = 0; seed < 8; ++seed) {
    Machine machine(0, seed);
    Scenario scenario(seed, 0);
    scenario.settings.threads = 2;
    const Origin file = add_large_file(scenario, 9 * kMiB);
    std::vector<std::uint64_t> sizes;
    std::uint64_t offset = 0;
    while (offset + 2 * kMiB < 9 * kMiB) {
      const std::uint64_t size = scenario.random.below(2 * kMiB);
      scenario.add(file, offset, size, Dtype::kU8, Dtype::kU8, kHostDevice, 16);
      sizes.push_back(size);
      offset += size + scenario.random.below(8 * kKiB);
    }
    reverse(scenario.plan);
    const LoadPlan& plan = scenario.plan;
    auto load = scenario.prepare();
    ASSERT_NE(load, nullptr);
    ASSERT_TRUE(load->start().ok());
    std::size_t copy = 0;
    for (std::uint32_t name = 0; name < plan.names.size(); ++name) {
      const auto arrived = load->wait_for(std::array{name}, kLong);
      ASSERT_TRUE(arrived.ok()) << arrived.error().describe();
      ASSERT_TRUE(*arrived);
      if (sizes[name] == 0) continue;
      const Copy& of = plan.copies[copy++];
      EXPECT_EQ(0, std::memcmp(reinterpret_cast<const void*>(of.target),
                               file.bytes->data() + of.source, sizes[name]));
    }
    ASSERT_TRUE(load->wait(kLong));
    const auto report = load->finish();
    ASSERT_TRUE(report.ok()) << report.error().describe();
    scenario.expect_everything(*load, *report, "host");
  }
}

// A stream waits for the copies instead of the host, and later work on the stream finds the bytes.
// The simulated devices run each stream as late as possible.
TEST(WaitFor, StreamsOfDevices) {
  for (std::uint64_t seed = 0; seed < 24; ++seed) {
    Machine machine(2, seed, static_cast<int>(seed % SIM_POLICIES));
    Scenario scenario(seed, 2);
    scenario.settings.threads = 2;
    scenario.settings.chunk_bytes = kMiB;
    scenario.settings.pinned_bytes = 2 * kMiB;
    const Origin file = scenario.add_file(8 * kMiB);
    for (std::uint64_t i = 0; i < 8; ++i) {
      scenario.add(file, i * kMiB, kMiB - i, Dtype::kU8, Dtype::kU8, static_cast<int>(i % 2), 0);
    }
    reverse(scenario.plan);
    scenario.queue_pending_writes();
    const std::vector<Copy> copies = scenario.plan.copies;
    auto load = scenario.prepare();
    ASSERT_NE(load, nullptr);
    ASSERT_TRUE(load->start().ok());
    const std::array<std::uint64_t, 2> streams = {sim().sim_stream_create(0),
                                                  sim().sim_stream_create(1)};
    for (std::uint32_t i = 8; i-- > 0;) {
      const std::uint32_t device = i % 2;
      auto* const stream = reinterpret_cast<CUstream>(streams.at(device));
      const auto queued = load->wait_for(std::array{i}, static_cast<int>(device), stream, kLong);
      ASSERT_TRUE(queued.ok()) << queued.error().describe();
      ASSERT_TRUE(*queued);
      // A use of the tensor on the stream.
      std::vector<std::byte> seen(kMiB - i);
      ASSERT_NE(sim().sim_read_on(static_cast<int>(device), streams.at(device), copies[i].target,
                                  seen.data(), seen.size()),
                0);
      EXPECT_EQ(0, std::memcmp(seen.data(), file.bytes->data() + copies[i].source, seen.size()))
          << "seed " << seed << ", tensor " << i;
    }
    ASSERT_TRUE(load->wait(kLong));
    const auto report = load->finish();
    ASSERT_TRUE(report.ok()) << report.error().describe();
    scenario.expect_everything(*load, *report, "streams");
    for (const std::uint64_t stream : streams) sim().sim_stream_destroy(stream);
    load.reset();
    scenario.free_blocks();
    expect_machine_clean(machine, "streams");
  }
}

// Tensors that arrived before the fault are returned; for the others wait_for() returns the load's
// error.
TEST(WaitFor, FilesThatEndEarly) {
  Machine machine(0);
  Scenario scenario(3, 0);
  scenario.settings.threads = 1;
  const Origin file = add_large_file(scenario, 32 * kMiB);
  for (std::uint64_t i = 0; i < 4; ++i) {
    scenario.add(file, i * 8 * kMiB, 8 * kMiB, Dtype::kU8, Dtype::kU8, kHostDevice, 0);
  }
  scenario.plan.ranks = {0, 1, 2, 3};
  auto load = scenario.prepare();
  ASSERT_NE(load, nullptr);
  ASSERT_EQ(::truncate(scenario.files.back().path().c_str(), 20 * kMiB), 0);
  ASSERT_TRUE(load->start().ok());
  ASSERT_TRUE(load->wait(kLong));
  const auto last = load->wait_for(std::array<std::uint32_t, 1>{3}, kLong);
  ASSERT_FALSE(last.ok());
  EXPECT_EQ(last.error().path, scenario.files.back().path());
  EXPECT_FALSE(last.error().tensor.empty());
  // All bytes of the first tensor arrived, but the file has changed, so it is not handed out
  // either.
  EXPECT_FALSE(load->wait_for(std::array<std::uint32_t, 1>{0}, kLong).ok());
  EXPECT_FALSE(load->finish().ok());
}

TEST(WaitFor, CancelledLoads) {
  Machine machine(0);
  Scenario scenario(4, 0);
  scenario.settings.threads = 1;
  const Origin file = add_large_file(scenario, 64 * kMiB);
  for (std::uint64_t i = 0; i < 4; ++i) {
    scenario.add(file, i * 16 * kMiB, 16 * kMiB, Dtype::kU8, Dtype::kU8, kHostDevice, 0);
  }
  reverse(scenario.plan);
  auto load = scenario.prepare();
  ASSERT_NE(load, nullptr);
  ASSERT_TRUE(load->start().ok());
  // A call that waits when the load is cancelled ends too.
  std::thread waits([&] { static_cast<void>(load->wait_for(all_of(scenario.plan), kLong)); });
  load->cancel();
  waits.join();
  ASSERT_TRUE(load->wait(kLong));
  const auto all = load->wait_for(all_of(scenario.plan), milliseconds(0));
  EXPECT_TRUE(all.ok() || all.error().code == ErrorCode::kCancelled);
}

// Mapped tensors have arrived when their populate steps are done.
TEST(StepsByName, CountTheStepsOfEachRange) {
  Machine machine(0);
  Scenario scenario(5, 0);
  const Origin file = add_large_file(scenario, 80 * kMiB);
  scenario.add_mapped(file, 0, 20 * kMiB);
  scenario.add_mapped(file, 20 * kMiB, 100);
  scenario.add_mapped(file, 40 * kMiB, 30 * kMiB);
  scenario.add_mapped(file, 72 * kMiB, 0);
  reverse(scenario.plan);
  const Sources sources(scenario.plan, scenario.settings.resolved());
  const std::vector<std::uint32_t> steps = sources.steps_by_name();
  const auto& planned = sources.populate_steps();
  for (std::uint32_t name = 0; name < steps.size(); ++name) {
    const Mapped& part = scenario.plan.mapped[name];
    for (std::uint32_t i = 0; i < planned.size(); ++i) {
      const bool overlaps = planned[i].offset < part.offset + part.bytes &&
                            part.offset < planned[i].offset + planned[i].bytes;
      EXPECT_TRUE(!overlaps || steps[name] >= i + 1) << name;
    }
    EXPECT_LE(steps[name], planned.size());
  }
  EXPECT_EQ(steps[3], 0U);
  auto load = scenario.prepare();
  ASSERT_NE(load, nullptr);
  ASSERT_TRUE(load->start().ok());
  const auto arrived = load->wait_for(all_of(scenario.plan), kLong);
  ASSERT_TRUE(arrived.ok());
  EXPECT_TRUE(*arrived);
  ASSERT_TRUE(load->wait(kLong));
  const auto report = load->finish();
  ASSERT_TRUE(report.ok());
  scenario.expect_everything(*load, *report, "mapped");
}

// Removes a file from the page cache.
void drop(const Scenario& scenario) {
  const int fd = ::open(scenario.files[0].path().c_str(), O_WRONLY | O_CLOEXEC);
  ASSERT_EQ(::fdatasync(fd), 0);
  ::close(fd);
  io::drop_from_page_cache(*scenario.plan.files[0]);
}

TEST(Sources, MappingsReadForwardsUntilTheEnd) {
  Machine machine(0);
  Scenario scenario(5, 0);
  const Origin file = scenario.add_file(2 * kMiB);
  scenario.add_mapped(file, 1000, kMiB);
  drop(scenario);
  const std::byte* const data = scenario.plan.mappings[0]->data();
  for (const bool ends : {true, false}) {
    {
      Sources sources(scenario.plan, scenario.settings.resolved());
      if (sources.populate_steps().empty()) {
        GTEST_SKIP() << "files cannot leave the page cache of " << folder();
      }
      EXPECT_TRUE(has_vm_flag(data, "sr"));
      if (ends) sources.release();
      EXPECT_EQ(has_vm_flag(data, "sr"), !ends);
    }
    EXPECT_FALSE(has_vm_flag(data, "sr"));
  }
}

TEST(Sources, ReadInLargeFoliosWhereMostOfAFileIsNeeded) {
  if (::access("/sys/kernel/mm/transparent_hugepage", F_OK) != 0) {
    GTEST_SKIP() << "the kernel has no huge pages";
  }
  for (const auto& [is_dense, may] : {std::pair{true, true}, {false, true}, {true, false}}) {
    Machine machine(0);
    Scenario scenario(5, 0);
    if (!may) scenario.settings.huge_pages = HugePages::kNever;
    const Origin file = scenario.add_file(2 * kMiB);
    scenario.add_mapped(file, 1000, 4096);
    scenario.add_mapped(file, kMiB / 2, is_dense ? kMiB : 4096);
    reverse(scenario.plan);
    drop(scenario);
    const Sources sources(scenario.plan, scenario.settings.resolved());
    if (sources.populate_steps().empty()) {
      GTEST_SKIP() << "files cannot leave the page cache of " << folder();
    }
    EXPECT_EQ(has_vm_flag(scenario.plan.mappings[0]->data(), "hg"), is_dense && may);
  }
}

TEST(Sources, ReadInSmallFoliosOnceLargeOnesArriveSlowly) {
  if (::access("/sys/kernel/mm/transparent_hugepage", F_OK) != 0) {
    GTEST_SKIP() << "the kernel has no huge pages";
  }
  for (const auto& [is_slow, pages, stays] : {std::tuple{false, HugePages::kAuto, true},
                                              {true, HugePages::kAuto, false},
                                              {true, HugePages::kAlways, true}}) {
    Machine machine(0);
    Scenario scenario(5, 0);
    scenario.settings.huge_pages = pages;
    const Origin file = scenario.add_file(2 * kMiB);
    scenario.add_mapped(file, 1000, kMiB);
    scenario.add_mapped(file, kMiB + 1000, kMiB / 2);
    reverse(scenario.plan);
    drop(scenario);
    const auto read_page = [is_slow = is_slow](std::uint64_t) {
      if (is_slow) std::this_thread::sleep_for(std::chrono::microseconds(10));
      return true;
    };
    Sources sources(scenario.plan, scenario.settings.resolved(), read_page);
    if (sources.populate_steps().empty()) {
      GTEST_SKIP() << "files cannot leave the page cache of " << folder();
    }
    ASSERT_EQ(sources.populate_steps().size(), 1U);
    ASSERT_TRUE(sources.populate(sources.populate_steps()[0]).ok());
    EXPECT_TRUE(has_vm_flag(scenario.plan.mappings[0]->data(), "hg"));  // once is chance
    ASSERT_TRUE(sources.populate(sources.populate_steps()[0]).ok());
    EXPECT_EQ(has_vm_flag(scenario.plan.mappings[0]->data(), "hg"), stays);
    EXPECT_EQ(sources.reason(0).find("in small folios") == std::string::npos, stays);
  }
}

TEST(WaitFor, PlansWithoutNamesAreRefused) {
  LoadPlan plan;
  plan.ranks = {0, 1};
  const auto load = Load::prepare(plan, {});
  ASSERT_FALSE(load.ok());
  EXPECT_EQ(load.error().code, ErrorCode::kInvalidArgument);
}

}  // namespace
}  // namespace weightlift::engine::test
