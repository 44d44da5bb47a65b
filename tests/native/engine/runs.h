// Runs loads, and checks what must hold after each.
#pragma once

#include <gtest/gtest.h>

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "device/staging.h"
#include "engine/load.h"
#include "engine/random.h"
#include "engine/scenario.h"
#include "simulated.h"

namespace weightlift::engine::test {

inline std::uint64_t number_from_environment(const char* name, std::uint64_t otherwise) {
  const char* const text = std::getenv(name);
  return text != nullptr && *text != '\0' ? std::strtoull(text, nullptr, 10) : otherwise;
}

// Waits for the end of a load. A hanging load ends the process, because its threads cannot be
// ended.
inline void wait_for(Load& load, const std::string& what) {
  const auto end = std::chrono::steady_clock::now() + kHung;
  std::uint64_t before = 0;
  while (!load.wait(milliseconds(20))) {
    const Progress progress = load.progress();
    EXPECT_GE(progress.done, before) << what;
    EXPECT_LE(progress.done, progress.total) << what;
    before = progress.done;
    if (std::chrono::steady_clock::now() < end) continue;
    std::fprintf(stderr, "%s: FAILED: the load hangs after %llu of %llu bytes\n", what.c_str(),
                 static_cast<unsigned long long>(progress.done),
                 static_cast<unsigned long long>(progress.total));
    std::abort();
  }
}

// The process's resources before a load.
struct Baseline {
  std::size_t files = simulation::open_files();
  std::size_t threads = simulation::threads();

  void expect_same(const std::string& what) const {
    EXPECT_EQ(simulation::open_files(), files) << what << ": descriptors leak";
    // Fewer are no leak: a thread that was joined may still be listed when the baseline is taken.
    EXPECT_LE(simulation::threads(threads), threads) << what << ": threads leak";
  }
};

// After any load, with its devices still open: everything that it made is gone or in the pool.
inline void expect_released(const Scenario& scenario, const Machine& machine,
                            const std::string& what) {
  const SimLedger now = sim().ledger();
  EXPECT_EQ(now.streams, 0U) << what << ": streams leak";
  EXPECT_EQ(now.events, 0U) << what << ": events leak";
  EXPECT_EQ(now.allocations, 0U) << what << ": device memory leaks";
  EXPECT_EQ(now.pushed, 0U) << what << ": contexts left current: leak";
  EXPECT_EQ(now.pinned_bytes,
            device::StagingPool::instance().pinned_bytes() - machine.lost_before())
      << what;
  EXPECT_LE(now.peak_pinned_bytes, scenario.pinned_bound()) << what << ": pinned budget";
}

inline void expect_machine_clean(Machine& machine, const std::string& what) {
  machine.close();
  EXPECT_EQ(simulation::leaks(sim().ledger()), "") << what;
  EXPECT_EQ(device::StagingPool::instance().pinned_bytes(), machine.lost_before()) << what;
  EXPECT_EQ(sim().sim_violations(), 0U) << what << "\n" << sim().violations();
}

// A load that nothing disturbs.
inline void run_plainly(Scenario& scenario, const std::string& what) {
  std::string why;
  auto load = scenario.prepare(&why);
  ASSERT_NE(load, nullptr) << what << ": " << why;
  const Status started = load->start();
  ASSERT_TRUE(started.ok()) << what << ": " << started.error().describe();
  wait_for(*load, what);
  const auto report = load->finish();
  ASSERT_TRUE(report.ok()) << what << ": " << report.error().describe();
  EXPECT_LE(report->peak_staging_bytes, scenario.pinned_bound()) << what;
  scenario.expect_everything(*load, *report, what);
}

// One of everything: casts on both sides, a kernel's chunk, plain copies, strided and remembered
// sources, the host, and more chunks than slots.
inline void fill_with_one_of_everything(Scenario& scenario) {
  scenario.settings.threads = 1;
  scenario.settings.io_depth = 1;
  scenario.settings.read_bytes = 64 * kKiB;
  scenario.settings.chunk_bytes = 256 * kKiB;
  scenario.settings.pinned_bytes = 512 * kKiB;
  const Origin file = scenario.add_file(900 * kKiB);
  scenario.add(file, 131, 600 * kKiB, Dtype::kU8, Dtype::kU8, 0, 3);
  const std::uint64_t small = 131 + 600 * kKiB;
  for (std::uint64_t i = 0; i < 20; ++i) {
    scenario.add(file, small + 1000 * i, 250, Dtype::kF32, i % 2 == 0 ? Dtype::kBf16 : Dtype::kF64,
                 0, i % 3);
  }
  const std::uint64_t rest = small + 20'000;
  const auto rows = [](std::int64_t item) {
    return std::vector<Dimension>{{30, 600, 50 * item}, {50, 4, item}};
  };
  scenario.add_strided(file, rest, Dtype::kF32, Dtype::kF16, rows(2), 0, 1);
  scenario.add_strided(file, rest, Dtype::kF32, Dtype::kF32, rows(4), kHostDevice, 1);
  scenario.add(file, rest, 30'000, Dtype::kBf16, Dtype::kF32, kHostDevice, 1);
  const Origin memory = scenario.add_memory(40'000);
  scenario.add(memory, 7, 9000, Dtype::kF32, Dtype::kF32, 0, 0);
}

inline void fill_for_two_devices(Scenario& scenario) {
  fill_with_one_of_everything(scenario);
  const Origin file = scenario.add_file(kMiB);
  scenario.add(file, 0, 600'000, Dtype::kU8, Dtype::kU8, 1, 0);
  scenario.add(file, 600'000, 50'000, Dtype::kF32, Dtype::kF16, 1, 0);
}

}  // namespace weightlift::engine::test
