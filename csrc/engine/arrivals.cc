#include "engine/arrivals.h"

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <span>

#include "engine/plan.h"
#include "engine/schedule.h"
#include "engine/sources.h"
#include "mutex.h"

namespace weightlift::engine {

Arrivals::Arrivals(const LoadPlan& plan, const Schedule& schedule, const Sources& sources)
    : plan_(plan),
      unqueued_(plan.names.size()),
      missing_(plan.names.size()),
      steps_(sources.steps_by_name()),
      files_(plan.names.size(), kFromMemory) {
  for (const Lane& lane : schedule.lanes) {
    for (const Piece& piece : lane.pieces) {
      const Copy& copy = plan.copies[piece.copy];
      missing_[copy.name] += piece.count * copy.source_item();
      files_[copy.name] = copy.file;
    }
  }
  for (std::size_t i = 0; i < missing_.size(); ++i) unqueued_[i] = missing_[i].load();
  for (const Mapped& part : plan.mapped) files_[part.name] = part.file;
}

bool Arrivals::take(const Lane& lane, const Unit& unit, Counters& counters) const noexcept {
  bool is_last = false;
  for (std::uint32_t i = 0; i < unit.piece_count; ++i) {
    const Piece& piece = lane.pieces[unit.first_piece + i];
    const Copy& copy = plan_.copies[piece.copy];
    const std::uint64_t bytes = piece.count * copy.source_item();
    if (counters[copy.name].fetch_sub(bytes) == bytes) is_last = true;
  }
  return is_last;
}

bool Arrivals::take(const Lane& lane, const Chunk& chunk, Counters& counters) const noexcept {
  bool is_last = false;
  for (std::uint32_t i = 0; i < chunk.unit_count; ++i) {
    if (take(lane, lane.units[chunk.first_unit + i], counters)) is_last = true;
  }
  return is_last;
}

void Arrivals::delivered(const Lane& lane, const Unit& unit) noexcept {
  const bool queued = take(lane, unit, unqueued_);
  if (take(lane, unit, missing_) || queued) tell();
}

void Arrivals::queued(const Lane& lane, const Chunk& chunk) noexcept {
  if (take(lane, chunk, unqueued_)) tell();
}

void Arrivals::copied(const Lane& lane, const Chunk& chunk) noexcept {
  if (take(lane, chunk, missing_)) tell();
}

void Arrivals::populated(std::uint32_t steps) noexcept {
  populated_ = steps;
  tell();
}

void Arrivals::end() noexcept {
  ended_ = true;
  tell();
}

// A waiter increments waiting_ before it checks: it either sees the change that was made before
// this call, or is counted here.
void Arrivals::tell() noexcept {
  if (waiting_.load() == 0) return;
  const MutexLock lock(mutex_);
  changed_.notify_all();
}

bool Arrivals::have_come(std::span<const std::uint32_t> names, Level level) const noexcept {
  const Counters& left = level == Level::kQueued ? unqueued_ : missing_;
  return std::all_of(names.begin(), names.end(), [&](std::uint32_t name) {
    return left[name].load() == 0 && steps_[name] <= populated_.load();
  });
}

Arrivals::Answer Arrivals::wait(std::span<const std::uint32_t> names, Level level,
                                std::chrono::milliseconds limit) {
  if (have_come(names, level)) return Answer::kYes;
  const auto until = std::chrono::steady_clock::now() + limit;
  const MutexLock lock(mutex_);
  ++waiting_;
  Answer answer = Answer::kNotYet;
  bool is_late = false;
  while (true) {
    const bool ended = ended_.load();  // read before the check: nothing arrives after the end
    if (have_come(names, level)) {
      answer = Answer::kYes;
      break;
    }
    if (ended) {
      answer = Answer::kNever;
      break;
    }
    if (is_late) break;
    is_late = changed_.wait_until(mutex_, until) == std::cv_status::timeout;
  }
  --waiting_;
  return answer;
}

}  // namespace weightlift::engine
