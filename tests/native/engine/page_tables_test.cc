// Devices that read host memory through the host's page tables (GH200, GB200): they copy from the
// page cache, without staging slots.
#include <cuda.h>
#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <string>

#include "engine/load.h"
#include "engine/runs.h"
#include "engine/scenario.h"
#include "io/leased_mapping.h"
#include "simulated.h"

namespace weightlift::engine::test {
namespace {

constexpr std::uint64_t kFile = 6 * kMiB;  // leases are for large files

bool can_be_leased() {
  const TestFile file(std::vector<std::byte>(4096));
  return io::LeasedMapping::open(file.open()) != nullptr;
}
#define SKIP_WITHOUT_LEASES() \
  if (!can_be_leased()) GTEST_SKIP() << "no leases on the file system of " << folder()

void use_host_page_tables(int device, bool whether = true) {
  sim().sim_set_attribute(device, CU_DEVICE_ATTRIBUTE_PAGEABLE_MEMORY_ACCESS_USES_HOST_PAGE_TABLES,
                          whether ? 1 : 0);
}

SimLink link_of(int device) {
  SimLink link;
  sim().sim_link(device, &link);
  return link;
}

// Large tensors, some with gaps between them, so that some units of a chunk are contiguous in the
// file and others are not. One is cast on the host and so is staged.
std::uint64_t fill_plainly(Scenario& scenario, int devices) {
  scenario.settings.threads = 2;
  scenario.settings.read_bytes = 64 * kKiB;
  scenario.settings.chunk_bytes = 512 * kKiB;
  scenario.settings.pinned_bytes = 2 * kMiB;
  const Origin first = scenario.add_file(kFile);
  const Origin second = scenario.add_file(kFile);
  std::uint64_t plain = 0;
  for (int device = 0; device < devices; ++device) {
    for (const Origin& file : {first, second}) {
      std::uint64_t at = scenario.random.below(5000);
      while (at + 700 * kKiB < kFile) {
        const std::uint64_t bytes = 1 + scenario.random.below(600 * kKiB);
        if (scenario.random.chance(10)) {
          scenario.add(file, at / 4 * 4, bytes / 4, Dtype::kF32, Dtype::kBf16, device, 3);
        } else {
          scenario.add(file, at, bytes, Dtype::kU8, Dtype::kU8, device, scenario.random.below(3));
          plain += bytes;
        }
        at += bytes + (scenario.random.chance(50) ? 0 : scenario.random.below(20'000));
      }
    }
  }
  return plain;
}

TEST(LoadThroughHostPageTables, CopiesFromTheMappingInAnySchedule) {
  SKIP_WITHOUT_LEASES();
  const std::uint64_t seeds = number_from_environment("WEIGHTLIFT_SEEDS", 0) >= 1000 ? 60 : 12;
  for (std::uint64_t seed = 0; seed < seeds; ++seed) {
    std::string what = "seed ";
    what += std::to_string(seed);
    Machine machine(1, seed, static_cast<int>(seed % SIM_POLICIES));
    {
      use_host_page_tables(0);
      Scenario scenario(seed, 1);
      scenario.settings.batch_copies = seed % 3 != 0;
      const std::uint64_t plain = fill_plainly(scenario, 1);
      run_plainly(scenario, what);
      EXPECT_GT(link_of(0).bytes_of_pages, plain / 2) << what;
    }
    expect_machine_clean(machine, what);
  }
}

TEST(LoadThroughHostPageTables, IsForDevicesThatSaySo) {
  SKIP_WITHOUT_LEASES();
  Machine machine(2);
  {
    use_host_page_tables(1);
    Scenario scenario(7, 2);
    fill_plainly(scenario, 2);
    run_plainly(scenario, "one of two devices");
  }
  EXPECT_EQ(link_of(0).bytes_of_pages, 0U);
  EXPECT_GT(link_of(1).bytes_of_pages, 0U);
  expect_machine_clean(machine, "one of two devices");
}

TEST(LoadThroughHostPageTables, ReadsWhatCannotBeLeased) {
  Machine machine(1);
  {
    use_host_page_tables(0);
    Scenario scenario(8, 1);
    fill_plainly(scenario, 1);
    std::vector<int> writers;
    for (const TestFile& file : scenario.files) {
      writers.push_back(::open(file.path().c_str(), O_WRONLY | O_CLOEXEC));
    }
    run_plainly(scenario, "open for writing");
    for (const int writer : writers) ::close(writer);
  }
  EXPECT_EQ(link_of(0).bytes_of_pages, 0U);
  expect_machine_clean(machine, "open for writing");
}

// Chunks of many small tensors go through the kernel, in one copy of a slot.
TEST(LoadThroughHostPageTables, StagesWhatTheKernelTakes) {
  SKIP_WITHOUT_LEASES();
  Machine machine(1);
  {
    use_host_page_tables(0);
    Scenario scenario(9, 1);
    const Origin file = scenario.add_file(kFile);
    for (std::uint64_t i = 0; i < 600; ++i) {
      scenario.add(file, i * 10'000, 9'000, Dtype::kU8, Dtype::kU8, 0, 1 + i % 3);
    }
    run_plainly(scenario, "small tensors");
  }
  EXPECT_GT(sim().sim_calls("cuLaunchKernel"), 0U);
  EXPECT_EQ(link_of(0).bytes_of_pages, 0U);
  expect_machine_clean(machine, "small tensors");
}

TEST(LoadThroughHostPageTables, EndsWithAnyCallThatFails) {
  SKIP_WITHOUT_LEASES();
  for (const char* const call : {"cuMemcpyHtoDAsync", "cuMemcpyBatchAsync", "cuEventRecord",
                                 "cuEventSynchronize", "cuDeviceGetAttribute"}) {
    for (std::uint64_t n = 1; n <= 3; ++n) {
      std::string what = call;
      what.append(" ").append(std::to_string(n));
      Machine machine(1, n);
      {
        Scenario scenario(n, 1);
        fill_plainly(scenario, 1);
        use_host_page_tables(0);
        sim().sim_fail_call(call, n, CUDA_ERROR_LAUNCH_FAILED, 0);
        const auto load = scenario.prepare();
        ASSERT_NE(load, nullptr) << what;
        const Status started = load->start();
        if (started.ok()) {
          wait_for(*load, what);
          const auto report = load->finish();
          if (report.ok()) {
            scenario.expect_everything(*load, *report, what);
          } else {
            EXPECT_NE(report.error().message.find(call), std::string::npos) << what;
          }
        }
        scenario.expect_no_traces(what);
      }
      expect_machine_clean(machine, what);
    }
  }
}

// A process that truncates the file waits until the device has read its copies, and no longer. In a
// separate process, because this one would wait for itself.
TEST(LoadThroughHostPageTables, KeepsTheFileUntilTheDeviceHasReadIt) {
  SKIP_WITHOUT_LEASES();
  Machine machine(1);
  {
    use_host_page_tables(0);
    Scenario scenario(10, 1);
    fill_plainly(scenario, 1);
    const std::string path = scenario.files[1].path();
    sim().sim_set_hashing(0);
    sim().sim_set_time(SIM_TIME_REAL);
    sim().sim_set_link(0, 60e6);
    const auto load = scenario.prepare();
    ASSERT_NE(load, nullptr);
    ASSERT_TRUE(load->start().ok());
    while (link_of(0).bytes_to_device < kFile * 5 / 4 && !load->wait(milliseconds(0))) {
      static_cast<void>(load->wait(milliseconds(1)));
    }
    const pid_t child = ::fork();
    if (child == 0) {
      int fd = -1;
      while ((fd = ::open(path.c_str(), O_WRONLY | O_NONBLOCK)) < 0 && errno == EWOULDBLOCK) {
        ::usleep(200);
      }
      ::_exit(fd >= 0 && ::ftruncate(fd, 0) == 0 ? 0 : 1);
    }
    wait_for(*load, "cut off");
    const auto report = load->finish();
    int status = 0;
    ASSERT_EQ(::waitpid(child, &status, 0), child);
    EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    if (!report.ok()) {
      EXPECT_EQ(report.error().path, path);
    }
  }
  expect_machine_clean(machine, "cut off");
}

}  // namespace
}  // namespace weightlift::engine::test
