#include "engine/sources.h"

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <numeric>
#include <utility>
#include <vector>

#include "engine/io_path.h"
#include "engine/order_of_use.h"
#include "engine/plan.h"
#include "engine/schedule.h"
#include "engine/scratch.h"
#include "engine/settings.h"
#include "io/anonymous_memory.h"
#include "io/file.h"
#include "io/leased_mapping.h"
#include "io/machine.h"
#include "io/residency.h"
#include "result.h"

namespace weightlift::engine {
namespace {

// Bytes of one MADV_POPULATE_READ.
constexpr std::uint64_t kPopulateStep = std::uint64_t{64} << 20;
// The same for a plan with ranks, whose callers wait for parts.
constexpr std::uint64_t kAwaitedStep = std::uint64_t{16} << 20;
// Mapped tensors with smaller gaps are populated together.
constexpr std::uint64_t kPopulateGap = 64 << 10;
// For a smaller file, a mapping and its lease cost more than they save.
constexpr std::uint64_t kLeaseBytes = 4 << 20;

// The bytes of a file that are needed, and where they lie.
struct Extent {
  std::uint64_t begin = ~std::uint64_t{0};
  std::uint64_t end = 0;
  std::uint64_t bytes = 0;

  void add(std::uint64_t from, std::uint64_t to, std::uint64_t needed) {
    begin = std::min(begin, from);
    end = std::max(end, to);
    bytes += needed;
  }
  // Whether a read that goes on behind a part mostly reads what is needed anyway.
  [[nodiscard]] bool is_dense() const noexcept { return bytes != 0 && bytes >= (end - begin) / 2; }
};

}  // namespace

Sources::Sources(const LoadPlan& plan, const Settings& settings, ReadPage read_page)
    : plan_(plan), read_page_(std::move(read_page)) {
  choose_routes(settings);
  plan_populate(settings);
}

void Sources::choose_routes(const Settings& settings) {
  std::vector<Extent> extents(plan_.files.size());
  for (const Copy& copy : plan_.copies) {
    if (copy.file == kFromMemory) continue;
    const auto [begin, end] = plan_.source_range(copy);
    extents[copy.file].add(begin, end, plan_.source_bytes(copy));
  }
  for (std::size_t i = 0; i < plan_.files.size(); ++i) {
    Source& source = files_.emplace_back();
    if (extents[i].bytes == 0) {
      source.choice = {.route = IoRoute::kMapped, .reason = "same dtype on the CPU"};
      continue;
    }
    source.choice =
        choose_io(*plan_.files[i], extents[i].begin, extents[i].end, extents[i].bytes, settings);
    if (source.choice.route == IoRoute::kDirect) {
      auto direct = io::DirectFile::open(plan_.files[i]);
      if (direct.ok()) {
        source.direct = *std::move(direct);
      } else {
        source.refusal = direct.error().message;
        source.choice.route = IoRoute::kBuffered;
      }
    }
    if (source.choice.route == IoRoute::kBuffered) plan_.files[i]->advise_sequential();
    source.may_lease = source.choice.route == IoRoute::kPageCache &&
                       settings.io_path == IoPath::kAuto && extents[i].bytes >= kLeaseBytes;
  }
}

// The ranges of the mapped tensors by file and offset, or by batch if the plan has ranks. Tensors
// that lie close together share a range.
std::vector<PopulateStep> Sources::mapped_ranges() const {
  std::vector<Mapped> parts = plan_.mapped;
  std::vector<std::uint32_t> batches;
  if (!plan_.ranks.empty()) batches = batches_of_use(plan_);
  std::sort(parts.begin(), parts.end(), [&batches](const Mapped& a, const Mapped& b) {
    if (!batches.empty() && batches[a.name] != batches[b.name]) {
      return batches[a.name] < batches[b.name];
    }
    return a.file != b.file ? a.file < b.file : a.offset < b.offset;
  });
  std::vector<PopulateStep> ranges;
  for (const Mapped& part : parts) {
    if (part.bytes == 0) continue;
    if (!ranges.empty() && ranges.back().file == part.file && part.offset >= ranges.back().offset &&
        part.offset <= ranges.back().offset + ranges.back().bytes + kPopulateGap) {
      ranges.back().bytes =
          std::max(ranges.back().bytes, part.offset + part.bytes - ranges.back().offset);
      ranges.back().payload += part.bytes;
    } else {
      ranges.push_back({part.file, part.name, part.offset, part.bytes, part.bytes});
    }
  }
  return ranges;
}

// Adds `text` once for each file, and only if the file is not read: else the reason explains the
// reads.
void Sources::note(const std::vector<PopulateStep>& ranges, const char* text) {
  for (const PopulateStep& range : ranges) {
    IoChoice& choice = files_[range.file].choice;
    if (choice.route == IoRoute::kMapped && choice.reason.find(text) == std::string::npos) {
      choice.reason += text;
    }
  }
}

void Sources::plan_populate(const Settings& settings) {
  const std::vector<PopulateStep> ranges = mapped_ranges();
  if (!plan_.populate) {
    note(ranges, "; read at the first touch, as asked");
    return;
  }
  // Resident pages cost one minor fault each, now or later, so only missing ranges are populated.
  std::vector<PopulateStep> missing;
  std::uint64_t missing_bytes = 0;
  for (const PopulateStep& range : ranges) {
    const auto share =
        io::resident_share(*plan_.files[range.file], range.offset, range.bytes).share;
    if (share && *share >= 1) continue;
    missing.push_back(range);
    missing_bytes += range.bytes;
  }
  if (missing.empty()) {
    note(ranges, ", resident");
    return;
  }
  if (missing_bytes > io::memory_headroom() / 2) {
    note(missing, ", larger than half of the available memory: read at the first touch");
    return;
  }
  note(missing, ", populated in order");
  std::vector<Extent> extents(plan_.files.size());
  for (const PopulateStep& range : missing) {
    extents[range.file].add(range.offset, range.offset + range.bytes, range.bytes);
  }
  const std::uint64_t step = plan_.ranks.empty() ? kPopulateStep : kAwaitedStep;
  for (const PopulateStep& range : missing) {
    if (!std::exchange(files_[range.file].is_populated, true)) {
      plan_.files[range.file]->advise_sequential();
      plan_.mappings[range.file]->read_forwards(true);
      // Reads in the order of the file grow on their own.
      if (!plan_.ranks.empty() && settings.huge_pages != HugePages::kNever &&
          extents[range.file].is_dense()) {
        plan_.mappings[range.file]->read_in_large_folios(true);
        files_[range.file].watches_folios = settings.huge_pages == HugePages::kAuto;
      }
    }
    // Gaps are read and not counted. Bytes that several tensors share are read once; the rest was
    // counted at the start.
    std::uint64_t payload = std::min(range.payload, range.bytes);
    for (std::uint64_t at = 0; at < range.bytes; at += step) {
      const std::uint64_t bytes = std::min(step, range.bytes - at);
      const std::uint64_t counted = std::min(bytes, payload);
      payload -= counted;
      steps_.push_back({range.file, range.name, range.offset + at, bytes, counted});
    }
  }
}

std::vector<std::uint32_t> Sources::steps_by_name() const {
  std::vector<std::uint32_t> counts(plan_.names.size());
  std::vector<std::uint32_t> order(steps_.size());
  std::iota(order.begin(), order.end(), 0U);
  const auto before = [this](std::uint32_t a, std::uint32_t b) {
    const PopulateStep& x = steps_[a];
    const PopulateStep& y = steps_[b];
    return x.file != y.file ? x.file < y.file : x.offset < y.offset;
  };
  std::sort(order.begin(), order.end(), before);
  for (const Mapped& part : plan_.mapped) {
    const std::uint64_t end = part.offset + part.bytes;
    auto step = std::upper_bound(
        order.begin(), order.end(), part.file, [&](std::uint32_t file, std::uint32_t index) {
          const PopulateStep& other = steps_[index];
          return file != other.file ? file < other.file : end <= other.offset;
        });
    // Goes backwards over the steps that begin before its end. No step is longer than
    // kPopulateStep.
    while (step != order.begin()) {
      const PopulateStep& other = steps_[*--step];
      if (other.file != part.file || other.offset + kPopulateStep <= part.offset) break;
      if (other.offset + other.bytes > part.offset && part.bytes != 0) {
        counts[part.name] = std::max(counts[part.name], *step + 1);
      }
    }
  }
  return counts;
}

bool Sources::cold() const noexcept {
  return std::any_of(files_.begin(), files_.end(),
                     [](const Source& source) { return source.choice.cold; });
}

bool Sources::reads_directly() const noexcept {
  return std::any_of(files_.begin(), files_.end(),
                     [](const Source& source) { return source.direct != nullptr; });
}

bool Sources::reads_directly(std::uint32_t file) const noexcept {
  return files_[file].direct != nullptr && !files_[file].direct_refused.load();
}

void Sources::watch_large_folios(const PopulateStep& step) {
  // A touch of the mapping would raise SIGBUS if the file has shrunk.
  const ReadPage read = [&](std::uint64_t offset) {
    std::byte byte{};
    return plan_.files[step.file]->read_exact(offset, {&byte, 1}).ok();
  };
  const bool is_slow = pages_arrive_slowly(read_page_ ? read_page_ : read, step.offset, step.bytes);
  // One slow step may be chance, or a hole in memory that is backed.
  if (!std::exchange(files_[step.file].was_slow, is_slow) || !is_slow) return;
  plan_.mappings[step.file]->read_in_large_folios(false);
  files_[step.file].watches_folios = false;
  files_[step.file].choice.reason +=
      ", from some part on in small folios: the machine's host has not backed its free memory";
}

Status Sources::populate(const PopulateStep& step) {
  auto populated = plan_.mappings[step.file]->populate(step.offset, step.bytes);
  if (populated.ok()) {
    if (*populated && files_[step.file].watches_folios) watch_large_folios(step);
    return {};
  }
  if (step.name < plan_.names.size()) populated.error().tensor = plan_.names[step.name];
  return populated.error();
}

Status Sources::read(const Unit& unit, std::byte* target, Scratch& scratch) {
  return read_to(unit, target, scratch).status();
}

io::LeasedMapping::Hold Sources::hold(const Unit& unit) {
  Source& source = files_[unit.file];
  if (!source.may_lease) return {};
  std::call_once(source.asked_for_lease, [&] {
    source.leased = io::LeasedMapping::open(plan_.files[unit.file]);
    if (source.leased != nullptr) source.choice.reason += ", used where it lies";
  });
  if (source.leased == nullptr) return {};
  return source.leased->hold(unit.begin, unit.end - unit.begin);
}

Result<Sources::Bytes> Sources::bytes(const Unit& unit, bool is_cast, Scratch& scratch) {
  // Without a cast, read(2) is the copy that is needed anyway, and maps no pages.
  if (is_cast) {
    auto held = hold(unit);
    if (held.data() != nullptr) return Bytes{held.data(), std::move(held)};
  }
  WL_ASSIGN_OR_RETURN(const std::byte* const data, read_to(unit, nullptr, scratch));
  return Bytes{data, {}};
}

// Reads to `target`, or into `scratch` if that is null. Returns the address.
Result<const std::byte*> Sources::read_to(const Unit& unit, std::byte* target, Scratch& scratch) {
  const io::File& file = *plan_.files[unit.file];
  Source& source = files_[unit.file];
  const std::uint64_t bytes = unit.end - unit.begin;
  if (source.direct != nullptr && !source.direct_refused.load()) {
    const std::uint64_t alignment = source.direct->alignment();
    const std::uint64_t begin = unit.begin / alignment * alignment;
    const std::uint64_t end = (unit.end + alignment - 1) / alignment * alignment;
    const std::uint64_t lead = unit.begin - begin;
    // A staging slot has space up to the end of the page; a tensor's memory has not.
    const bool in_place = target != nullptr && unit.raw && alignment <= io::kPageBytes;
    std::byte* window = target != nullptr ? target - (in_place ? lead : 0) : nullptr;
    if (!in_place) {
      WL_ASSIGN_OR_RETURN(window, scratch.for_direct_read(end - begin + io::kPageBytes));
    }
    Status status = source.direct->read(begin, {window, end - begin}, unit.end - begin);
    if (status.ok()) {
      if (target != nullptr && !in_place) std::copy_n(window + lead, bytes, target);
      return target != nullptr ? target : window + lead;
    }
    if (status.error().system_errno != EINVAL && status.error().system_errno != EOPNOTSUPP) {
      return status.error();
    }
    if (!source.direct_refused.exchange(true)) source.refusal = status.error().message;
  }
  if (target == nullptr) {
    WL_ASSIGN_OR_RETURN(target, scratch.bytes(bytes));
  }
  WL_RETURN_IF_ERROR(file.read_exact(unit.begin, {target, bytes}));
  return target;
}

void Sources::release() noexcept {
  for (std::size_t i = 0; i < files_.size(); ++i) {
    files_[i].leased.reset();
    if (std::exchange(files_[i].is_populated, false)) plan_.mappings[i]->read_forwards(false);
  }
}

IoRoute Sources::route(std::size_t file) const noexcept {
  const Source& source = files_[file];
  return source.direct_refused.load() ? IoRoute::kBuffered : source.choice.route;
}

std::vector<std::string> Sources::fallbacks() const {
  std::vector<std::string> result;
  for (std::size_t i = 0; i < files_.size(); ++i) {
    if (!files_[i].refusal.empty()) {
      result.push_back(plan_.files[i]->path() + ": " + files_[i].refusal +
                       "; read through the page cache");
    }
  }
  return result;
}

}  // namespace weightlift::engine
