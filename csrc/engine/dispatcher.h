// Decides what each thread of a load does next: which unit, which staging slot, and whether the
// load goes on. Reads no file and calls no driver (engine/runner.h does).
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

// Runs one populate step of the mapped files.
struct PopulateTask {
  std::uint32_t step = 0;
};

// Takes one more staging slot for a lane.
struct AddSlotTask {
  std::uint32_t lane = 0;
  std::uint32_t slot = 0;
};

// Delivers units to the host's targets or into a staging slot.
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

// While threads run, the containers stay within the capacity that the constructor reserved.
class Dispatcher {
 public:
  // `populate_steps` is their number for the mapped files. `schedule` must live as long as this
  // object.
  Dispatcher(const Schedule& schedule, std::uint32_t populate_steps);

  // Guards everything. Callers keep it locked between calls, because one lock operation for each
  // small unit would cost too much.
  [[nodiscard]] Mutex& mutex() WL_RETURN_CAPABILITY(mutex_) { return mutex_; }

  // Whether the load has stopped, after an error or a cancel.
  [[nodiscard]] bool stopped() const noexcept { return stopped_; }
  void stop(Error error) WL_REQUIRES(mutex_);
  [[nodiscard]] const std::optional<Error>& error() const WL_REQUIRES(mutex_) { return error_; }

  // --- For reader threads ---
  // Waits for the next task. Returns nothing when all are given out or the load has stopped. `node`
  // returns the NUMA node of the calling thread. It is called before each choice, and only if the
  // lanes belong to several nodes.
  [[nodiscard]] std::optional<Task> next(int (*node)()) WL_REQUIRES(mutex_);
  // Call one of these at the end of each task.
  void finish(const PopulateTask& task, Status status) WL_REQUIRES(mutex_);
  void finish(const AddSlotTask& task, Result<SlotOutcome> outcome) WL_REQUIRES(mutex_);
  // Returns true for the last unit of a chunk: the caller must submit the slot and call
  // submitted().
  [[nodiscard]] bool finish(const UnitTask& task, Status status) WL_REQUIRES(mutex_);
  void submitted(const UnitTask& task, Status status) WL_REQUIRES(mutex_);
  [[nodiscard]] std::uint32_t chunk_in(const UnitTask& task) const WL_REQUIRES(mutex_) {
    return lanes_[task.lane].chunk_of_slot[task.slot];
  }
  [[nodiscard]] bool all_given_out() const WL_REQUIRES(mutex_);

  // --- For a device lane's own thread ---
  // Waits for the slot that was submitted first. Returns nothing when the last one has arrived or
  // no more will come.
  [[nodiscard]] std::optional<SubmittedSlot> oldest_submitted(std::uint32_t lane)
      WL_REQUIRES(mutex_);
  // The copies of that slot have ended, so it can be filled again.
  void arrived(std::uint32_t lane, Status status) WL_REQUIRES(mutex_);
  // The slots that are submitted and have not arrived.
  [[nodiscard]] const BoundedQueue<std::uint32_t>& submitted_slots(std::uint32_t lane) const
      WL_REQUIRES(mutex_) {
    return lanes_[lane].submitted_slots;
  }
  // Waits until no reader thread works for the lane.
  void wait_until_idle(std::uint32_t lane) WL_REQUIRES(mutex_);

  // --- For the report ---
  [[nodiscard]] std::uint32_t slots_added() const WL_REQUIRES(mutex_) { return slots_added_; }
  // Why lanes got fewer slots than they could use.
  [[nodiscard]] std::vector<std::string> slot_refusals() const WL_REQUIRES(mutex_);

 private:
  struct LaneState {
    explicit LaneState(const Lane& lane);

    const Lane& lane;
    std::uint32_t next_unit = 0;
    std::uint64_t issued = 0;  // bytes of tensors in tasks so far
    std::uint32_t active = 0;  // threads that work for it
    // Device lanes:
    bool staged = false;
    std::uint32_t next_chunk = 0;
    std::uint32_t chunks_arrived = 0;
    std::uint32_t slot_count = 0;
    std::uint32_t slot_limit = 0;
    bool adding_slot = false;
    bool no_budget = false;                  // the last answer to a request for a slot
    std::uint64_t pool_changes = 0;          // StagingPool::changes() at that request
    std::optional<std::uint32_t> open_slot;  // being filled
    std::uint32_t open_chunk_end = 0;        // the unit after its chunk's last
    std::optional<Error> slot_refusal;
    std::vector<std::uint32_t> chunk_of_slot;
    std::vector<std::uint32_t> units_left;  // by slot
    BoundedQueue<std::uint32_t> free_slots;
    BoundedQueue<std::uint32_t> submitted_slots;
    ConditionVariable changed;  // for the lane's own thread

    [[nodiscard]] bool all_given_out() const { return next_unit == lane.units.size(); }
    // The share of its bytes that is given out. The lane with the smallest share is furthest
    // behind.
    [[nodiscard]] double share() const {
      return static_cast<double>(issued) / static_cast<double>(lane.payload);
    }
    // The number of tasks that a newly free slot allows.
    [[nodiscard]] std::uint32_t tasks_of_a_slot() const;
    [[nodiscard]] bool needs_slot() const { return staged && !open_slot && free_slots.empty(); }
    [[nodiscard]] bool may_add_slot() const;
  };

  [[nodiscard]] std::optional<Task> pick(int node) WL_REQUIRES(mutex_);
  // The lane that is furthest behind, among those that can take work and belong to `node`, if
  // given.
  [[nodiscard]] LaneState* furthest_behind(std::optional<int> node) WL_REQUIRES(mutex_);
  [[nodiscard]] UnitTask take_units(std::uint32_t lane) WL_REQUIRES(mutex_);
  void open_next_chunk(LaneState& state) WL_REQUIRES(mutex_);
  void wait_for_task() WL_REQUIRES(mutex_);
  void wake(std::uint32_t threads) WL_REQUIRES(mutex_);
  void wake_if_all_given_out() WL_REQUIRES(mutex_);
  void end_task(LaneState& state) WL_REQUIRES(mutex_);

  Mutex mutex_;
  ConditionVariable task_;  // a task may be available
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
