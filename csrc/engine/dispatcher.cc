#include "engine/dispatcher.h"

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "device/staging.h"
#include "engine/device_lane.h"
#include "engine/plan.h"
#include "engine/schedule.h"
#include "mutex.h"
#include "result.h"

namespace weightlift::engine {
namespace {

// The interval of checks for returned slots while other loads hold all pinned memory.
constexpr std::chrono::milliseconds kPoolRetry{2};
// How far a lane of the thread's own node may be ahead of the lane that is furthest behind, as a
// share of its bytes. Writing into a slot of another node is slower, but an idle link is slower
// still.
constexpr double kNodeLead = 0.05;

}  // namespace

Dispatcher::LaneState::LaneState(const Lane& lane_of)
    : lane(lane_of),
      staged(lane.device != kHostDevice),
      slot_limit(lane.slots),
      chunk_of_slot(lane.slots),
      units_left(lane.slots),
      free_slots(lane.slots),
      submitted_slots(lane.slots) {}

Dispatcher::Dispatcher(const Schedule& schedule, std::uint32_t populate_steps)
    : populate_steps_(populate_steps) {
  const MutexLock lock(mutex_);
  std::optional<int> node;
  for (const Lane& lane : schedule.lanes) {
    lanes_.emplace_back(lane);
    if (lane.node < 0) continue;
    several_nodes_ = several_nodes_ || (node && *node != lane.node);
    node = lane.node;
  }
}

void Dispatcher::stop(Error error) {
  if (!error_) error_ = std::move(error);
  stopped_ = true;
  task_.notify_all();
  for (LaneState& state : lanes_) state.changed.notify_all();
}

// --- Reader threads ----------------------------------------------------------------------------

std::optional<Task> Dispatcher::next(int (*node)()) {
  while (!stopped_) {
    if (auto task = pick(several_nodes_ ? node() : -1)) return task;
    if (all_given_out()) break;
    wait_for_task();
  }
  return std::nullopt;
}

void Dispatcher::wait_for_task() {
  const bool is_starved = std::any_of(lanes_.begin(), lanes_.end(), [](const LaneState& state) {
    return state.no_budget && state.slot_count == 0;
  });
  ++idle_;
  if (is_starved) {
    static_cast<void>(task_.wait_until(mutex_, std::chrono::steady_clock::now() + kPoolRetry));
  } else {
    task_.wait(mutex_);
  }
  --idle_;
}

// Wakes as many threads as there are tasks: a thread that finds none costs a context switch and the
// lock.
void Dispatcher::wake(std::uint32_t threads) {
  if (threads >= idle_) {
    task_.notify_all();
    return;
  }
  for (; threads > 0; --threads) task_.notify_one();
}

// Ends the threads that wait for a task.
void Dispatcher::wake_if_all_given_out() {
  if (all_given_out()) task_.notify_all();
}

bool Dispatcher::all_given_out() const {
  return next_populate_ == populate_steps_ &&
         std::all_of(lanes_.begin(), lanes_.end(),
                     [](const LaneState& state) { return state.all_given_out(); });
}

bool Dispatcher::LaneState::may_add_slot() const {
  if (adding_slot || slot_count == slot_limit) return false;
  return !no_budget || device::StagingPool::instance().changes() != pool_changes;
}

// The units of the next chunk, and one task that adds a slot.
std::uint32_t Dispatcher::LaneState::tasks_of_a_slot() const {
  if (all_given_out() || next_chunk == lane.chunks.size()) return 0;
  return lane.chunks[next_chunk].unit_count + (may_add_slot() ? 1 : 0);
}

Dispatcher::LaneState* Dispatcher::furthest_behind(std::optional<int> node) {
  LaneState* best = nullptr;
  for (LaneState& state : lanes_) {
    if (state.all_given_out() || (node && state.lane.node != *node)) continue;
    if (best != nullptr && state.share() >= best->share()) continue;
    if (state.needs_slot() && !state.may_add_slot()) continue;
    best = &state;
  }
  return best;
}

// Takes the lane that is furthest behind, so that all links stay busy until the end, or one of the
// thread's own node that is less than kNodeLead ahead of it.
std::optional<Task> Dispatcher::pick(int node) {
  if (next_populate_ < populate_steps_ && !populating_) {
    // One thread at a time: a second one breaks the sequential read-ahead of the first.
    populating_ = true;
    const PopulateTask task{.step = next_populate_++};
    wake_if_all_given_out();
    return task;
  }
  LaneState* best = furthest_behind(std::nullopt);
  if (best == nullptr) return std::nullopt;
  if (node >= 0) {
    LaneState* const near = furthest_behind(node);
    if (near != nullptr && near->share() <= best->share() + kNodeLead) best = near;
  }
  std::uint32_t best_lane = 0;
  while (&lanes_[best_lane] != best) ++best_lane;
  ++best->active;
  if (best->needs_slot()) {
    best->adding_slot = true;
    best->pool_changes = device::StagingPool::instance().changes();
    return AddSlotTask{.lane = best_lane, .slot = best->slot_count};
  }
  return take_units(best_lane);
}

UnitTask Dispatcher::take_units(std::uint32_t lane_index) {
  LaneState& state = lanes_[lane_index];
  const std::vector<Unit>& units = state.lane.units;
  UnitTask task{.lane = lane_index, .first_unit = state.next_unit++};
  const Unit& first = units[task.first_unit];
  state.issued += first.payload;
  if (state.staged) {
    if (!state.open_slot) open_next_chunk(state);
    task.slot = *state.open_slot;
    if (state.next_unit == state.open_chunk_end) state.open_slot.reset();
    if (state.all_given_out()) wake_if_all_given_out();
    return task;
  }
  while (!state.all_given_out() && units[state.next_unit].region == first.region) {
    state.issued += units[state.next_unit++].payload;
    ++task.unit_count;
  }
  if (state.all_given_out()) wake_if_all_given_out();
  return task;
}

void Dispatcher::open_next_chunk(LaneState& state) {
  const std::uint32_t slot = state.free_slots.pop();
  const Chunk& chunk = state.lane.chunks[state.next_chunk];
  state.chunk_of_slot[slot] = state.next_chunk++;
  state.units_left[slot] = chunk.unit_count;
  state.open_slot = slot;
  state.open_chunk_end = chunk.first_unit + chunk.unit_count;
}

void Dispatcher::finish(const PopulateTask& /*task*/, Status status) {
  populating_ = false;
  if (!status.ok()) stop(std::move(status).error());
}

void Dispatcher::finish(const AddSlotTask& task, Result<SlotOutcome> outcome) {
  LaneState& state = lanes_[task.lane];
  state.adding_slot = false;
  state.no_budget = false;
  if (!outcome.ok() && state.slot_count == 0) {
    stop(std::move(outcome).error());
  } else if (!outcome.ok()) {
    // The load goes on with fewer slots, which is only slower.
    state.slot_limit = state.slot_count;
    state.slot_refusal = std::move(outcome).error();
  } else if (*outcome == SlotOutcome::kNoBudget) {
    // The lane asks again after a slot is returned. If this would be its first slot, another thread
    // checks for that, because this one may find other work.
    state.no_budget = true;
    if (state.slot_count == 0) wake(1);
  } else {
    state.free_slots.push(task.slot);
    ++state.slot_count;
    ++slots_added_;
    const std::uint32_t tasks = state.tasks_of_a_slot();
    if (tasks > 1) wake(tasks - 1);  // this thread takes one
  }
  end_task(state);
}

bool Dispatcher::finish(const UnitTask& task, Status status) {
  LaneState& state = lanes_[task.lane];
  if (!status.ok()) {
    stop(std::move(status).error());
  } else if (state.staged && --state.units_left[task.slot] == 0 && !stopped_) {
    return true;
  }
  end_task(state);
  return false;
}

void Dispatcher::submitted(const UnitTask& task, Status status) {
  LaneState& state = lanes_[task.lane];
  if (status.ok()) {
    state.submitted_slots.push(task.slot);
    state.changed.notify_one();
  } else {
    stop(std::move(status).error());
  }
  end_task(state);
}

// Wakes no reader thread: a finished unit makes no new tasks, and with small units there may be
// 100,000 of them in a second.
void Dispatcher::end_task(LaneState& state) {
  if (--state.active == 0 && state.staged) state.changed.notify_one();
}

// --- A device lane's own thread ----------------------------------------------------------------

std::optional<SubmittedSlot> Dispatcher::oldest_submitted(std::uint32_t lane) {
  LaneState& state = lanes_[lane];
  while (state.submitted_slots.empty()) {
    if (state.chunks_arrived == state.lane.chunks.size()) return std::nullopt;
    if (stopped_ && state.active == 0) return std::nullopt;
    state.changed.wait(mutex_);
  }
  const std::uint32_t slot = state.submitted_slots.front();
  return SubmittedSlot{.slot = slot, .chunk = state.chunk_of_slot[slot]};
}

void Dispatcher::arrived(std::uint32_t lane, Status status) {
  LaneState& state = lanes_[lane];
  const std::uint32_t slot = state.submitted_slots.pop();
  if (!status.ok()) {
    stop(std::move(status).error());
    return;
  }
  ++state.chunks_arrived;
  state.free_slots.push(slot);
  wake(state.tasks_of_a_slot());
}

void Dispatcher::wait_until_idle(std::uint32_t lane) {
  LaneState& state = lanes_[lane];
  while (state.active != 0) state.changed.wait(mutex_);
}

std::vector<std::string> Dispatcher::slot_refusals() const {
  std::vector<std::string> texts;
  for (const LaneState& state : lanes_) {
    if (state.slot_refusal)
      texts.push_back("fewer staging slots: " + std::string(state.slot_refusal->text()));
  }
  return texts;
}

}  // namespace weightlift::engine
