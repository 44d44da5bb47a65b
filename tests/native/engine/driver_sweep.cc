#include "engine/driver_sweep.h"

#include <cuda.h>
#include <gtest/gtest.h>

#include <optional>
#include <string>
#include <string_view>

#include "engine/load.h"
#include "engine/runs.h"
#include "engine/scenario.h"
#include "simulated.h"

namespace weightlift::engine::test {

void sweep(const char* name, int code, bool sticky) {
  for (std::uint64_t n = 1; n < 1000; ++n) {
    const std::string what = std::string(name == nullptr ? "any call" : name) + ", number " +
                             std::to_string(n) + (sticky ? ", sticky" : "");
    SCOPED_TRACE(what);
    const std::string_view call = name == nullptr ? "" : name;
    // A context that cannot be entered keeps what is in it.
    const bool shut = call == "cuCtxPushCurrent";
    const bool lost = sticky || shut || call == "(operation)";
    bool struck = false;
    {
      Machine machine(1, n, static_cast<int>(n % SIM_POLICIES));
      Scenario scenario(n, 1);
      fill_with_one_of_everything(scenario);
      scenario.queue_pending_writes();
      const Baseline baseline;
      sim().sim_fail_call(name, n, code, sticky ? 1 : 0);
      {
        std::optional<Error> error;
        auto load = scenario.prepare();
        if (load != nullptr) {
          if (Status started = load->start(); !started.ok()) {
            error = started.error();
          } else {
            wait_for(*load, what);
            const auto report = load->finish();
            if (report.ok()) {
              scenario.expect_everything(*load, *report, what);
            } else {
              error = report.error();
            }
          }
        }
        struck = sim().sim_faults_left() == 0;
        if (error) {
          EXPECT_TRUE(struck) << error->describe();
          EXPECT_NE(error->message.find("cu"), std::string::npos) << error->message;
        }
      }
      if (!lost) {
        scenario.expect_no_traces(what);
        expect_released(scenario, machine, what);
        baseline.expect_same(what);
        // The failure to load the library is remembered; everything else is tried again.
        if (!device::driver().ok()) device::use_driver_for_testing(simulation::kLibrary);
        if (struck) run_plainly(scenario, what + ", the load after it");
      }
      machine.close();
      struck = struck || sim().sim_faults_left() == 0;
      SimLedger left = sim().ledger();
      if (lost) left.pinned_ranges = 0;  // slots that a lost device may still read
      if (shut) left.streams = left.events = left.modules = 0;
      EXPECT_EQ(simulation::leaks(left), "");
      EXPECT_EQ(sim().sim_violations(), 0U) << sim().violations();
    }
    if (!struck || ::testing::Test::HasFailure()) return;
  }
}

}  // namespace weightlift::engine::test
