// One run of a LoadPlan, from the schedule to the report. Dispatcher chooses the tasks, Runner runs
// them, ThreadGroup owns the threads, report.h makes the report.
#pragma once

#include <cuda.h>

#include <chrono>
#include <cstdint>
#include <memory>
#include <span>

#include "engine/plan.h"
#include "engine/report.h"
#include "engine/settings.h"
#include "result.h"

namespace weightlift::engine {

struct Progress {
  std::uint64_t done = 0;  // bytes of tensors
  std::uint64_t total = 0;
};

// One run of one plan. The destructor cancels and waits, so that no thread and no copy outlives the
// memory that it uses.
class Load {
 public:
  // Checks and schedules the plan. `plan().devices` then states the scratch memory that start()
  // needs.
  [[nodiscard]] static Result<std::unique_ptr<Load>> prepare(LoadPlan plan,
                                                             const Settings& settings);
  Load(const Load&) = delete;
  Load& operator=(const Load&) = delete;
  ~Load();

  [[nodiscard]] LoadPlan& plan() noexcept;

  // Starts all threads but one, which the first wait() starts. A small load to the host has no
  // threads: it runs in the first wait().
  [[nodiscard]] Status start();

  // Waits until the load has ended, with or without an error, or the limit has passed. Returns
  // whether it has ended.
  [[nodiscard]] bool wait(std::chrono::milliseconds limit);
  void cancel() noexcept;
  [[nodiscard]] Progress progress() const noexcept;

  // Waits until tensors have arrived or the limit has passed. Returns whether they have arrived.
  // `names` are positions in LoadPlan::names; the plan must have ranks. Returns the load's error if
  // it has ended without them, and kFileChanged if their files were written to after they were
  // opened. Any thread.
  [[nodiscard]] Result<bool> wait_for(std::span<const std::uint32_t> names,
                                      std::chrono::milliseconds limit);
  // The same for tensors on one device that the caller uses on `stream`: waits only until their
  // copies are queued, and makes the stream wait for the copies. If the stream is being captured,
  // the host waits for the copies, because a capture cannot wait for work outside it.
  [[nodiscard]] Result<bool> wait_for(std::span<const std::uint32_t> names, int device,
                                      CUstream stream, std::chrono::milliseconds limit);

  // Call it after wait() has returned true. With a report, all tensors have arrived on all devices.
  // With an error, no copy is in flight.
  [[nodiscard]] Result<Report> finish();

 private:
  class State;
  explicit Load(std::unique_ptr<State> state);

  std::unique_ptr<State> state_;
};

}  // namespace weightlift::engine
