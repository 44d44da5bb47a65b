#include "engine/device_lane.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "convert/cast.h"
#include "convert/scatter.h"
#include "device/context.h"
#include "device/driver.h"
#include "device/staging.h"
#include "engine/bounded_queue.h"
#include "engine/plan.h"
#include "engine/schedule.h"
#include "engine/settings.h"
#include "io/leased_mapping.h"
#include "result.h"

namespace weightlift::engine {
namespace {

// Times the number of devices: the pinned memory that concurrent loads share.
constexpr std::size_t kPinnedBudget = std::size_t{64} << 20;

constexpr std::uint64_t kTileAlignment = 32;

}  // namespace

Result<std::size_t> pinned_budget(const Settings& settings) {
  WL_ASSIGN_OR_RETURN(const int devices, device::Device::count());
  return std::max(kPinnedBudget, settings.pinned_bytes) *
         static_cast<std::size_t>(std::max(devices, 1));
}

Result<std::unique_ptr<DeviceLane>> DeviceLane::open(const LoadPlan& plan, const Lane& lane,
                                                     const DeviceNeeds& needs,
                                                     const Settings& settings) {
  WL_ASSIGN_OR_RETURN(device::Device * device, device::Device::get(lane.device));
  auto* const allocating = reinterpret_cast<CUstream>(static_cast<std::uintptr_t>(needs.stream));
  WL_RETURN_IF_ERROR(device::Stream::check_not_capturing(*device, allocating));
  Streams streams;
  streams.reserve(settings.streams);
  for (unsigned i = 0; i < settings.streams; ++i) {
    WL_ASSIGN_OR_RETURN(device::Stream stream, device::Stream::create(*device));
    streams.push_back(std::move(stream));
  }
  WL_ASSIGN_OR_RETURN(device::Event allocated, device::Event::create(*device));
  WL_RETURN_IF_ERROR(allocated.record(allocating));
  const device::CurrentContext current(*device);
  WL_RETURN_IF_ERROR(current.status());
  for (const device::Stream& stream : streams) {
    WL_RETURN_IF_ERROR(device::check(
        device->driver(), device->driver().cuStreamWaitEvent(stream.get(), allocated.get(), 0),
        "cuStreamWaitEvent"));
  }
  return std::unique_ptr<DeviceLane>(
      new DeviceLane(plan, lane, needs, settings, *device, std::move(streams)));
}

DeviceLane::~DeviceLane() {
  if (!lost_.load()) return;
  for (std::optional<Slot>& slot : slots_) {
    if (slot) slot->memory.abandon();
  }
}

Result<SlotOutcome> DeviceLane::add_slot(std::uint32_t index) {
  WL_ASSIGN_OR_RETURN(const std::size_t budget, pinned_budget(settings_));
  auto& pool = device::StagingPool::instance();
  const auto claim = index == 0 ? device::SlotClaim::kFirst : device::SlotClaim::kFurther;
  WL_ASSIGN_OR_RETURN(auto memory, pool.take(device_, settings_.chunk_bytes, budget, claim));
  if (!memory) {
    if (index == 0 && !waiting_) waiting_.emplace(pool);
    return SlotOutcome::kNoBudget;
  }
  waiting_.reset();
  WL_ASSIGN_OR_RETURN(device::Event event, device::Event::create(device_));
  slots_[index].emplace(Slot{.memory = *std::move(memory),
                             .copied = std::move(event),
                             .held = std::vector<io::LeasedMapping::Hold>(held_)});
  return SlotOutcome::kAdded;
}

Status DeviceLane::submit(std::uint32_t slot, const Chunk& chunk, Tables& tables) {
  const device::CurrentContext current(device_);
  WL_RETURN_IF_ERROR(current.status());
  lane_.find_runs(plan_, chunk, tables.runs);
  WL_RETURN_IF_ERROR(chunk.scatter ? scatter(slot, chunk, tables) : copy_runs(slot, chunk, tables));
  return slots_[slot]->copied.record(stream(slot));
}

Status DeviceLane::wait(std::uint32_t slot) {
  WL_RETURN_IF_ERROR(slots_[slot]->copied.wait());
  for (io::LeasedMapping::Hold& hold : slots_[slot]->held) hold = {};
  return {};
}

Status DeviceLane::order_behind(const BoundedQueue<std::uint32_t>& slots, CUstream other) const {
  if (slots.empty()) return {};
  const device::CurrentContext current(device_);
  WL_RETURN_IF_ERROR(current.status());
  for (std::size_t i = 0; i < slots.size(); ++i) {
    const CUevent copied = slots_[slots.at(i)]->copied.get();
    WL_RETURN_IF_ERROR(
        check(device_.driver().cuStreamWaitEvent(other, copied, 0), "cuStreamWaitEvent"));
  }
  return {};
}

void DeviceLane::settle() noexcept {
  const device::CurrentContext current(device_);
  for (const device::Stream& stream : streams_) {
    if (!current.ok() || device_.driver().cuStreamSynchronize(stream.get()) != CUDA_SUCCESS) {
      lost_ = true;
    }
  }
}

Status DeviceLane::scatter(std::uint32_t slot, const Chunk& chunk, Tables& tables) {
  std::vector<convert::Tile>& tiles = tables.tiles;
  tiles.clear();
  for (const Run& run : tables.runs) {
    std::uint64_t source_item = 1;
    std::uint64_t target_item = 1;
    if (run.cast != convert::kTileCopy) {
      source_item = convert::float_bytes(static_cast<convert::FloatFormat>(
          run.cast / static_cast<std::uint32_t>(convert::kFloatFormatCount)));
      target_item = convert::float_bytes(static_cast<convert::FloatFormat>(
          run.cast % static_cast<std::uint32_t>(convert::kFloatFormatCount)));
    }
    const std::uint64_t step = convert::kTileBytes / std::max(source_item, target_item);
    for (std::uint64_t done = 0; done < run.count; done += step) {
      tiles.push_back({.source = run.slot_offset + done * source_item,
                       .target = run.target + done * target_item,
                       .count = static_cast<std::uint32_t>(std::min(step, run.count - done)),
                       .cast = run.cast});
    }
  }
  // The table follows the data, so that one copy brings both.
  std::uint64_t tiles_offset =
      (chunk.staged_bytes + kTileAlignment - 1) / kTileAlignment * kTileAlignment;
  const std::uint64_t table_bytes = tiles.size() * sizeof(convert::Tile);
  if (tiles_offset + table_bytes > settings_.chunk_bytes) {
    return Error{.code = ErrorCode::kInvalidArgument,
                 .message =
                     "a chunk and its tiles do not fit into a staging slot: raise "
                     "Settings.chunk_bytes"};
  }
  std::memcpy(slots_[slot]->memory.data() + tiles_offset, tiles.data(), table_bytes);

  WL_ASSIGN_OR_RETURN(CUfunction kernel, device_.scatter_kernel());
  CUdeviceptr scratch = needs_.scratch + std::uint64_t{slot} * settings_.chunk_bytes;
  const device::Driver& driver = device_.driver();
  WL_RETURN_IF_ERROR(check(driver.cuMemcpyHtoDAsync(scratch, slots_[slot]->memory.data(),
                                                    tiles_offset + table_bytes, stream(slot)),
                           "cuMemcpyHtoDAsync"));
  auto tile_count = static_cast<std::uint32_t>(tiles.size());
  convert::Fp8Rules rules = settings_.fp8;
  void* arguments[] = {&scratch, &tiles_offset, &tile_count, &rules};
  return check(driver.cuLaunchKernel(kernel, tile_count, 1, 1, convert::kScatterThreads, 1, 1, 0,
                                     stream(slot), arguments, nullptr),
               "cuLaunchKernel");
}

// Lists the sources of the chunk's runs: the slot, or a mapping for units that stayed in the page
// cache. Contiguous parts of one mapping become one copy.
void DeviceLane::find_sources(std::uint32_t slot, const Chunk& chunk, Tables& tables) const {
  tables.targets.clear();
  tables.sources.clear();
  tables.sizes.clear();
  const std::byte* const base = slots_[slot]->memory.data();
  const std::vector<io::LeasedMapping::Hold>& held = slots_[slot]->held;
  const auto add = [&tables](std::uint64_t target, const std::byte* source, std::uint64_t bytes) {
    tables.targets.push_back(target);
    tables.sources.push_back(reinterpret_cast<CUdeviceptr>(source));
    tables.sizes.push_back(bytes);
  };
  const Unit* const units = &lane_.units[chunk.first_unit];
  std::uint32_t unit = 0;
  for (const Run& run : tables.runs) {
    if (held.empty()) {
      add(run.target, base + run.slot_offset, run.count);
      continue;
    }
    bool merges = false;  // the previous part lies in a mapping
    for (std::uint64_t done = 0; done < run.count;) {
      const std::uint64_t at = run.slot_offset + done;
      while (unit + 1 < chunk.unit_count && units[unit + 1].slot_offset <= at) ++unit;
      std::uint64_t bytes = run.count - done;
      if (unit + 1 < chunk.unit_count) bytes = std::min(bytes, units[unit + 1].slot_offset - at);
      const std::byte* const elsewhere = held[unit].data();
      const std::byte* const source =
          elsewhere != nullptr ? elsewhere + (at - units[unit].slot_offset) : base + at;
      if (merges && elsewhere != nullptr &&
          tables.sources.back() + tables.sizes.back() == reinterpret_cast<CUdeviceptr>(source)) {
        tables.sizes.back() += bytes;
      } else {
        add(run.target + done, source, bytes);
      }
      merges = elsewhere != nullptr;
      done += bytes;
    }
  }
}

Status DeviceLane::copy_runs(std::uint32_t slot, const Chunk& chunk, Tables& tables) {
  const device::Driver& driver = device_.driver();
  find_sources(slot, chunk, tables);
  const std::size_t count = tables.sizes.size();
  if (count > 1 && settings_.batch_copies && driver.batch_form() != nullptr) {
    CUmemcpyAttributes attributes{};
    attributes.srcAccessOrder = CU_MEMCPY_SRC_ACCESS_ORDER_STREAM;
    return check(driver.copy_batch(tables.targets.data(), tables.sources.data(),
                                   tables.sizes.data(), count, attributes, stream(slot)),
                 "cuMemcpyBatchAsync");
  }
  for (std::size_t i = 0; i < count; ++i) {
    WL_RETURN_IF_ERROR(
        check(driver.cuMemcpyHtoDAsync(tables.targets[i],
                                       reinterpret_cast<const void*>(tables.sources[i]),
                                       tables.sizes[i], stream(slot)),
              "cuMemcpyHtoDAsync"));
  }
  return {};
}

}  // namespace weightlift::engine
