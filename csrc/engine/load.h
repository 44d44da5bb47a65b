// One run of a LoadPlan, from the schedule to the report. Dispatcher says what is next, Runner does
// it, ThreadGroup has the threads, report.h tells.
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
// memory it works on.
class Load {
 public:
  // Checks and schedules; `plan().devices` then says what scratch memory is wanted.
  [[nodiscard]] static Result<std::unique_ptr<Load>> prepare(LoadPlan plan,
                                                             const Settings& settings);
  Load(const Load&) = delete;
  Load& operator=(const Load&) = delete;
  ~Load();

  [[nodiscard]] LoadPlan& plan() noexcept;

  // Starts the threads, but for one that the first wait() starts. A small load on the host has
  // none: it runs in the first wait().
  [[nodiscard]] Status start();

  // Until the load has ended, one way or the other, or the time is up: whether it has ended.
  [[nodiscard]] bool wait(std::chrono::milliseconds limit);
  void cancel() noexcept;
  [[nodiscard]] Progress progress() const noexcept;

  // Until tensors have arrived, or the time is up: whether they have. They are meant by their
  // numbers in LoadPlan::names; the plan has ranks. The load's error where it has ended without
  // them, and kFileChanged where their files were written to since they were opened. Any thread.
  [[nodiscard]] Result<bool> wait_for(std::span<const std::uint32_t> names,
                                      std::chrono::milliseconds limit);
  // The same for tensors on one device that are used on a stream of it: waits only until their
  // copies are queued, and has the stream wait for these. Of a stream that is being captured the
  // host waits, for the capture can be ordered behind nothing that is outside.
  [[nodiscard]] Result<bool> wait_for(std::span<const std::uint32_t> names, int device,
                                      CUstream stream, std::chrono::milliseconds limit);

  // After wait() said true: what happened. Everything has arrived, on every device, when it is no
  // error; nothing is in flight when it is one.
  [[nodiscard]] Result<Report> finish();

 private:
  class State;
  explicit Load(std::unique_ptr<State> state);

  std::unique_ptr<State> state_;
};

}  // namespace weightlift::engine
