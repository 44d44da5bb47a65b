#include "engine/runner.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <utility>
#include <variant>

#include "engine/delivery.h"
#include "engine/device_lane.h"
#include "engine/dispatcher.h"
#include "engine/host_memory.h"
#include "engine/plan.h"
#include "engine/schedule.h"
#include "engine/scratch.h"
#include "engine/sources.h"
#include "io/anonymous_memory.h"
#include "io/machine.h"
#include "mutex.h"
#include "result.h"

namespace weightlift::engine {
namespace {

// Bytes from which on a read of their own takes less time than one copy more.
constexpr std::uint64_t kLargePiece = std::uint64_t{16} << 10;

// For fewer bytes of targets, a system call to back them costs as much as it saves.
constexpr std::uint64_t kBackedBytes = std::uint64_t{64} << 10;

std::byte* at_address(std::uint64_t address) {
  return reinterpret_cast<std::byte*>(static_cast<std::uintptr_t>(address));
}

// Runs work of a thread that may allocate. An exception would end the process, so it becomes an
// Error.
template <class Work>
auto attempt(const Work& work) -> decltype(work()) try {
  return work();
} catch (const std::bad_alloc&) {
  return Error{.code = ErrorCode::kOutOfMemory};
}

}  // namespace

Status Runner::open_devices() {
  for (std::size_t i = 0; i < schedule_.lanes.size(); ++i) {
    const Lane& lane = schedule_.lanes[i];
    if (lane.device == kHostDevice || lane.chunks.empty()) continue;
    devices_.resize(schedule_.lanes.size());  // not for a load to the host only
    const DeviceNeeds& needs = plan_.needs_of(lane.device);
    if (needs.scratch_bytes != 0 && needs.scratch == 0) {
      return Error{
          .code = ErrorCode::kInvalidArgument,
          .message = "no scratch memory was given for cuda:" + std::to_string(lane.device) +
                     ": pass the memory that prepare() asks for to start()"};
    }
    WL_ASSIGN_OR_RETURN(devices_[i], DeviceLane::open(plan_, lane, needs, settings_));
  }
  return {};
}

// --- Reader threads ----------------------------------------------------------------------------

void Runner::run_tasks() {
  Buffers buffers;
  const MutexLock lock(dispatcher_.mutex());
  while (const std::optional<Task> task = dispatcher_.next(io::current_node)) {
    if (const auto* const unit = std::get_if<UnitTask>(&*task)) {
      run(*unit, buffers);
    } else if (const auto* const slot = std::get_if<AddSlotTask>(&*task)) {
      run(*slot);
    } else if (const auto* const populate = std::get_if<PopulateTask>(&*task)) {
      run(*populate);
    }
  }
}

void Runner::run(const PopulateTask& task) {
  const PopulateStep& step = sources_.populate_steps()[task.step];
  Status status;
  {
    const MutexUnlock unlocked(dispatcher_.mutex());
    status = attempt([&] { return sources_.populate(step); });
    if (status.ok()) {
      counters_.delivered_bytes += step.payload;
      if (arrivals_ != nullptr)
        arrivals_->populated(task.step + 1);  // the steps run one at a time, in order
    }
  }
  dispatcher_.finish(task, std::move(status));
}

void Runner::run(const AddSlotTask& task) {
  Result<SlotOutcome> outcome = SlotOutcome::kNoBudget;
  {
    const MutexUnlock unlocked(dispatcher_.mutex());
    outcome = attempt([&] { return devices_[task.lane]->add_slot(task.slot); });
  }
  dispatcher_.finish(task, std::move(outcome));
}

void Runner::run(const UnitTask& task, Buffers& buffers) {
  Status status;
  const Chunk* const chunk = device_of(task.lane) == nullptr
                                 ? nullptr
                                 : &schedule_.lanes[task.lane].chunks[dispatcher_.chunk_in(task)];
  {
    const MutexUnlock unlocked(dispatcher_.mutex());
    status = attempt([&] { return deliver_units(task, chunk, buffers.scratch); });
  }
  if (!dispatcher_.finish(task, std::move(status))) return;
  {
    const MutexUnlock unlocked(dispatcher_.mutex());
    status = submit(task, *chunk, buffers);
  }
  const bool is_queued = status.ok();
  dispatcher_.submitted(task, std::move(status));
  if (is_queued && arrivals_ != nullptr) {
    const MutexUnlock unlocked(dispatcher_.mutex());
    arrivals_->queued(schedule_.lanes[task.lane], *chunk);
  }
}

Status Runner::submit(const UnitTask& task, const Chunk& chunk, Buffers& buffers) {
  DeviceLane& device = *devices_[task.lane];
  Status status = attempt([&] { return device.submit(task.slot, chunk, buffers.tables); });
  if (!status.ok()) device.settle();
  return status;
}

bool Runner::leave_in_place(const UnitTask& task, const Chunk& chunk, const Unit& unit,
                            std::uint32_t index) {
  if (!unit.may_stay) return false;
  auto hold = sources_.hold(unit);
  if (hold.data() == nullptr) return false;
  devices_[task.lane]->keep(task.slot, index - chunk.first_unit, std::move(hold));
  counters_.read_bytes += unit.end - unit.begin;
  return true;
}

Status Runner::deliver_units(const UnitTask& task, const Chunk* chunk, Scratch& scratch) {
  const Lane& lane = schedule_.lanes[task.lane];
  DeviceLane* const device = device_of(task.lane);
  std::byte* const slot = device != nullptr ? device->slot(task.slot) : nullptr;
  for (std::uint32_t i = 0; i < task.unit_count && !dispatcher_.stopped(); ++i) {
    const std::uint32_t index = task.first_unit + i;
    const Unit& unit = lane.units[index];
    Status status;
    if (lane.device == kHostDevice) back_small_pages(unit, lane);
    if (chunk == nullptr || !leave_in_place(task, *chunk, unit, index)) {
      status = deliver_unit(unit, lane, slot, scratch);
    }
    if (!status.ok()) {
      Error& error = status.error();
      const Copy& copy = plan_.copies[lane.pieces[unit.first_piece].copy];
      if (copy.name < plan_.names.size()) error.tensor = plan_.names[copy.name];
      if (unit.file != kFromMemory) error.path = plan_.files[unit.file]->path();
      return status;
    }
    if (device != nullptr) continue;
    counters_.delivered_bytes += unit.payload;
    if (arrivals_ != nullptr) arrivals_->delivered(lane, unit);
  }
  return {};
}

// Delivers a unit to its targets on the host, or into the staging slot.
Status Runner::deliver_unit(const Unit& unit, const Lane& lane, std::byte* slot, Scratch& scratch) {
  if (unit.raw_target != 0) return read(unit, at_address(unit.raw_target), scratch);
  if (slot != nullptr && unit.raw) return read(unit, slot + unit.slot_offset, scratch);
  // A direct read goes through a buffer anyway, and is faster as a whole.
  if (unit.plain && !sources_.reads_directly(unit.file)) return deliver_plain(unit, lane, scratch);
  return deliver_pieces(unit, lane, slot, scratch);
}

// Backs small pages of a unit's targets together: with a fault for each, a cast into them took
// about a tenth longer (AMD EPYC, Linux 6.18).
void Runner::back_small_pages(const Unit& unit, const Lane& lane) const {
  if (unit.piece_count == 0) return;
  const std::byte* const start =
      at_address(plan_.copies[lane.pieces[unit.first_piece].copy].target);
  const auto memory = std::ranges::find_if(
      plan_.host_memory, [&](const auto& one) { return one->gives_small_pages(start, start + 1); });
  if (memory == plan_.host_memory.end()) return;
  std::uint64_t begin = ~std::uint64_t{0};
  std::uint64_t end = 0;
  std::uint64_t bytes = 0;
  for (std::uint32_t i = 0; i < unit.piece_count; ++i) {
    const Piece& piece = lane.pieces[unit.first_piece + i];
    const Copy& copy = plan_.copies[piece.copy];
    if (copy.dimension_count != 0) return;
    const std::uint64_t first = copy.target + piece.first * copy.target_item();
    const std::uint64_t length = piece.count * copy.target_item();
    begin = std::min(begin, first);
    end = std::max(end, first + length);
    bytes += length;
  }
  if (bytes < kBackedBytes || end - begin > 2 * bytes) return;
  if (!(*memory)->gives_small_pages(at_address(begin), at_address(end))) return;
  io::back_pages(at_address(begin), end - begin);
}

Status Runner::read(const Unit& unit, std::byte* target, Scratch& scratch) {
  counters_.read_bytes += unit.end - unit.begin;
  return sources_.read(unit, target, scratch);
}

// Reads large pieces to their targets: through a buffer, their bytes would be copied twice.
Status Runner::deliver_plain(const Unit& unit, const Lane& lane, Scratch& scratch) {
  Unit small{.file = unit.file};  // the pieces before the next large one
  const auto deliver_small = [&]() -> Status {
    if (small.piece_count == 0) return {};
    return deliver_pieces(std::exchange(small, {.file = unit.file}), lane, nullptr, scratch);
  };
  for (std::uint32_t i = unit.first_piece; i < unit.first_piece + unit.piece_count; ++i) {
    const Piece& piece = lane.pieces[i];
    const Copy& copy = plan_.copies[piece.copy];
    const std::uint64_t item = copy.source_item();
    const std::uint64_t begin = copy.source + piece.first * item;
    const std::uint64_t end = begin + piece.count * item;
    if (end - begin >= kLargePiece) {
      WL_RETURN_IF_ERROR(deliver_small());
      WL_RETURN_IF_ERROR(read({.file = unit.file, .begin = begin, .end = end},
                              at_address(copy.target + piece.first * item), scratch));
      continue;
    }
    if (small.piece_count == 0) small = {.file = unit.file, .first_piece = i, .begin = begin};
    small.begin = std::min(small.begin, begin);  // tensors that overlap
    small.end = std::max(small.end, end);
    ++small.piece_count;
  }
  return deliver_small();
}

Status Runner::deliver_pieces(const Unit& unit, const Lane& lane, std::byte* slot,
                              Scratch& scratch) {
  Sources::Bytes bytes;
  if (unit.file != kFromMemory) {
    const bool is_cast = lane.pieces[unit.first_piece].host_cast;
    counters_.read_bytes += unit.end - unit.begin;
    WL_ASSIGN_OR_RETURN(bytes, sources_.bytes(unit, is_cast, scratch));
  }
  for (std::uint32_t i = 0; i < unit.piece_count; ++i) {
    const Piece& piece = lane.pieces[unit.first_piece + i];
    std::byte* const packed = slot != nullptr ? slot + piece.slot_offset : nullptr;
    const std::byte* source = bytes.data;
    std::uint64_t source_begin = unit.begin;
    if (unit.file == kFromMemory) {
      source_begin = plan_.copies[piece.copy].source;
      source = at_address(source_begin);
    }
    deliver(plan_, piece, source, source_begin, packed, settings_.fp8, scratch);
  }
  return {};
}

// --- A device lane's own thread ----------------------------------------------------------------

void Runner::await_copies(std::uint32_t lane_index) {
  const Lane& lane = schedule_.lanes[lane_index];
  std::unique_ptr<DeviceLane>& device = devices_[lane_index];
  std::unique_ptr<DeviceLane> ended;
  {
    const MutexLock lock(dispatcher_.mutex());
    while (const auto submitted = dispatcher_.oldest_submitted(lane_index)) {
      Status status;
      {
        const MutexUnlock unlocked(dispatcher_.mutex());
        status = attempt([&] { return device->wait(submitted->slot); });
        if (!status.ok()) device->settle();
        if (status.ok() && arrivals_ != nullptr) {
          arrivals_->copied(lane, lane.chunks[submitted->chunk]);
        }
      }
      if (status.ok()) counters_.delivered_bytes += lane.payload_of(lane.chunks[submitted->chunk]);
      dispatcher_.arrived(lane_index, std::move(status));
    }
    dispatcher_.wait_until_idle(lane_index);
    ended = std::move(device);
  }
}

Status Runner::order_behind_copies(int device, CUstream stream) {
  const MutexLock lock(
      dispatcher_.mutex());  // so that no lane ends and no slot is reused meanwhile
  for (std::uint32_t i = 0; i < devices_.size(); ++i) {
    if (devices_[i] == nullptr || schedule_.lanes[i].device != device) continue;
    WL_RETURN_IF_ERROR(devices_[i]->order_behind(dispatcher_.submitted_slots(i), stream));
  }
  return {};
}

}  // namespace weightlift::engine
