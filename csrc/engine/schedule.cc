#include "engine/schedule.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "convert/cast.h"
#include "convert/scatter.h"
#include "device/context.h"
#include "dtype.h"
#include "engine/order_of_use.h"
#include "engine/plan.h"
#include "engine/settings.h"
#include "io/anonymous_memory.h"
#include "result.h"

namespace weightlift::engine {
namespace {

constexpr std::uint32_t kPieceAlignment = 16;
constexpr std::uint32_t kUnitPieces = 1024;  // so that the tiles of a unit fit into a slot

template <class T>
constexpr T round_up(T value, T unit) {
  return (value + unit - 1) / unit * unit;
}

// The bytes of a piece in a staging slot.
std::uint64_t staged_bytes(const Copy& copy, const Piece& piece) {
  return piece.count * (piece.host_cast ? copy.target_item() : copy.source_item());
}

std::uint32_t tile_bound(std::uint64_t staged_bytes) {
  // A cast to eight times the size needs eight times as many tiles.
  return static_cast<std::uint32_t>(8 * staged_bytes / convert::kTileBytes + 1);
}

// Builds one lane from copies that are sorted by source.
class LaneBuilder {
 public:
  // `device` is null for the host's lane.
  LaneBuilder(const LoadPlan& plan, const Settings& settings, device::Device* device, Lane& lane)
      : plan_(plan),
        settings_(settings),
        read_bytes_(settings.read_bytes),
        device_(device),
        lane_(lane) {
    // A unit and its tiles must fit into a slot.
    if (lane.device != kHostDevice) {
      read_bytes_ = settings.device_read_bytes();
    }
  }

  void add(std::uint32_t index) {
    const Copy& copy = plan_.copies[index];
    if (copy.dimension_count == 0) {
      add_contiguous(index, copy);
    } else {
      add_strided(index, copy);
    }
  }

  void finish() {
    close_unit();
    close_chunk();
    if (device_ != nullptr) lane_.copies = describe_copies();
  }

 private:
  // Must agree with DeviceLane::copy_runs and DeviceLane::scatter.
  [[nodiscard]] std::string describe_copies() const {
    std::string text = "cuda:" + std::to_string(lane_.device) + ": ";
    const std::size_t start = text.size();
    const auto add = [&text, start](std::uint32_t chunks, const std::string& how) {
      if (chunks == 0) return;
      if (text.size() != start) text += ", ";
      text += std::to_string(chunks) + (chunks == 1 ? " chunk by " : " chunks by ") + how;
    };
    const char* const form = settings_.batch_copies ? device_->driver().batch_form() : nullptr;
    add(of_one_run_, "one copy");
    add(of_many_runs_, form != nullptr ? std::string("batch copies of CUDA ") + form
                                       : "a copy for each run of bytes, without batch copies");
    add(scattered_, "the kernel");
    return text.size() == start ? std::string() : text;
  }

  bool casts_on_host(const Copy& copy) {
    if (device_ == nullptr) return true;
    const bool better_there = settings_.cast_place == CastPlace::kAuto
                                  ? copy.target_item() < copy.source_item()
                                  : settings_.cast_place == CastPlace::kHost;
    return better_there || !has_kernel();
  }

  // Loads the kernel only for a plan that needs it, because this takes a millisecond or more.
  bool has_kernel() {
    if (kernel_) return *kernel_;
    kernel_ = false;
    if (device_ == nullptr || !settings_.kernels) return false;
    const auto kernel = device_->scatter_kernel();
    kernel_ = kernel.ok();
    if (!kernel.ok()) {
      lane_.fallbacks.push_back("cuda:" + std::to_string(lane_.device) +
                                ": no kernels, casts run on the host: " + kernel.error().message);
    }
    return *kernel_;
  }

  void add_contiguous(std::uint32_t index, const Copy& copy) {
    const std::uint64_t item = copy.source_item();
    const std::uint64_t limit = unit_limit(copy);
    std::uint64_t first = 0;
    while (first < copy.elements) {
      const std::uint64_t begin = copy.source + first * item;
      // Cuts at the ends of the file's pages, so that direct reads do not overlap.
      std::uint64_t end = begin + limit;
      if (end / io::kPageBytes * io::kPageBytes > begin)
        end = end / io::kPageBytes * io::kPageBytes;
      const std::uint64_t count =
          std::min(copy.elements - first, std::max<std::uint64_t>(1, (end - begin) / item));
      add_piece(index, copy, first, count, begin, begin + count * item);
      first += count;
    }
  }

  void add_strided(std::uint32_t index, const Copy& copy) {
    const Dimension* const dims = &plan_.dimensions[copy.dimensions];
    const std::uint32_t rank = copy.dimension_count;
    const std::uint64_t limit = unit_limit(copy);
    // Finds the outermost level whose rows have no large hole and fit into one read.
    std::uint32_t level = rank;  // rows are made of dims[level..]
    std::uint64_t row_span = copy.source_item();
    std::uint64_t row_elements = 1;
    std::uint64_t rows = 1;  // of this level in one read
    while (level > 0) {
      const Dimension& outer = dims[level - 1];
      const auto stride = static_cast<std::uint64_t>(outer.source_stride);
      if (stride > row_span + settings_.hole_bytes) break;
      const std::uint64_t span = (outer.extent - 1) * stride + row_span;
      if (span > limit) {
        rows = std::max<std::uint64_t>(1, (limit - std::min(limit, row_span)) / stride + 1);
        break;
      }
      --level;
      row_span = span;
      row_elements *= outer.extent;
    }
    const std::uint64_t level_extent = level > 0 ? dims[level - 1].extent : 1;
    std::uint64_t first = 0;
    while (first < copy.elements) {
      // Takes rows of one level only: the next outer step is a jump.
      const std::uint64_t row = first / row_elements;
      const std::uint64_t count = std::min(rows, level_extent - row % level_extent);
      std::uint64_t begin = copy.source;
      std::uint64_t rest = row;
      for (std::uint32_t i = level; i > 0; --i) {
        begin +=
            (rest % dims[i - 1].extent) * static_cast<std::uint64_t>(dims[i - 1].source_stride);
        rest /= dims[i - 1].extent;
      }
      const std::uint64_t stride =
          level > 0 ? static_cast<std::uint64_t>(dims[level - 1].source_stride) : 0;
      add_piece(index, copy, first, count * row_elements, begin,
                begin + (count - 1) * stride + row_span);
      first += count * row_elements;
    }
  }

  // Source bytes of one unit: neither they nor their target bytes may exceed read_bytes_.
  std::uint64_t unit_limit(const Copy& copy) const {
    const std::uint64_t widest = std::max(copy.source_item(), copy.target_item());
    return std::max<std::uint64_t>(read_bytes_ * copy.source_item() / widest, 64);
  }

  void add_piece(std::uint32_t index, const Copy& copy, std::uint64_t first, std::uint64_t count,
                 std::uint64_t begin, std::uint64_t end) {
    Piece piece{.copy = index, .first = first, .count = count};
    if (copy.casts()) {
      piece.host_cast = casts_on_host(copy);
      if (!piece.host_cast) {
        piece.device_cast = convert::tile_cast(*convert::float_format(copy.source_dtype),
                                               *convert::float_format(copy.target_dtype));
      }
    }
    const std::uint64_t staged =
        round_up<std::uint64_t>(staged_bytes(copy, piece), kPieceAlignment);
    if (open_ && !fits(copy, begin, end, staged)) close_unit();
    const bool from_memory = copy.file == kFromMemory;
    if (!open_) {
      open_ = true;
      unit_ = {.file = copy.file, .first_piece = static_cast<std::uint32_t>(lane_.pieces.size())};
      if (!from_memory) unit_.begin = unit_.end = begin;
      unit_staged_ = 0;
      as_it_is_ = !from_memory;
    }
    if (!from_memory) unit_.end = std::max(unit_.end, end);
    unit_staged_ += staged;
    unit_.payload += count * copy.source_item();
    ++unit_.piece_count;
    as_it_is_ = as_it_is_ && !piece.host_cast && copy.dimension_count == 0;
    lane_.pieces.push_back(piece);
  }

  bool fits(const Copy& copy, std::uint64_t begin, std::uint64_t end, std::uint64_t staged) const {
    if (unit_.file != copy.file || unit_.piece_count == kUnitPieces) return false;
    if (unit_staged_ + staged > read_bytes_) return false;
    return copy.file == kFromMemory ||
           (begin >= unit_.begin && begin <= unit_.end + settings_.hole_bytes &&
            std::max(end, unit_.end) - unit_.begin <= read_bytes_);
  }

  void close_unit() {
    if (!open_) return;
    open_ = false;
    lane_.payload += unit_.payload;
    if (lane_.device == kHostDevice) {
      unit_.raw_target = raw_target();
      const Piece& piece = lane_.pieces[unit_.first_piece];
      const Copy& copy = plan_.copies[piece.copy];
      unit_.region = region_of(copy, piece);
      unit_.plain = as_it_is_;
      lane_.units.push_back(unit_);
      return;
    }
    // Stages the range unchanged, unless more than a quarter of it is holes.
    unit_.raw = as_it_is_ && unit_.payload * 4 >= (unit_.end - unit_.begin) * 3;
    std::uint32_t tiles = 0;
    for (const Piece& piece : pieces_of_unit()) {
      tiles += tile_bound(staged_bytes(plan_.copies[piece.copy], piece));
    }
    if (chunk_.unit_count != 0 && slot_bytes(tiles) > settings_.chunk_bytes) close_chunk();
    const std::uint32_t begin = unit_begin();
    unit_.slot_offset = begin;
    std::uint32_t packed = begin;
    for (Piece& piece : pieces_of_unit()) {
      const Copy& copy = plan_.copies[piece.copy];
      if (unit_.raw) {
        piece.slot_offset = begin + static_cast<std::uint32_t>(copy.source - unit_.begin +
                                                               piece.first * copy.source_item());
      } else {
        piece.slot_offset = packed;
        packed += round_up(static_cast<std::uint32_t>(staged_bytes(copy, piece)), kPieceAlignment);
      }
    }
    cursor_ = begin + unit_length();
    tiles_ += tiles;
    chunk_.staged_bytes = cursor_;
    ++chunk_.unit_count;
    lane_.units.push_back(unit_);
  }

  std::span<Piece> pieces_of_unit() {
    return {&lane_.pieces[unit_.first_piece], unit_.piece_count};
  }

  std::uint32_t unit_length() const {
    return static_cast<std::uint32_t>(unit_.raw ? unit_.end - unit_.begin : unit_staged_);
  }

  // Raw units keep their offset within a page, because a direct read needs an aligned address for
  // an aligned offset. So units that are contiguous in the file are contiguous in the slot. A
  // direct read may fill the whole last page of a unit, so nothing else begins on it.
  std::uint32_t unit_begin() const {
    const bool behind_raw = chunk_.unit_count != 0 && lane_.units.back().raw;
    if (!unit_.raw && !behind_raw) return round_up(cursor_, kPieceAlignment);
    const std::uint32_t page = round_up(cursor_, static_cast<std::uint32_t>(io::kPageBytes));
    return unit_.raw ? page + static_cast<std::uint32_t>(unit_.begin % io::kPageBytes) : page;
  }

  // The bytes of the slot with this unit: up to the end of the last page, which a direct read may
  // fill, and then the tiles.
  std::uint64_t slot_bytes(std::uint32_t tiles) const {
    return round_up<std::uint64_t>(unit_begin() + unit_length(), io::kPageBytes) +
           (std::uint64_t{tiles_} + tiles) * sizeof(convert::Tile);
  }

  void close_chunk() {
    if (chunk_.unit_count == 0) return;
    lane_.find_runs(plan_, chunk_, runs_);
    const bool casts = std::any_of(runs_.begin(), runs_.end(),
                                   [](const Run& run) { return run.cast != convert::kTileCopy; });
    chunk_.scatter = (casts || runs_.size() > kDirectRuns) && has_kernel();
    ++(chunk_.scatter ? scattered_ : runs_.size() == 1 ? of_one_run_ : of_many_runs_);
    // A chunk for the kernel must be in the slot as a whole; the units of other chunks can stay in
    // the page cache.
    for (std::uint32_t i = 0; i < chunk_.unit_count; ++i) {
      Unit& unit = lane_.units[chunk_.first_unit + i];
      unit.may_stay = unit.raw && !chunk_.scatter && device_->uses_host_page_tables();
    }
    lane_.chunks.push_back(chunk_);
    chunk_ = {.first_unit = static_cast<std::uint32_t>(lane_.units.size())};
    cursor_ = 0;
    tiles_ = 0;
  }

  // Two threads that touch one huge page at the same time both clear 2 MiB, and one result is
  // dropped (mm/huge_memory.c). Two that map pages of one page table of a file, again 2 MiB, wait
  // for each other, so a cast to a larger type takes the huge pages that come from as much of the
  // source.
  static std::uint64_t region_of(const Copy& copy, const Piece& piece) {
    const std::uint64_t growth =
        copy.casts() ? std::max<std::uint64_t>(copy.target_item() / copy.source_item(), 1) : 1;
    return (copy.target + piece.first * copy.target_item()) / (growth * io::kHugePageBytes);
  }

  // The target of the whole range, if it is one run of uncast bytes; else 0.
  std::uint64_t raw_target() const {
    if (!as_it_is_ || unit_.payload != unit_.end - unit_.begin) return 0;
    std::uint64_t target = 0;
    std::uint64_t at = unit_.begin;
    for (std::uint32_t i = 0; i < unit_.piece_count; ++i) {
      const Piece& piece = lane_.pieces[unit_.first_piece + i];
      const Copy& copy = plan_.copies[piece.copy];
      const std::uint64_t first = piece.first * copy.source_item();
      const std::uint64_t address = copy.target + first;
      if (copy.source + first != at) return 0;
      if (i == 0) target = address;
      if (address - target != at - unit_.begin) return 0;
      at += piece.count * copy.source_item();
    }
    return target;
  }

  const LoadPlan& plan_;
  const Settings& settings_;
  std::uint64_t read_bytes_;
  device::Device* device_;
  Lane& lane_;
  std::optional<bool> kernel_;
  Unit unit_;
  bool open_ = false;
  bool as_it_is_ = false;
  std::uint64_t unit_staged_ = 0;
  Chunk chunk_;
  std::uint32_t cursor_ = 0;
  std::uint32_t tiles_ = 0;
  std::vector<Run> runs_;  // of the chunk that is being closed
  // The number of chunks by how they are copied.
  std::uint32_t of_one_run_ = 0;
  std::uint32_t of_many_runs_ = 0;
  std::uint32_t scattered_ = 0;
};

}  // namespace

std::uint64_t Lane::payload_of(const Chunk& chunk) const noexcept {
  std::uint64_t bytes = 0;
  for (std::uint32_t i = 0; i < chunk.unit_count; ++i) bytes += units[chunk.first_unit + i].payload;
  return bytes;
}

void Lane::find_runs(const LoadPlan& plan, const Chunk& chunk, std::vector<Run>& runs) const {
  runs.clear();
  for (std::uint32_t u = chunk.first_unit; u < chunk.first_unit + chunk.unit_count; ++u) {
    for (std::uint32_t i = 0; i < units[u].piece_count; ++i) {
      const Piece& piece = pieces[units[u].first_piece + i];
      const Copy& copy = plan.copies[piece.copy];
      Run run{.slot_offset = piece.slot_offset,
              .cast = piece.device_cast,
              .target = copy.target + piece.first * copy.target_item(),
              .count = piece.count};
      if (run.cast == convert::kTileCopy) {
        run.count = staged_bytes(copy, piece);
        if (!runs.empty() && runs.back().cast == convert::kTileCopy &&
            runs.back().slot_offset + runs.back().count == run.slot_offset &&
            runs.back().target + runs.back().count == run.target) {
          runs.back().count += run.count;
          continue;
        }
      }
      runs.push_back(run);
    }
  }
}

namespace {

// Targets on a device must be contiguous, so that each piece is one run.
bool target_is_contiguous(const LoadPlan& plan, const Copy& copy) {
  auto stride = static_cast<std::int64_t>(copy.target_item());
  for (std::uint32_t i = copy.dimension_count; i > 0; --i) {
    const Dimension& dimension = plan.dimensions[copy.dimensions + i - 1];
    if (dimension.target_stride != stride) return false;
    stride *= static_cast<std::int64_t>(dimension.extent);
  }
  return true;
}

Error invalid_copy(const LoadPlan& plan, const Copy& copy, std::string message) {
  Error error{.code = ErrorCode::kInvalidArgument, .message = std::move(message)};
  if (copy.file != kFromMemory) error.path = plan.files[copy.file]->path();
  if (copy.name < plan.names.size()) error.tensor = plan.names[copy.name];
  return error;
}

Status check_copy(const LoadPlan& plan, const Copy& copy) {
  if (copy.casts() &&
      (!convert::float_format(copy.source_dtype) || !convert::float_format(copy.target_dtype))) {
    Error error = invalid_copy(plan, copy,
                               "cannot cast " + std::string(dtype_name(copy.source_dtype)) +
                                   " to " + std::string(dtype_name(copy.target_dtype)) +
                                   ": load it with its own dtype and cast it afterwards");
    error.code = ErrorCode::kUnsupportedDtype;
    return error;
  }
  if (copy.file != kFromMemory && plan.source_range(copy).second > plan.files[copy.file]->size()) {
    return invalid_copy(plan, copy,
                        "the copy reaches past the end of the file: give a range inside it");
  }
  if (copy.device != kHostDevice && !target_is_contiguous(plan, copy)) {
    return invalid_copy(plan, copy,
                        "the target on a device is not contiguous: give contiguous memory");
  }
  return {};
}

}  // namespace

Result<Schedule> Schedule::make(LoadPlan& plan, const Settings& settings) {
  std::map<int, std::vector<std::uint32_t>> by_device;
  for (std::uint32_t i = 0; i < plan.copies.size(); ++i) {
    WL_RETURN_IF_ERROR(check_copy(plan, plan.copies[i]));
    by_device[plan.copies[i].device].push_back(i);
  }
  Schedule schedule;
  std::vector<std::uint32_t> batches;
  if (!plan.ranks.empty()) batches = batches_of_use(plan);
  for (auto& [ordinal, order] : by_device) {
    const auto before = [&plan, &batches](std::uint32_t a, std::uint32_t b) {
      const Copy& x = plan.copies[a];
      const Copy& y = plan.copies[b];
      if (!batches.empty() && batches[x.name] != batches[y.name]) {
        return batches[x.name] < batches[y.name];
      }
      return x.file != y.file ? x.file < y.file : x.source < y.source;
    };
    if (!std::is_sorted(order.begin(), order.end(), before)) {
      std::stable_sort(order.begin(), order.end(), before);
    }
    Lane& lane = schedule.lanes.emplace_back();
    lane.device = ordinal;
    device::Device* device = nullptr;
    if (ordinal != kHostDevice) {
      WL_ASSIGN_OR_RETURN(device, device::Device::get(ordinal));
      lane.node = device->node();
    }
    LaneBuilder builder(plan, settings, device, lane);
    for (const std::uint32_t index : order) builder.add(index);
    builder.finish();
    if (ordinal == kHostDevice) continue;
    lane.slots = static_cast<std::uint32_t>(
        std::min<std::uint64_t>(settings.pinned_bytes / settings.chunk_bytes, lane.chunks.size()));
    const bool scatters = std::any_of(lane.chunks.begin(), lane.chunks.end(),
                                      [](const Chunk& chunk) { return chunk.scatter; });
    plan.device(ordinal).scratch_bytes = scatters ? lane.slots * settings.chunk_bytes : 0;
  }
  return schedule;
}

}  // namespace weightlift::engine
