// From a LoadPlan to the order of work: what is read together, what is staged together, and what
// each device's link gets when.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "convert/scatter.h"
#include "engine/plan.h"
#include "engine/settings.h"
#include "result.h"

namespace weightlift::engine {

// Elements [first, first + count) of a copy, in the order of its source.
struct Piece {
  std::uint32_t copy = 0;
  std::uint32_t slot_offset = 0;  // device lanes: where its bytes lie in the staging slot
  std::uint64_t first = 0;
  std::uint64_t count = 0;
  std::uint32_t device_cast = convert::kTileCopy;  // what the kernel does with it
  bool host_cast = false;                          // cast while it is staged or delivered
};

// What one thread reads (or takes from memory) and delivers in one go.
struct Unit {
  std::uint32_t file = kFromMemory;
  std::uint32_t first_piece = 0;
  std::uint32_t piece_count = 0;
  std::uint32_t slot_offset = 0;  // device lanes, raw: where `begin` lies in the staging slot
  std::uint64_t begin = 0;        // of the file; both 0 for memory
  std::uint64_t end = 0;
  std::uint64_t payload = 0;      // bytes of tensors in it
  std::uint64_t raw_target = 0;   // host lane: where the range goes as it is, 0 where it does not
  std::uint64_t target_page = 0;  // host lane: the huge page that its first target lies in
  bool raw = false;               // device lanes: the range is staged as it is in the file
  bool may_stay = false;          // raw: the device can copy from where it lies in the page cache
};

// What goes to a device in one copy.
struct Chunk {
  std::uint32_t first_unit = 0;
  std::uint32_t unit_count = 0;
  std::uint32_t staged_bytes = 0;  // of the slot, without the tiles
  bool scatter = false;            // through the kernel; else one copy a run
};

// A run of bytes in a slot that goes to one place, cast or as it is.
struct Run {
  std::uint32_t slot_offset = 0;
  std::uint32_t cast = convert::kTileCopy;
  std::uint64_t target = 0;
  std::uint64_t count = 0;  // elements; bytes for a copy
};

// The work of one destination, in order.
struct Lane {
  int device = kHostDevice;
  int node = -1;  // of the machine, that the device is attached to; -1 where that is not known
  std::vector<Piece> pieces;
  std::vector<Unit> units;
  std::vector<Chunk> chunks;  // device lanes
  std::uint64_t payload = 0;  // bytes of tensors
  std::uint32_t slots = 0;    // staging slots it may use
  std::string copies;         // device lanes: how its chunks get to their places, in words
  std::vector<std::string> fallbacks;

  [[nodiscard]] std::uint64_t payload_of(const Chunk& chunk) const noexcept;
  // The runs of a chunk, merged where both sides are contiguous, in the place of what is in `runs`.
  void find_runs(const LoadPlan& plan, const Chunk& chunk, std::vector<Run>& runs) const;
};

struct Schedule {
  std::vector<Lane> lanes;  // the host's first, if it has work

  // Fills in DeviceNeeds::scratch_bytes of `plan`. Asks the devices for their kernels where it
  // needs them.
  [[nodiscard]] static Result<Schedule> make(LoadPlan& plan, const Settings& settings);
};

}  // namespace weightlift::engine
