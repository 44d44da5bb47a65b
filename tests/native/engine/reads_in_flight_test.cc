// How much of a file is on its way at once: of a disk that answers no read before so many are asked
// for.
#include <gtest/gtest.h>
#include <sys/types.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <string>

#include "engine/load.h"
#include "engine/runs.h"
#include "engine/scenario.h"
#include "io/file.h"
#include "simulated.h"

namespace weightlift::engine::test {
namespace {

struct Disk {
  std::mutex mutex;
  std::condition_variable changed;
  std::size_t awaited = 0;  // reads that it waits for; 0: it answers at once
  std::size_t reads = 0;
  std::size_t most_reads = 0;
  std::size_t bytes = 0;
  std::size_t most_bytes = 0;
};

Disk& disk() {
  static Disk instance;
  return instance;
}

}  // namespace
}  // namespace weightlift::engine::test

// The linker's names (ld(1), --wrap).
// NOLINTBEGIN(*-reserved-identifier,readability-identifier-naming)
extern "C" {
ssize_t __real_pread(int fd, void* target, std::size_t count, off_t offset);
ssize_t __wrap_pread(int fd, void* target, std::size_t count, off_t offset);

ssize_t __wrap_pread(int fd, void* target, std::size_t count, off_t offset) {
  auto& disk = weightlift::engine::test::disk();
  std::unique_lock lock(disk.mutex);
  if (disk.awaited == 0) {
    lock.unlock();
    return __real_pread(fd, target, count, offset);
  }
  disk.bytes += count;
  disk.most_bytes = std::max(disk.most_bytes, disk.bytes);
  disk.most_reads = std::max(disk.most_reads, ++disk.reads);
  disk.changed.notify_all();
  disk.changed.wait_for(lock, std::chrono::seconds(5),
                        [&disk] { return disk.most_reads >= disk.awaited; });
  lock.unlock();
  const ssize_t got = __real_pread(fd, target, count, offset);
  lock.lock();
  disk.bytes -= count;
  --disk.reads;
  return got;
}
}
// NOLINTEND(*-reserved-identifier,readability-identifier-naming)

namespace weightlift::engine::test {
namespace {

// A load from a disk that waits for so many reads, and for no more than are there.
void expect_in_flight(int devices, unsigned io_depth, std::size_t reads, std::size_t read_bytes) {
  const std::string what = std::to_string(devices) + " devices, " + std::to_string(io_depth);
  SCOPED_TRACE(what);
  Machine machine(std::max(devices, 1));
  {
    Scenario scenario(1, std::max(devices, 1));
    scenario.settings.threads = 2;
    scenario.settings.io_depth = io_depth;
    scenario.settings.io_path = IoPath::kDirect;
    for (int i = 0; i < 3; ++i) {
      const Origin file = scenario.add_file(8 * kMiB);
      const int device = devices == 0 ? kHostDevice : i % devices;
      scenario.add(file, 0, 8 * kMiB, Dtype::kU8, Dtype::kU8, device, 0);
    }
    const auto direct = io::DirectFile::open(scenario.plan.files[0]);
    if (!direct.ok()) GTEST_SKIP() << "no direct reads here: " << direct.error().describe();
    {
      const std::lock_guard lock(disk().mutex);
      disk().awaited = reads;
      disk().most_reads = disk().most_bytes = 0;
    }
    run_plainly(scenario, what);
    const std::lock_guard lock(disk().mutex);
    disk().awaited = 0;
    EXPECT_EQ(disk().most_reads, reads);
    EXPECT_EQ(disk().most_bytes, reads * read_bytes);
  }
  expect_machine_clean(machine, what);
}

TEST(ReadsInFlight, FillHalfOfTheSlotsOfADevice) {
  expect_in_flight(1, 0, 32, 512 * kKiB);
}

TEST(ReadsInFlight, OfSeveralDevicesAreBounded) {
  expect_in_flight(3, 0, 48, 512 * kKiB);  // of 64: that is all there is
}

TEST(ReadsInFlight, AreAsManyAsAskedFor) {
  expect_in_flight(1, 3, 3, 512 * kKiB);
}

TEST(ReadsInFlight, OfTheHostAreEight) {
  expect_in_flight(0, 0, 8, kMiB);
}

}  // namespace
}  // namespace weightlift::engine::test
