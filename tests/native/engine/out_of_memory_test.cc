// Memory runs out at any allocation.
#include <gtest/gtest.h>

#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <utility>

#include "engine/failing_memory.h"
#include "engine/load.h"
#include "engine/runs.h"
#include "engine/scenario.h"
#include "io/residency.h"
#include "simulated.h"

namespace weightlift::engine::test {
namespace {

// One load during which memory runs out, or does not.
void run_exhausted(Scenario& scenario, const std::string& what) {
  scenario.name_streams();
  std::unique_ptr<Load> load;
  std::optional<Report> report;
  std::optional<ErrorCode> code;
  {
    const Watched watched;
    try {
      auto prepared = Load::prepare(scenario.plan, scenario.settings);
      if (prepared.ok()) {
        load = *std::move(prepared);
        heap.watched = false;
        scenario.give_scratch(*load);
        heap.watched = true;
        if (const Status started = load->start(); started.ok()) {
          for (int i = 0; !load->wait(milliseconds(20)); ++i) {
            if (i == 1500) std::abort();  // it hangs
          }
          auto finished = load->finish();
          if (finished.ok()) {
            report = *std::move(finished);
          } else {
            code = finished.error().code;
          }
        } else {
          code = started.error().code;
        }
      } else {
        code = prepared.error().code;
      }
    } catch (const std::bad_alloc&) {
      code = ErrorCode::kOutOfMemory;
    }
    if (!report) load.reset();  // which needs no memory either
  }
  if (report) {
    scenario.expect_everything(*load, *report, what);
    return;
  }
  EXPECT_EQ(code, ErrorCode::kOutOfMemory) << what;
  EXPECT_LT(heap.left, 1) << what << ": memory had not run out";
  scenario.free_scratch();
  scenario.expect_no_traces(what);
}

void exhaust_loads(const std::string& name, int devices, void (*fill)(Scenario&)) {
  exhaust(name, [&](const std::string& what, std::uint64_t n) {
    SCOPED_TRACE(what);
    Machine machine(devices, n, static_cast<int>(n % SIM_POLICIES));
    {
      Scenario scenario(n, devices);
      fill(scenario);
      const Baseline baseline;
      run_exhausted(scenario, what);
      expect_released(scenario, machine, what);
      baseline.expect_same(what);
      run_plainly(scenario, what + ", the load after it");
    }
    expect_machine_clean(machine, what);
  });
}

TEST(LoadOutOfMemory, ToADevice) {
  exhaust_loads("kernels", 1, fill_with_one_of_everything);
  exhaust_loads("no kernels", 1, [](Scenario& scenario) {
    fill_with_one_of_everything(scenario);
    scenario.settings.kernels = false;
    scenario.settings.threads = 2;
  });
}

TEST(LoadOutOfMemory, ToTheHost) {
  static constexpr auto kFill = [](Scenario& scenario) {
    scenario.settings.threads = 2;
    scenario.settings.read_bytes = 64 * kKiB;
    const Origin file = scenario.add_file(900 * kKiB);
    scenario.add(file, 131, 300 * kKiB, Dtype::kU8, Dtype::kU8, kHostDevice, 3);
    scenario.add(file, 131 + 300 * kKiB, 30'000, Dtype::kF32, Dtype::kBf16, kHostDevice, 1);
    scenario.add_strided(file, 600 * kKiB, Dtype::kF32, Dtype::kF32, {{30, 600, 200}, {50, 4, 4}},
                         kHostDevice, 1);
    const Origin mapped = scenario.add_file(700 * kKiB);
    scenario.add_mapped(mapped, 1000, 100 * kKiB);
    scenario.add_mapped(mapped, 400 * kKiB, 200 * kKiB);
    io::drop_from_page_cache(*scenario.plan.files[mapped.file]);
  };
  exhaust_loads("buffered", 0, kFill);
  exhaust_loads("direct", 0, [](Scenario& scenario) {
    kFill(scenario);
    scenario.settings.io_path = IoPath::kDirect;
  });
  exhaust_loads("on the caller's thread", 0, [](Scenario& scenario) {
    const Origin file = scenario.add_file(100 * kKiB);
    scenario.add(file, 7, 9000, Dtype::kF32, Dtype::kF16, kHostDevice, 1);
    scenario.add_strided(file, 50 * kKiB, Dtype::kF32, Dtype::kF64, {{30, 600, 400}, {50, 4, 8}},
                         kHostDevice, 1);
  });
}

}  // namespace
}  // namespace weightlift::engine::test
