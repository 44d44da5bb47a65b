// Turns a LoadPlan into ordered work: what is read together, what is staged together, and in which
// order each device gets it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "convert/scatter.h"
#include "engine/plan.h"
#include "engine/settings.h"
#include "result.h"

namespace weightlift::engine {

// Up to about this many runs of a chunk, single copies are cheaper than a kernel with its table.
inline constexpr std::size_t kDirectRuns = 4;

// Elements [first, first + count) of a copy, counted in the order of its source.
struct Piece {
  std::uint32_t copy = 0;
  std::uint32_t slot_offset = 0;  // device lanes: offset in the staging slot
  std::uint64_t first = 0;
  std::uint64_t count = 0;
  std::uint32_t device_cast = convert::kTileCopy;  // the kernel's cast
  bool host_cast = false;  // the host casts it while it stages or delivers it
};

// Pieces that one thread reads (or takes from memory) and delivers together.
struct Unit {
  std::uint32_t file = kFromMemory;
  std::uint32_t first_piece = 0;
  std::uint32_t piece_count = 0;
  std::uint32_t slot_offset = 0;  // device lanes, raw: offset of `begin` in the staging slot
  std::uint64_t begin = 0;        // range in the file; both 0 for memory
  std::uint64_t end = 0;
  std::uint64_t payload = 0;     // bytes of tensors in it
  std::uint64_t raw_target = 0;  // host lane: target of the whole range; 0 if it has no single one
  std::uint64_t region = 0;      // host lane: one thread takes adjacent units of one region
  bool plain = false;     // host lane: all pieces are contiguous bytes of a file, without a cast
  bool raw = false;       // device lanes: the range is staged unchanged
  bool may_stay = false;  // raw: the device can copy it from the page cache
};

// Units that go to a device together, in one staging slot.
struct Chunk {
  std::uint32_t first_unit = 0;
  std::uint32_t unit_count = 0;
  std::uint32_t staged_bytes = 0;  // of the slot, without the tiles
  bool scatter = false;            // by the kernel; else one copy for each run
};

// Contiguous elements or bytes in a slot whose target is contiguous too.
struct Run {
  std::uint32_t slot_offset = 0;
  std::uint32_t cast = convert::kTileCopy;
  std::uint64_t target = 0;
  std::uint64_t count = 0;  // elements; bytes for a copy
};

// The ordered work of one destination.
struct Lane {
  int device = kHostDevice;
  int node = -1;  // NUMA node of the device; -1 if unknown
  std::vector<Piece> pieces;
  std::vector<Unit> units;
  std::vector<Chunk> chunks;  // device lanes
  std::uint64_t payload = 0;  // bytes of tensors
  std::uint32_t slots = 0;    // the most staging slots it may use
  std::string copies;         // device lanes: how its chunks are copied, as text
  std::vector<std::string> fallbacks;

  [[nodiscard]] std::uint64_t payload_of(const Chunk& chunk) const noexcept;
  // Replaces `runs` by the runs of a chunk, merged if both sides are contiguous.
  void find_runs(const LoadPlan& plan, const Chunk& chunk, std::vector<Run>& runs) const;
};

struct Schedule {
  std::vector<Lane> lanes;  // the host's first, if it has work

  // Sets DeviceNeeds::scratch_bytes in `plan`. Loads the devices' kernels if the plan needs them.
  [[nodiscard]] static Result<Schedule> make(LoadPlan& plan, const Settings& settings);
};

}  // namespace weightlift::engine
