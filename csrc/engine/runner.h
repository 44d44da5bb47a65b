// Runs the dispatcher's tasks: reads, casts, fills staging slots, submits them and waits for their
// copies.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "engine/arrivals.h"
#include "engine/device_lane.h"
#include "engine/dispatcher.h"
#include "engine/plan.h"
#include "engine/report.h"
#include "engine/schedule.h"
#include "engine/scratch.h"
#include "engine/settings.h"
#include "engine/sources.h"
#include "result.h"

namespace weightlift::engine {

class Runner {
 public:
  // All arguments must live as long as this object. `arrivals` is null if the plan has no ranks.
  Runner(const LoadPlan& plan, const Schedule& schedule, const Settings& settings, Sources& sources,
         Dispatcher& dispatcher, Counters& counters, Arrivals* arrivals)
      : plan_(plan),
        schedule_(schedule),
        settings_(settings),
        sources_(sources),
        dispatcher_(dispatcher),
        counters_(counters),
        arrivals_(arrivals) {}

  // Opens the devices of the schedule.
  [[nodiscard]] Status open_devices();
  // Null for the host's lane.
  [[nodiscard]] DeviceLane* device_of(std::uint32_t lane) const noexcept {
    return lane < devices_.size() ? devices_[lane].get() : nullptr;
  }

  // The body of a reader thread: runs tasks until none are left.
  void run_tasks();
  // The body of a device lane's own thread: waits for the oldest copies, so that their slots can be
  // filled again. At the end it returns the slots, because a lane of another load may wait for
  // them.
  void await_copies(std::uint32_t lane);

  // Makes a stream of the device wait for all copies to the device that are queued now.
  [[nodiscard]] Status order_behind_copies(int device, CUstream stream);

 private:
  // The buffers of one thread.
  struct Buffers {
    Scratch scratch;
    DeviceLane::Tables tables;
  };

  void run(const UnitTask& task, Buffers& buffers) WL_REQUIRES(dispatcher_.mutex());
  void run(const AddSlotTask& task) WL_REQUIRES(dispatcher_.mutex());
  void run(const PopulateTask& task) WL_REQUIRES(dispatcher_.mutex());
  [[nodiscard]] Status submit(const UnitTask& task, const Chunk& chunk, Buffers& buffers);
  // `chunk` is null for the host's lane.
  [[nodiscard]] Status deliver_units(const UnitTask& task, const Chunk* chunk, Scratch& scratch);
  [[nodiscard]] Status deliver_unit(const Unit& unit, const Lane& lane, std::byte* slot,
                                    Scratch& scratch);
  [[nodiscard]] Status deliver_plain(const Unit& unit, const Lane& lane, Scratch& scratch);
  [[nodiscard]] Status deliver_pieces(const Unit& unit, const Lane& lane, std::byte* slot,
                                      Scratch& scratch);
  void back_small_pages(const Unit& unit, const Lane& lane) const;
  [[nodiscard]] Status read(const Unit& unit, std::byte* target, Scratch& scratch);
  // Whether the unit can stay in the page cache, from which the device then copies it.
  [[nodiscard]] bool leave_in_place(const UnitTask& task, const Chunk& chunk, const Unit& unit,
                                    std::uint32_t index);

  const LoadPlan& plan_;
  const Schedule& schedule_;
  const Settings& settings_;
  Sources& sources_;
  Dispatcher& dispatcher_;
  Counters& counters_;
  Arrivals* const arrivals_;
  std::vector<std::unique_ptr<DeviceLane>> devices_;  // by lane; empty without device lanes
};

}  // namespace weightlift::engine
