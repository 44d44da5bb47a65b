// Loads inside and beside graph captures of the process.
#include <cuda.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <string>
#include <thread>

#include "engine/load.h"
#include "engine/runs.h"
#include "engine/scenario.h"
#include "simulated.h"

namespace weightlift::engine::test {
namespace {

// A load ordered after a capturing stream would be recorded and not run.
TEST(LoadStart, OnACapturingStream) {
  for (const int mode : {SIM_CAPTURE_GLOBAL, SIM_CAPTURE_THREAD_LOCAL, SIM_CAPTURE_RELAXED}) {
    Machine machine(1);
    const std::uint64_t stream = sim().sim_stream_create(0);
    {
      Scenario scenario(1, 1);
      fill_with_one_of_everything(scenario);
      auto load = scenario.prepare();
      ASSERT_NE(load, nullptr);
      load->plan().device(0).stream = stream;
      ASSERT_EQ(sim().sim_begin_capture(0, stream, mode), 1);
      const Status started = load->start();
      ASSERT_FALSE(started.ok());
      EXPECT_NE(started.error().message.find("is capturing a CUDA graph"), std::string::npos);
      load.reset();
      EXPECT_EQ(sim().sim_end_capture(0, stream), 1);
      run_plainly(scenario, "after the capture");
    }
    sim().sim_stream_destroy(stream);
    expect_machine_clean(machine, "captured");
  }
}

// From the first call on, which makes the context, to the last.
TEST(LoadStart, BesideACapture) {
  for (const bool own : {true, false}) {
    for (std::uint64_t seed = 0; seed < 6; ++seed) {
      const std::string what = (own ? "own thread " : "another ") + std::to_string(seed);
      SCOPED_TRACE(what);
      Machine machine(2, seed, static_cast<int>(seed % SIM_POLICIES));
      const std::uint64_t stream = sim().sim_stream_create(1);
      const auto begin = [&] {
        EXPECT_EQ(sim().sim_begin_capture(1, stream, SIM_CAPTURE_GLOBAL), 1);
      };
      own ? begin() : std::thread(begin).join();
      {
        Scenario scenario(seed, 2);
        fill_with_one_of_everything(scenario);
        scenario.queue_pending_writes();
        run_plainly(scenario, what);
        run_plainly(scenario, what + ", again");
      }
      EXPECT_EQ(sim().sim_end_capture(1, stream), 1);
      sim().sim_stream_destroy(stream);
      expect_machine_clean(machine, what);
    }
  }
}

}  // namespace
}  // namespace weightlift::engine::test
