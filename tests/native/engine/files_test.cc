// Files that change or cannot be read.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <thread>
#include <vector>

#include "engine/load.h"
#include "engine/random_plans.h"
#include "engine/runs.h"
#include "engine/scenario.h"
#include "io/residency.h"
#include "simulated.h"

namespace weightlift::engine::test {
namespace {

void write_to(const Scenario& scenario, off_t offset) {
  const int fd = ::open(scenario.files[0].path().c_str(), O_WRONLY | O_CLOEXEC);
  ASSERT_EQ(::pwrite(fd, "not that", 8, offset), 8);
  ::close(fd);
}

TEST(LoadOfChangedFile, Truncated) {
  for (std::uint64_t seed = 0; seed < 20; ++seed) {
    SCOPED_TRACE(seed);
    Machine machine(1, seed, static_cast<int>(seed % SIM_POLICIES));
    {
      Scenario scenario(seed, 1);
      Random& random = scenario.random;
      scenario.settings = random_settings(random);
      const Origin file = scenario.add_file(3 * kMiB);
      for (std::uint64_t i = 0; i < 12; ++i) {
        scenario.add(file, 100 + i * 256 * kKiB, 60'000, Dtype::kF32,
                     random.chance(30) ? Dtype::kBf16 : Dtype::kF32, random.chance(50) ? 0 : -1, 0);
      }
      auto load = scenario.prepare();
      ASSERT_NE(load, nullptr);
      const auto truncate = [&] {
        ASSERT_EQ(::truncate(scenario.files[0].path().c_str(),
                             static_cast<off_t>(random.below(3 * kMiB - 300'000))),
                  0);
      };
      const bool before = random.chance(50);
      if (before) truncate();
      ASSERT_TRUE(load->start().ok());
      if (!before) {
        std::this_thread::sleep_for(std::chrono::microseconds(random.below(1500)));
        truncate();
      }
      wait_for(*load, "truncated");
      const auto report = load->finish();
      ASSERT_FALSE(report.ok());
      EXPECT_EQ(report.error().code, ErrorCode::kFileShrank) << report.error().describe();
      EXPECT_EQ(report.error().path, scenario.files[0].path());
      load.reset();
      scenario.expect_no_traces("truncated");
    }
    expect_machine_clean(machine, "truncated");
  }
}

TEST(LoadOfChangedFile, TruncatedMappingIsAnErrorAndNoSignal) {
  Machine machine(0);
  Scenario scenario(1, 0);
  const Origin file = scenario.add_file(2 * kMiB);
  scenario.add_mapped(file, 1000, 2 * kMiB - 1000);
  const int fd = ::open(scenario.files[0].path().c_str(), O_WRONLY | O_CLOEXEC);
  ASSERT_EQ(::fdatasync(fd), 0);
  io::drop_from_page_cache(*scenario.plan.files[0]);
  auto load = scenario.prepare();
  ASSERT_NE(load, nullptr);
  ASSERT_EQ(::ftruncate(fd, kMiB), 0);
  ::close(fd);
  ASSERT_TRUE(load->start().ok());
  wait_for(*load, "truncated mapping");
  const auto report = load->finish();
  ASSERT_FALSE(report.ok());
  EXPECT_EQ(report.error().code, ErrorCode::kFileShrank) << report.error().describe();
}

// Bytes that were written before the first read are loaded.
TEST(LoadOfChangedFile, RewrittenBefore) {
  Machine machine(1);
  {
    Scenario scenario(1, 1);
    fill_with_one_of_everything(scenario);
    auto load = scenario.prepare();
    ASSERT_NE(load, nullptr);
    std::this_thread::sleep_for(milliseconds(10));  // past the clock tick of its creation
    write_to(scenario, 500);
    ASSERT_TRUE(load->start().ok());
    wait_for(*load, "rewritten before");
    const auto report = load->finish();
    ASSERT_TRUE(report.ok()) << report.error().describe();
    EXPECT_TRUE(report->touched.empty());
  }
  expect_machine_clean(machine, "rewritten before");
}

// Bytes on a device cannot be compared with the file; bytes in host memory can.
TEST(LoadOfChangedFile, RewrittenMeanwhile) {
  for (const int target : {kHostDevice, 0}) {
    Machine machine(1);
    {
      Scenario scenario(1, 1);
      const Origin file = scenario.add_file(2 * kMiB);
      scenario.add(file, 1000, 400'000, Dtype::kF32, Dtype::kF32, target, 0);
      auto load = scenario.prepare();
      ASSERT_NE(load, nullptr);
      std::this_thread::sleep_for(milliseconds(10));  // past the clock tick of its creation
      ASSERT_TRUE(load->start().ok());
      wait_for(*load, "rewritten meanwhile");
      write_to(scenario, 5000);
      const auto report = load->finish();
      if (target == kHostDevice) {
        ASSERT_FALSE(report.ok());
        EXPECT_EQ(report.error().code, ErrorCode::kFileChanged) << report.error().describe();
      } else {
        ASSERT_TRUE(report.ok()) << report.error().describe();
        EXPECT_EQ(report->touched, std::vector{scenario.files[0].path()});
      }
    }
    expect_machine_clean(machine, "rewritten meanwhile");
  }
}

// Sets the file's times during a load, as utimensat(2) does. The bytes are the same.
void touch_during_a_load(const timespec* times) {
  Machine machine(1);
  {
    Scenario scenario(1, 1);
    const Origin file = scenario.add_file(2 * kMiB);
    scenario.add(file, 1000, 100'000, Dtype::kF32, Dtype::kF32, kHostDevice, 0);
    scenario.add(file, 500'000, 100'000, Dtype::kF32, Dtype::kF16, kHostDevice, 0);
    auto load = scenario.prepare();
    ASSERT_NE(load, nullptr);
    std::this_thread::sleep_for(milliseconds(10));  // past the clock tick of its creation
    ASSERT_TRUE(load->start().ok());
    wait_for(*load, "touched");
    ASSERT_EQ(::utimensat(AT_FDCWD, scenario.files[0].path().c_str(), times, 0), 0);
    const auto report = load->finish();
    ASSERT_TRUE(report.ok()) << report.error().describe();
    EXPECT_TRUE(report->touched.empty());
  }
  expect_machine_clean(machine, "touched");
}

TEST(LoadOfChangedFile, TouchedMeanwhile) {
  touch_during_a_load(nullptr);
}

TEST(LoadOfChangedFile, TimeSetMeanwhile) {
  constexpr std::array<timespec, 2> kTimes = {
      {{.tv_sec = 5, .tv_nsec = 0}, {.tv_sec = 5, .tv_nsec = 1}}};
  touch_during_a_load(kTimes.data());
}

// The errors of a bad disk or a lost network.
TEST(LoadOfChangedFile, Unreadable) {
  for (const int target : {kHostDevice, 0}) {
    Machine machine(1);
    {
      Scenario scenario(1, 1);
      scenario.settings.io_path = IoPath::kBuffered;
      const Origin file = scenario.add_file(2 * kMiB);
      for (std::uint64_t i = 0; i < 4; ++i) {
        scenario.add(file, i * 400'000, 100'000, Dtype::kF32,
                     i % 2 == 0 ? Dtype::kF32 : Dtype::kF16, target, 0);
      }
      auto load = scenario.prepare();
      ASSERT_NE(load, nullptr);
      const int fd = ::open(scenario.files[0].path().c_str(), O_WRONLY | O_CLOEXEC);
      ASSERT_GE(::dup2(fd, (*scenario.plan.files[0]->descriptor())->get()), 0);
      ::close(fd);
      ASSERT_TRUE(load->start().ok());
      wait_for(*load, "unreadable");
      const auto report = load->finish();
      ASSERT_FALSE(report.ok());
      EXPECT_EQ(report.error().code, ErrorCode::kReadFailed) << report.error().describe();
      EXPECT_EQ(report.error().path, scenario.files[0].path());
      EXPECT_NE(report.error().tensor, "");
      EXPECT_EQ(report.error().system_errno, EBADF);
      load.reset();
      scenario.expect_no_traces("unreadable");
    }
    expect_machine_clean(machine, "unreadable");
  }
}

}  // namespace
}  // namespace weightlift::engine::test
