// What each thread of a load does next: the lanes' units in order, their staging slots in turn, and
// whether the load goes on. Reads no file and calls no driver (engine/runner.h does).
#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "engine/bounded_queue.h"
#include "engine/device_lane.h"
#include "engine/schedule.h"
#include "mutex.h"
#include "result.h"

namespace weightlift::engine {

// Reads in one step of the mapped files.
struct PopulateTask {
  std::uint32_t step = 0;
};

// Takes one more staging slot for a lane.
struct AddSlotTask {
  std::uint32_t lane = 0;
  std::uint32_t slot = 0;
};

// Brings units to the host, or into a staging slot.
struct UnitTask {
  std::uint32_t lane = 0;
  std::uint32_t first_unit = 0;
  std::uint32_t unit_count = 1;
  std::uint32_t slot = 0;
};

using Task = std::variant<UnitTask, AddSlotTask, PopulateTask>;

// A slot whose copies are queued on the device.
struct SubmittedSlot {
  std::uint32_t slot = 0;
  std::uint32_t chunk = 0;
};

// Once the threads run nothing here grows beyond the room that the constructor made.
class Dispatcher {
 public:
  // `populate_steps`: of the mapped files. `schedule` must live as long.
  Dispatcher(const Schedule& schedule, std::uint32_t populate_steps);

  // Guards everything; whoever calls what needs it keeps it between the calls, for a lock a task is
  // one too many at the rates of small units.
  [[nodiscard]] Mutex& mutex() WL_RETURN_CAPABILITY(mutex_) { return mutex_; }

  // Whether the load goes on no more: after an error, or a cancel.
  [[nodiscard]] bool stopped() const noexcept { return stopped_; }
  void stop(Error error) WL_REQUIRES(mutex_);
  [[nodiscard]] const std::optional<Error>& error() const WL_REQUIRES(mutex_) { return error_; }

  // --- For reader threads ---
  // The next task, which is waited for; nothing when all are given out or the load stops. `node`
  // says which node of the machine the thread runs on: it is asked each time something may be
  // picked, and only where lanes are of several nodes.
  [[nodiscard]] std::optional<Task> next(int (*node)()) WL_REQUIRES(mutex_);
  // Each task ends in one of these.
  void finish(const PopulateTask& task, Status status) WL_REQUIRES(mutex_);
  void finish(const AddSlotTask& task, Result<SlotOutcome> outcome) WL_REQUIRES(mutex_);
  // True for the last unit of a chunk: the caller submits the slot, and calls submitted().
  [[nodiscard]] bool finish(const UnitTask& task, Status status) WL_REQUIRES(mutex_);
  void submitted(const UnitTask& task, Status status) WL_REQUIRES(mutex_);
  [[nodiscard]] std::uint32_t chunk_in(const UnitTask& task) const WL_REQUIRES(mutex_) {
    return lanes_[task.lane].chunk_of_slot[task.slot];
  }
  [[nodiscard]] bool all_given_out() const WL_REQUIRES(mutex_);

  // --- For a device lane's own thread ---
  // The slot that was submitted first, which is waited for; nothing when the last has arrived, or
  // none will come any more.
  [[nodiscard]] std::optional<SubmittedSlot> oldest_submitted(std::uint32_t lane)
      WL_REQUIRES(mutex_);
  // Its copies have ended: it can be filled again.
  void arrived(std::uint32_t lane, Status status) WL_REQUIRES(mutex_);
  // All that are submitted and have not arrived.
  [[nodiscard]] const BoundedQueue<std::uint32_t>& submitted_slots(std::uint32_t lane) const
      WL_REQUIRES(mutex_) {
    return lanes_[lane].submitted_slots;
  }
  // Until no reader thread works for the lane.
  void wait_until_idle(std::uint32_t lane) WL_REQUIRES(mutex_);

  // --- For the report ---
  [[nodiscard]] std::uint32_t slots_added() const WL_REQUIRES(mutex_) { return slots_added_; }
  // Why lanes have fewer slots than they could use.
  [[nodiscard]] std::vector<std::string> slot_refusals() const WL_REQUIRES(mutex_);

 private:
  struct LaneState {
    explicit LaneState(const Lane& lane);

    const Lane& lane;
    std::uint32_t next_unit = 0;
    std::uint64_t issued = 0;  // bytes of tensors given out
    std::uint32_t active = 0;  // threads at work for it
    // Device lanes:
    bool staged = false;
    std::uint32_t next_chunk = 0;
    std::uint32_t chunks_arrived = 0;
    std::uint32_t slot_count = 0;
    std::uint32_t slot_limit = 0;
    bool adding_slot = false;
    bool no_budget = false;                  // when it last asked for a slot,
    std::uint64_t pool_changes = 0;          // which was then
    std::optional<std::uint32_t> open_slot;  // being filled: its chunk's units are given out
    std::uint32_t open_chunk_end = 0;        // unit behind that chunk's last
    std::optional<Error> slot_refusal;
    std::vector<std::uint32_t> chunk_of_slot;
    std::vector<std::uint32_t> units_left;  // by slot
    BoundedQueue<std::uint32_t> free_slots;
    BoundedQueue<std::uint32_t> submitted_slots;
    ConditionVariable changed;  // for the lane's own thread

    [[nodiscard]] bool all_given_out() const { return next_unit == lane.units.size(); }
    // Bytes given out of all: the lane with the least is furthest behind.
    [[nodiscard]] double share() const {
      return static_cast<double>(issued) / static_cast<double>(lane.payload);
    }
    // Tasks that a slot that has just become free makes.
    [[nodiscard]] std::uint32_t tasks_of_a_slot() const;
    [[nodiscard]] bool needs_slot() const { return staged && !open_slot && free_slots.empty(); }
    [[nodiscard]] bool may_add_slot() const;
  };

  [[nodiscard]] std::optional<Task> pick(int node) WL_REQUIRES(mutex_);
  // Among those that can take work the one furthest behind; of one node, or of all.
  [[nodiscard]] LaneState* furthest_behind(std::optional<int> node) WL_REQUIRES(mutex_);
  [[nodiscard]] UnitTask take_units(std::uint32_t lane) WL_REQUIRES(mutex_);
  void open_next_chunk(LaneState& state) WL_REQUIRES(mutex_);
  void wait_for_task() WL_REQUIRES(mutex_);
  void wake(std::uint32_t threads) WL_REQUIRES(mutex_);
  void wake_if_all_given_out() WL_REQUIRES(mutex_);
  void end_task(LaneState& state) WL_REQUIRES(mutex_);

  Mutex mutex_;
  ConditionVariable task_;  // something may be picked
  std::deque<LaneState> lanes_ WL_GUARDED_BY(mutex_);
  bool several_nodes_ WL_GUARDED_BY(mutex_) = false;
  const std::uint32_t populate_steps_;
  std::uint32_t next_populate_ WL_GUARDED_BY(mutex_) = 0;
  bool populating_ WL_GUARDED_BY(mutex_) = false;
  std::uint32_t idle_ WL_GUARDED_BY(mutex_) = 0;  // reader threads that wait for a task
  std::uint32_t slots_added_ WL_GUARDED_BY(mutex_) = 0;
  std::optional<Error> error_ WL_GUARDED_BY(mutex_);
  std::atomic<bool> stopped_ = false;  // written with the lock held
};

}  // namespace weightlift::engine
