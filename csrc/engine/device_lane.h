// One device's link during one load: its copy streams and staging slots, and the calls that copy a
// filled slot.
#pragma once

#include <cuda.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "convert/scatter.h"
#include "device/context.h"
#include "device/staging.h"
#include "engine/bounded_queue.h"
#include "engine/plan.h"
#include "engine/schedule.h"
#include "engine/settings.h"
#include "io/leased_mapping.h"
#include "result.h"

namespace weightlift::engine {

enum class SlotOutcome : std::uint8_t {
  kAdded,
  kNoBudget,  // other loads hold all pinned memory for now
};

// The number of bytes that all loads together may pin.
[[nodiscard]] Result<std::size_t> pinned_budget(const Settings& settings);

class DeviceLane {
 public:
  // Makes the copy streams and orders them after the present work of the allocating stream, because
  // the allocator may have handed out memory that a kernel on that stream still uses.
  [[nodiscard]] static Result<std::unique_ptr<DeviceLane>> open(const LoadPlan& plan,
                                                                const Lane& lane,
                                                                const DeviceNeeds& needs,
                                                                const Settings& settings);
  DeviceLane(const DeviceLane&) = delete;
  DeviceLane& operator=(const DeviceLane&) = delete;
  // Returns the slots to the pool. No copy may be in flight.
  ~DeviceLane();

  // Takes slot `index` (less than Lane::slots) from the pool.
  [[nodiscard]] Result<SlotOutcome> add_slot(std::uint32_t index);
  [[nodiscard]] std::byte* slot(std::uint32_t index) noexcept {
    return slots_[index]->memory.data();
  }

  // Lists of the copies of a chunk. Each thread that submits has its own and reuses them.
  struct Tables {
    std::vector<Run> runs;
    std::vector<convert::Tile> tiles;
    std::vector<CUdeviceptr> targets;
    std::vector<CUdeviceptr> sources;
    std::vector<std::size_t> sizes;
  };

  // Unit `unit` of the chunk in slot `index` stays in the page cache. The device copies it from
  // there, and the slot keeps the hold until the copy has ended. Only for devices that use the
  // host's page tables.
  void keep(std::uint32_t index, std::uint32_t unit, io::LeasedMapping::Hold hold) noexcept {
    slots_[index]->held[unit] = std::move(hold);
  }

  // Queues the copies of a filled slot and records an event after them.
  [[nodiscard]] Status submit(std::uint32_t slot, const Chunk& chunk, Tables& tables);
  // Waits until the copies of a submitted slot have ended.
  [[nodiscard]] Status wait(std::uint32_t slot);
  // Makes another stream of the device wait for the copies of submitted slots.
  [[nodiscard]] Status order_behind(const BoundedQueue<std::uint32_t>& slots, CUstream other) const;
  // After a failed call: waits for all work on the streams, so that the slots can be used again. If
  // this fails too, the destructor abandons the slots, because the device may still read them.
  void settle() noexcept;

 private:
  struct Slot {
    device::StagingSlot memory;
    device::Event copied;
    std::vector<io::LeasedMapping::Hold> held;  // by unit of its chunk; empty if none can be held
  };

  // Slots take turns on the streams, so that the copy of one need not wait for the kernel of the
  // one before it.
  using Streams = std::vector<device::Stream>;

  DeviceLane(const LoadPlan& plan, const Lane& lane, const DeviceNeeds& needs,
             const Settings& settings, device::Device& device, Streams streams)
      : plan_(plan),
        lane_(lane),
        needs_(needs),
        settings_(settings),
        device_(device),
        streams_(std::move(streams)),
        slots_(lane.slots) {
    for (const Chunk& chunk : lane.chunks) {
      for (std::uint32_t i = 0; i < chunk.unit_count; ++i) {
        if (lane.units[chunk.first_unit + i].may_stay) held_ = std::max(held_, chunk.unit_count);
      }
    }
  }

  [[nodiscard]] CUstream stream(std::uint32_t slot) const noexcept {
    return streams_[slot % streams_.size()].get();
  }
  [[nodiscard]] Status scatter(std::uint32_t slot, const Chunk& chunk, Tables& tables);
  [[nodiscard]] Status copy_runs(std::uint32_t slot, const Chunk& chunk, Tables& tables);
  void find_sources(std::uint32_t slot, const Chunk& chunk, Tables& tables) const;
  [[nodiscard]] Status check(CUresult result, const char* call) const {
    return device::check(device_.driver(), result, call);
  }

  const LoadPlan& plan_;
  const Lane& lane_;
  const DeviceNeeds& needs_;
  const Settings& settings_;
  device::Device& device_;
  Streams streams_;
  std::optional<device::StagingPool::Waiting> waiting_;  // for the first slot
  std::vector<std::optional<Slot>> slots_;  // never resized: threads use slots while one is added
  std::uint32_t held_ = 0;                  // holds that a slot needs; 0 if no unit may stay
  std::atomic<bool> lost_ = false;          // set by the thread whose call failed
};

}  // namespace weightlift::engine
