// Which tensors of a load have arrived, for callers that use tensors before the load has ended.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <span>
#include <vector>

#include "engine/plan.h"
#include "engine/schedule.h"
#include "engine/sources.h"
#include "mutex.h"

namespace weightlift::engine {

// Tensors are identified by their positions in LoadPlan::names. Nothing here allocates after the
// constructor.
class Arrivals {
 public:
  enum class Level : std::uint8_t {
    kQueued,   // all copies are queued on its device; on the host as kArrived
    kArrived,  // all of it is at its target
  };
  enum class Answer : std::uint8_t {
    kYes,
    kNotYet,
    kNever,  // the load has ended without it
  };

  // `plan` must have ranks. All arguments must live as long as this object.
  Arrivals(const LoadPlan& plan, const Schedule& schedule, const Sources& sources);

  // --- For the threads of the load ---
  // All of a unit is at its targets in host memory.
  void delivered(const Lane& lane, const Unit& unit) noexcept;
  // queued(): the copies of a chunk are queued on a stream. copied(): they have ended.
  void queued(const Lane& lane, const Chunk& chunk) noexcept;
  void copied(const Lane& lane, const Chunk& chunk) noexcept;
  // The first `steps` populate steps are done.
  void populated(std::uint32_t steps) noexcept;
  // The load has ended, with or without an error.
  void end() noexcept;

  // --- For waiting threads ---
  // Waits until all of `names` have reached `level`, the load has ended, or the limit has passed.
  // Any thread.
  [[nodiscard]] Answer wait(std::span<const std::uint32_t> names, Level level,
                            std::chrono::milliseconds limit);
  // The tensor's file, or kFromMemory.
  [[nodiscard]] std::uint32_t file_of(std::uint32_t name) const { return files_[name]; }

 private:
  using Counters = std::vector<std::atomic<std::uint64_t>>;

  [[nodiscard]] bool take(const Lane& lane, const Unit& unit, Counters& counters) const noexcept;
  [[nodiscard]] bool take(const Lane& lane, const Chunk& chunk, Counters& counters) const noexcept;
  [[nodiscard]] bool have_come(std::span<const std::uint32_t> names, Level level) const noexcept;
  void tell() noexcept;

  const LoadPlan& plan_;
  // For each name: bytes not yet queued; bytes not yet arrived; the populate steps that it needs;
  // its file.
  Counters unqueued_;
  Counters missing_;
  std::vector<std::uint32_t> steps_;
  std::vector<std::uint32_t> files_;
  std::atomic<std::uint32_t> populated_ = 0;
  std::atomic<std::uint32_t> waiting_ = 0;  // threads that wait
  std::atomic<bool> ended_ = false;
  Mutex mutex_;  // so that no notification falls between a check and its wait
  ConditionVariable changed_;
};

}  // namespace weightlift::engine
