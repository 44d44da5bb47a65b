// Which tensors of a load have arrived, for those who use some while others are still on their way.
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

// Tensors are meant by their numbers in LoadPlan::names. Nothing here allocates after it was made.
class Arrivals {
 public:
  enum class Level : std::uint8_t {
    kQueued,   // all of its copies are queued on its device; on the host: it is there
    kArrived,  // it is there
  };
  enum class Answer : std::uint8_t {
    kYes,
    kNotYet,
    kNever,  // the load has ended without it
  };

  // `plan` has ranks; all of these must live as long.
  Arrivals(const LoadPlan& plan, const Schedule& schedule, const Sources& sources);

  // --- For the threads of the load ---
  // A unit is at its targets in host memory.
  void delivered(const Lane& lane, const Unit& unit) noexcept;
  // The copies of a chunk are queued on a stream; they have ended.
  void queued(const Lane& lane, const Chunk& chunk) noexcept;
  void copied(const Lane& lane, const Chunk& chunk) noexcept;
  // The first `steps` steps of populating are done.
  void populated(std::uint32_t steps) noexcept;
  // The load has ended, one way or the other.
  void end() noexcept;

  // --- For those who wait ---
  // Until all of `names` have come so far, the load has ended, or the time is up. Any thread.
  [[nodiscard]] Answer wait(std::span<const std::uint32_t> names, Level level,
                            std::chrono::milliseconds limit);
  // kFromMemory where it comes from none.
  [[nodiscard]] std::uint32_t file_of(std::uint32_t name) const { return files_[name]; }

 private:
  using Counters = std::vector<std::atomic<std::uint64_t>>;

  [[nodiscard]] bool take(const Lane& lane, const Unit& unit, Counters& counters) const noexcept;
  [[nodiscard]] bool take(const Lane& lane, const Chunk& chunk, Counters& counters) const noexcept;
  [[nodiscard]] bool have_come(std::span<const std::uint32_t> names, Level level) const noexcept;
  void tell() noexcept;

  const LoadPlan& plan_;
  // By name: bytes that are not yet queued, and not yet there; how many steps of populating it
  // needs; its file.
  Counters unqueued_;
  Counters missing_;
  std::vector<std::uint32_t> steps_;
  std::vector<std::uint32_t> files_;
  std::atomic<std::uint32_t> populated_ = 0;
  std::atomic<std::uint32_t> waiting_ = 0;  // threads that wait
  std::atomic<bool> ended_ = false;
  Mutex mutex_;  // guards nothing: nobody is told between a look and the wait that follows it
  ConditionVariable changed_;
};

}  // namespace weightlift::engine
