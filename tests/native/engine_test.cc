// The engine against the simulated driver, judged by general oracles: random plans under random
// schedules, and afterwards bytes, bounds, violations, the ledger, reports, threads and descriptors
// must be right, whatever the plan was and whatever failed.
//
// WEIGHTLIFT_SEEDS says how many seeds to try, WEIGHTLIFT_SEED runs one. With one reader thread the
// schedule of a seed replays but for the lanes' own threads.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <new>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#include "convert/cast.h"
#include "device/context.h"
#include "device/staging.h"
#include "engine/host_layout.h"
#include "engine/host_memory.h"
#include "engine/load.h"
#include "io/anonymous_memory.h"
#include "io/mapping.h"
#include "io/residency.h"
#include "simulated.h"

namespace {

// Whether an allocation of the C++ library's is to fail, as it does where memory has run out.
struct Memory {
  std::atomic<bool> watched = false;
  std::atomic<std::int64_t> left = 0;  // until the one that fails
  std::atomic<bool> for_good = false;  // and with it all after it
  std::atomic<std::int64_t> held = 0;  // blocks

  bool refuses() noexcept {
    if (!watched.load(std::memory_order_relaxed)) return false;
    const std::int64_t now = left.fetch_sub(1);
    return now == 1 || (now < 1 && for_good);
  }
} memory;

}  // namespace

// Not inlined, or GCC takes free() for a mistake.
[[gnu::noinline]] void* operator new(std::size_t bytes) {
  void* const block = memory.refuses() ? nullptr : std::malloc(std::max<std::size_t>(bytes, 1));
  if (block == nullptr) throw std::bad_alloc();
  ++memory.held;
  return block;
}
[[gnu::noinline]] void operator delete(void* block) noexcept {
  if (block == nullptr) return;
  --memory.held;
  std::free(block);
}
void operator delete(void* block, std::size_t /*bytes*/) noexcept {
  operator delete(block);
}
// The library's own would do, but a sanitizer brings one that does not come by the above.
void* operator new(std::size_t bytes, const std::nothrow_t& /*tag*/) noexcept {
  try {
    return operator new(bytes);
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}

namespace weightlift::engine {
namespace {

using simulation::Machine;
using simulation::sim;
using std::chrono::milliseconds;

constexpr std::size_t kKiB = 1024;
constexpr std::size_t kMiB = 1024 * kKiB;
// Nothing here takes so long: beyond it, a load hangs.
constexpr std::chrono::seconds kHung{30};
constexpr int kUnknownError = 999;

// --- Chance ------------------------------------------------------------------------------------

// splitmix64: the standard's distributions differ from library to library, seeds must not.
class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed * 0x9E3779B97F4A7C15U + 1) {}

  std::uint64_t next() {
    std::uint64_t z = (state_ += 0x9E3779B97F4A7C15U);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9U;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBU;
    return z ^ (z >> 31);
  }
  std::uint64_t below(std::uint64_t bound) { return bound == 0 ? 0 : next() % bound; }
  std::uint64_t between(std::uint64_t low, std::uint64_t high) {
    return low + below(high - low + 1);
  }
  bool chance(unsigned percent) { return below(100) < percent; }
  template <class T>
  T pick(std::initializer_list<T> choices) {
    return choices.begin()[below(choices.size())];
  }
  // As often tiny as huge.
  std::uint64_t spread(std::uint64_t high) {
    std::uint64_t bits = 0;
    while ((high >> bits) > 1) ++bits;
    return std::min(high, below(std::uint64_t{2} << below(bits + 1)));
  }

 private:
  std::uint64_t state_;
};

// Bytes that differ everywhere, so that a shifted copy is a wrong one.
const std::vector<std::byte>& noise() {
  static const std::vector<std::byte> bytes = [] {
    std::vector<std::byte> made(8 * kMiB);
    Random random(0xB0B);
    for (std::size_t i = 0; i + 8 <= made.size(); i += 8) {
      const std::uint64_t word = random.next();
      std::memcpy(&made[i], &word, sizeof word);
    }
    return made;
  }();
  return bytes;
}

std::vector<std::byte> some_noise(Random& random, std::uint64_t bytes) {
  const auto from =
      noise().begin() + static_cast<std::ptrdiff_t>(random.below(noise().size() - bytes + 1));
  return {from, from + static_cast<std::ptrdiff_t>(bytes)};
}

// --- Files -------------------------------------------------------------------------------------

// Gone when the process ends; each test removes what it writes before that.
const std::string& folder() {
  struct Folder {
    std::string path = ::testing::TempDir() + "weightlift_engine_XXXXXX";
    Folder() {
      if (::mkdtemp(path.data()) == nullptr) std::abort();
    }
    Folder(const Folder&) = delete;
    Folder& operator=(const Folder&) = delete;
    ~Folder() { ::rmdir(path.c_str()); }
  };
  static const Folder instance;
  return instance.path;
}

class TestFile {
 public:
  explicit TestFile(std::vector<std::byte> bytes) : bytes_(std::move(bytes)) {
    static int number = 0;
    path_ = folder() + "/" + std::to_string(++number);
    const int fd = ::open(path_.c_str(), O_CREAT | O_TRUNC | O_WRONLY | O_CLOEXEC, 0600);
    std::size_t done = 0;
    while (fd >= 0 && done < bytes_.size()) {
      const ssize_t wrote = ::write(fd, bytes_.data() + done, bytes_.size() - done);
      if (wrote <= 0) break;
      done += static_cast<std::size_t>(wrote);
    }
    if (fd < 0 || done != bytes_.size()) {
      std::perror(path_.c_str());
      std::abort();
    }
    ::close(fd);
  }
  TestFile(TestFile&& other) noexcept
      : path_(std::exchange(other.path_, {})), bytes_(std::move(other.bytes_)) {}
  TestFile& operator=(TestFile&&) = delete;
  ~TestFile() {
    if (!path_.empty()) ::unlink(path_.c_str());
  }

  [[nodiscard]] const std::string& path() const { return path_; }
  [[nodiscard]] const std::vector<std::byte>& bytes() const { return bytes_; }
  [[nodiscard]] std::shared_ptr<io::File> open() const {
    auto file = io::File::open(path_);
    if (!file.ok()) std::abort();
    return *std::move(file);
  }

 private:
  std::string path_;
  std::vector<std::byte> bytes_;
};

// --- What must come out ------------------------------------------------------------------------

std::uint64_t address_of(const std::byte* data) {
  return reinterpret_cast<std::uintptr_t>(data);
}

// Elements one by one, from the plain meaning of a copy: rows where both sides are contiguous.
void expect_copy(const std::byte* source, std::byte* target, std::uint8_t* written, Dtype from,
                 Dtype to, std::span<const Dimension> dimensions, const convert::Fp8Rules& fp8) {
  const std::uint64_t source_item = dtype_bytes(from);
  const std::uint64_t target_item = dtype_bytes(to);
  const auto row = [&](const std::byte* in, std::byte* out, std::uint64_t count) {
    if (from == to) {
      std::memcpy(out, in, count * source_item);
    } else {
      convert::host_cast_for(convert::Isa::kBaseline, *convert::float_format(from),
                             *convert::float_format(to))(in, out, count, fp8);
    }
    std::memset(written + (out - target), 1, count * target_item);
  };
  if (dimensions.empty()) {
    row(source, target, 1);
    return;
  }
  std::vector<std::uint64_t> index(dimensions.size(), 0);
  const Dimension& inner = dimensions.back();
  const bool rows = inner.source_stride == static_cast<std::int64_t>(source_item) &&
                    inner.target_stride == static_cast<std::int64_t>(target_item);
  while (true) {
    std::int64_t in = 0;
    std::int64_t out = 0;
    for (std::size_t i = 0; i < dimensions.size(); ++i) {
      in += static_cast<std::int64_t>(index[i]) * dimensions[i].source_stride;
      out += static_cast<std::int64_t>(index[i]) * dimensions[i].target_stride;
    }
    row(source + in, target + out, rows ? inner.extent : 1);
    std::size_t level = dimensions.size() - (rows ? 1 : 0);
    while (level > 0 && ++index[level - 1] == dimensions[level - 1].extent) index[--level] = 0;
    if (level == 0) return;
  }
}

// Memory that targets are cut out of, with what it must hold in the end: between the targets, what
// it held before.
struct Block {
  int device = kHostDevice;
  std::uint64_t address = 0;
  std::vector<std::byte> memory;  // the host's
  std::vector<std::byte> expected;
  std::vector<std::uint8_t> written;  // 1 where a target lies
  std::uint64_t used = 0;
};

// Where the bytes of copies come from.
struct Origin {
  std::uint32_t file = kFromMemory;
  const std::vector<std::byte>* bytes = nullptr;
};

// A plan, what it must do, and the devices that it is for. One Machine must be on.
class Scenario {
 public:
  Scenario(std::uint64_t seed, int devices) : random(seed), devices_(devices) {
    for (int i = 0; i < devices; ++i) {
      streams_.push_back(random.chance(60) ? sim().sim_stream_create(i) : 0);
    }
  }
  Scenario(const Scenario&) = delete;
  Scenario& operator=(const Scenario&) = delete;
  ~Scenario() {
    free_blocks();
    for (const std::uint64_t stream : streams_) {
      if (stream != 0) sim().sim_stream_destroy(stream);
    }
  }

  Random random;
  Settings settings;
  LoadPlan plan;
  std::deque<TestFile> files;

  Origin add_file(std::uint64_t bytes) {
    files.emplace_back(some_noise(random, bytes));
    const std::uint32_t index = plan.add_file(files.back().open());
    return {.file = index, .bytes = &files.back().bytes()};
  }
  Origin add_memory(std::uint64_t bytes) {
    memories_.push_back(some_noise(random, bytes));
    return {.bytes = &memories_.back()};
  }

  // A contiguous copy; the target lies `gap` bytes behind the one before.
  void add(const Origin& origin, std::uint64_t offset, std::uint64_t elements, Dtype from, Dtype to,
           int device, std::uint64_t gap) {
    const std::uint64_t bytes = elements * dtype_bytes(to);
    auto [block, at] = place(device, bytes, gap);
    Copy copy = start(origin, offset, from, to, device);
    copy.target = block->address + at;
    copy.elements = elements;
    plan.add_copy(copy);
    const std::array<Dimension, 1> row = {Dimension{elements,
                                                    static_cast<std::int64_t>(dtype_bytes(from)),
                                                    static_cast<std::int64_t>(dtype_bytes(to))}};
    finish(*block, at, origin, offset, from, to, row, elements);
  }

  // A strided copy; for devices with contiguous targets in the source's order.
  void add_strided(const Origin& origin, std::uint64_t offset, Dtype from, Dtype to,
                   std::vector<Dimension> dimensions, int device, std::uint64_t gap) {
    std::int64_t low = 0;
    std::int64_t high = static_cast<std::int64_t>(dtype_bytes(to));
    std::uint64_t elements = 1;
    for (const Dimension& dimension : dimensions) {
      elements *= dimension.extent;
      const std::int64_t reach =
          (static_cast<std::int64_t>(dimension.extent) - 1) * dimension.target_stride;
      low += std::min<std::int64_t>(reach, 0);
      high += std::max<std::int64_t>(reach, 0);
    }
    if (elements == 0) low = high = 0;
    auto [block, start_at] = place(device, static_cast<std::uint64_t>(high - low), gap);
    const std::uint64_t at = start_at + static_cast<std::uint64_t>(-low);
    Copy copy = start(origin, offset, from, to, device);
    copy.target = block->address + at;
    finish(*block, at, origin, offset, from, to, dimensions, elements);
    if (random.chance(30)) {  // the order in which they are named must not matter
      for (std::size_t i = dimensions.size(); i > 1; --i) {
        std::swap(dimensions[i - 1], dimensions[random.below(i)]);
      }
    }
    plan.add_strided(copy, dimensions);
  }

  void add_mapped(const Origin& origin, std::uint64_t offset, std::uint64_t bytes) {
    if (plan.mappings[origin.file] == nullptr) {
      auto mapping = io::Mapping::map(plan.files[origin.file]);
      if (!mapping.ok()) std::abort();
      plan.mappings[origin.file] = *std::move(mapping);
    }
    plan.mapped.push_back({.file = origin.file, .offset = offset, .bytes = bytes, .name = name()});
    mapped_bytes_ += bytes;
    file_bytes_[origin.file] += bytes;
  }

  // A run of the plan. Hands the devices' memory to the engine as torch's allocator would, perhaps
  // with the previous owner's kernel still queued on the allocating stream.
  [[nodiscard]] std::unique_ptr<Load> prepare(std::string* why = nullptr) {
    name_streams();
    auto load = Load::prepare(plan, settings);
    if (!load.ok()) {
      if (why != nullptr) *why = load.error().describe();
      return nullptr;
    }
    give_scratch(**load);
    return *std::move(load);
  }
  void name_streams() {
    for (int device = 0; device < devices_; ++device) {
      if (!uses(device)) continue;
      plan.device(device).stream = streams_[static_cast<std::size_t>(device)];
    }
  }
  void give_scratch(Load& load) {
    free_scratch();
    for (DeviceNeeds& needs : load.plan().devices) {
      EXPECT_LE(needs.scratch_bytes, settings.resolved().pinned_bytes);
      if (needs.scratch_bytes == 0) continue;
      needs.scratch = sim().sim_alloc(needs.device, needs.scratch_bytes);
      scratch_.emplace_back(needs.device, needs.scratch);
      if (random.chance(50)) {
        sim().sim_pending_write(needs.device, needs.stream, needs.scratch, needs.scratch_bytes);
      }
    }
  }

  // Queued writes of whoever had the targets before: only what the engine orders itself after is
  // safe from them.
  void queue_pending_writes() {
    for (Block& block : blocks_) {
      if (block.device == kHostDevice || !random.chance(70)) continue;
      std::fill(block.expected.begin(), block.expected.end(), std::byte{0xEE});
      sim().sim_pending_write(block.device, streams_[static_cast<std::size_t>(block.device)],
                              block.address, block.expected.size());
    }
    for (const Expectation& each : expectations_) fulfil(each);
  }

  // After a load that succeeded.
  void expect_everything(const Load& load, const Report& report, const std::string& what) {
    for (const Block& block : blocks_) check_targets(block, what);
    check_rest(what);
    for (const Mapped& part : plan.mapped) {
      const std::byte* const given = plan.mappings[part.file]->data() + part.offset;
      EXPECT_EQ(0, std::memcmp(given, &files[part.file].bytes()[part.offset], part.bytes)) << what;
    }
    const Progress progress = load.progress();
    EXPECT_EQ(progress.done, progress.total) << what;
    EXPECT_EQ(progress.total, report.bytes) << what;
    std::uint64_t total = mapped_bytes_;
    std::vector<std::uint64_t> by_device(static_cast<std::size_t>(devices_) + 1);
    by_device[0] = mapped_bytes_;
    for (const auto& [device, bytes] : device_bytes_) {
      by_device[static_cast<std::size_t>(device + 1)] += bytes;
      total += bytes;
    }
    EXPECT_EQ(report.bytes, total) << what;
    EXPECT_EQ(report.mapped_bytes, mapped_bytes_) << what;
    for (const DeviceReport& device : report.devices) {
      EXPECT_EQ(device.bytes, by_device[static_cast<std::size_t>(device.device + 1)]) << what;
      by_device[static_cast<std::size_t>(device.device + 1)] = 0;
    }
    for (const std::uint64_t left : by_device) EXPECT_EQ(left, 0U) << what << ": unreported device";
    ASSERT_EQ(report.files.size(), plan.files.size()) << what;
    for (std::size_t i = 0; i < plan.files.size(); ++i) {
      EXPECT_EQ(report.files[i].bytes, file_bytes_[i]) << what;
      EXPECT_FALSE(report.files[i].route.empty()) << what;
    }
    EXPECT_LE(read_at_least(), report.read_bytes) << what;
  }

  // After any load: what is outside the targets is as before, nothing is on its way to them.
  void expect_no_traces(const std::string& what) { check_rest(what); }

  // Frees in the allocating stream's order, which is a violation if anything still uses the memory.
  void free_blocks() {
    free_scratch();
    for (Block& block : blocks_) {
      if (block.device == kHostDevice || block.address == 0) continue;
      if (random.chance(50)) {
        sim().sim_free_on(block.device, streams_[static_cast<std::size_t>(block.device)],
                          block.address);
      } else {
        sim().sim_synchronize(block.device);
        sim().sim_free(block.address);
      }
      block.address = 0;
    }
  }
  void free_scratch() {
    for (const auto& [device, address] : scratch_) {
      sim().sim_free_on(device, streams_[static_cast<std::size_t>(device)], address);
    }
    scratch_.clear();
  }

  [[nodiscard]] bool uses(int device) const {
    return std::any_of(plan.copies.begin(), plan.copies.end(),
                       [&](const Copy& copy) { return copy.device == device; });
  }
  [[nodiscard]] std::uint64_t pinned_bound() const {
    std::uint64_t lanes = 0;
    for (int device = 0; device < devices_; ++device) lanes += uses(device) ? 1 : 0;
    return lanes * settings.resolved().pinned_bytes;
  }

 private:
  struct Expectation {
    std::size_t block = 0;
    std::uint64_t at = 0;
    const std::byte* source = nullptr;
    Dtype from = Dtype::kU8;
    Dtype to = Dtype::kU8;
    std::vector<Dimension> dimensions;
  };

  std::uint32_t name() {
    names_.push_back("tensor " + std::to_string(names_.size()));
    return plan.add_name(names_.back());
  }

  Copy start(const Origin& origin, std::uint64_t offset, Dtype from, Dtype to, int device) {
    return {
        .file = origin.file,
        .device = device,
        .source = origin.file == kFromMemory ? address_of(origin.bytes->data()) + offset : offset,
        .source_dtype = from,
        .target_dtype = to,
        .name = name()};
  }

  std::pair<Block*, std::uint64_t> place(int device, std::uint64_t bytes, std::uint64_t gap) {
    for (Block& block : blocks_) {
      if (block.device == device && block.used + gap + bytes <= block.expected.size()) {
        const std::uint64_t at = block.used + gap;
        block.used = at + bytes;
        return {&block, at};
      }
    }
    Block& block = blocks_.emplace_back();
    const std::uint64_t size = gap + bytes + random.spread(512 * kKiB) + 64;
    block.device = device;
    block.written.resize(size);
    if (device == kHostDevice) {
      block.memory.resize(size, std::byte{0xA5});
      block.address = address_of(block.memory.data());
      block.expected = block.memory;
    } else {
      block.address = sim().sim_alloc(device, size);
      block.expected.resize(size, std::byte{0xCD});
    }
    block.used = gap + bytes;
    return {&block, gap};
  }

  void finish(const Block& block, std::uint64_t at, const Origin& origin, std::uint64_t offset,
              Dtype from, Dtype to, std::span<const Dimension> dimensions, std::uint64_t elements) {
    if (elements == 0) return;
    std::size_t index = 0;
    while (&blocks_[index] != &block) ++index;
    expectations_.push_back({.block = index,
                             .at = at,
                             .source = origin.bytes->data() + offset,
                             .from = from,
                             .to = to,
                             .dimensions = {dimensions.begin(), dimensions.end()}});
    fulfil(expectations_.back());
    const std::uint64_t bytes = elements * dtype_bytes(from);
    device_bytes_.emplace_back(block.device, bytes);
    if (origin.file == kFromMemory) return;
    file_bytes_[origin.file] += bytes;
    if (dimensions.size() == 1 &&
        dimensions[0].source_stride == static_cast<std::int64_t>(dtype_bytes(from))) {
      read_.push_back({origin.file, offset, offset + bytes});
    }
  }

  void fulfil(const Expectation& each) {
    Block& block = blocks_[each.block];
    expect_copy(each.source, &block.expected[each.at], &block.written[each.at], each.from, each.to,
                each.dimensions, settings.fp8);
  }

  // Bytes of files that must have been read once at least.
  [[nodiscard]] std::uint64_t read_at_least() {
    std::sort(read_.begin(), read_.end());
    std::uint64_t total = 0;
    std::uint32_t file = kFromMemory;
    std::uint64_t end = 0;
    for (const auto& [of, from, to] : read_) {
      if (of != file) end = 0;
      file = of;
      if (to > end) total += to - std::max(from, end);
      end = std::max(end, to);
    }
    return total;
  }

  // The host reads targets without further waiting: that the copies have arrived must be known.
  static void check_targets(const Block& block, const std::string& what) {
    std::vector<std::byte> got(block.device == kHostDevice ? 0 : block.expected.size());
    std::size_t at = 0;
    while (at < block.written.size()) {
      if (block.written[at] == 0) {
        const void* const next = std::memchr(&block.written[at], 1, block.written.size() - at);
        if (next == nullptr) break;
        at =
            static_cast<std::size_t>(static_cast<const std::uint8_t*>(next) - block.written.data());
      }
      const void* const stop = std::memchr(&block.written[at], 0, block.written.size() - at);
      const std::size_t end =
          stop == nullptr ? block.written.size()
                          : static_cast<std::size_t>(static_cast<const std::uint8_t*>(stop) -
                                                     block.written.data());
      const std::byte* bytes = block.memory.data() + at;
      if (block.device != kHostDevice) {
        sim().sim_read_device(block.address + at, &got[at], end - at);
        bytes = &got[at];
      }
      if (std::memcmp(bytes, &block.expected[at], end - at) != 0) {
        std::size_t first = 0;
        while (bytes[first] == block.expected[at + first]) ++first;
        ADD_FAILURE() << what << ": bytes differ on device " << block.device << " at byte "
                      << at + first << " of a block of " << block.expected.size() << ": "
                      << std::to_integer<int>(bytes[first]) << " instead of "
                      << std::to_integer<int>(block.expected[at + first]);
        return;
      }
      at = end;
    }
  }

  // Bytes outside of targets, after all that is queued has run.
  void check_rest(const std::string& what) {
    for (int device = 0; device < devices_; ++device) sim().sim_synchronize(device);
    sim().sim_drain();
    for (const Block& block : blocks_) {
      std::vector<std::byte> got;
      const std::byte* bytes = block.memory.data();
      if (block.device != kHostDevice) {
        got.resize(block.expected.size());
        sim().sim_read_device(block.address, got.data(), got.size());
        bytes = got.data();
      }
      for (std::size_t i = 0; i < block.expected.size(); ++i) {
        if (block.written[i] != 0 || bytes[i] == block.expected[i]) continue;
        ADD_FAILURE() << what << ": bytes outside of targets differ on device " << block.device
                      << " at byte " << i << " of a block of " << block.expected.size();
        return;
      }
    }
  }

  int devices_;
  std::vector<std::uint64_t> streams_;
  std::deque<std::vector<std::byte>> memories_;
  std::deque<std::string> names_;
  std::deque<Block> blocks_;
  std::vector<Expectation> expectations_;
  std::vector<std::pair<int, std::uint64_t>> scratch_;
  std::vector<std::pair<int, std::uint64_t>> device_bytes_;
  std::array<std::uint64_t, 8> file_bytes_{};
  std::vector<std::tuple<std::uint32_t, std::uint64_t, std::uint64_t>> read_;
  std::uint64_t mapped_bytes_ = 0;
};

// --- Random plans ------------------------------------------------------------------------------

constexpr std::array kFloats = {Dtype::kF64, Dtype::kF32,    Dtype::kBf16,
                                Dtype::kF16, Dtype::kF8E4M3, Dtype::kF8E5M2};

Dtype random_float(Random& random) {
  return kFloats[random.below(kFloats.size())];
}

Settings random_settings(Random& random) {
  Settings settings;
  settings.threads = static_cast<unsigned>(random.between(1, 4));
  settings.io_depth = static_cast<unsigned>(random.between(1, 4));
  settings.read_bytes = random.pick<std::size_t>({64 * kKiB, 64 * kKiB, 128 * kKiB});
  settings.chunk_bytes = random.pick<std::size_t>({256 * kKiB, 256 * kKiB, 512 * kKiB, kMiB});
  settings.pinned_bytes = settings.chunk_bytes * random.between(1, 4);
  settings.io_path =
      random.chance(12) ? IoPath::kDirect : random.pick({IoPath::kAuto, IoPath::kBuffered});
  settings.cast_place = random.pick({CastPlace::kAuto, CastPlace::kHost, CastPlace::kDevice});
  settings.kernels = random.chance(75);
  settings.batch_copies = random.chance(70);
  settings.fp8 = {.e4m3_saturates = random.chance(50),
                  .e4m3_infinity_saturates = random.chance(50),
                  .e5m2_saturates = random.chance(50)};
  return settings;
}

class PlanMaker {
 public:
  PlanMaker(Scenario& scenario, int devices)
      : scenario_(scenario), random_(scenario.random), devices_(devices) {
    // All to one place, or spread.
    only_ = random_.chance(30) ? std::optional(any_device()) : std::nullopt;
    cast_percent_ = random_.pick({0U, 20U, 60U});
  }

  void make() {
    const std::uint64_t files = random_.between(1, 4);
    for (std::uint64_t i = 0; i < files; ++i) {
      // Large enough that slots are used again, small enough for many seeds.
      std::uint64_t bytes = random_.spread(512 * kKiB);
      if (random_.chance(40)) bytes = random_.between(256 * kKiB, 3 * kMiB);
      if (random_.chance(8)) bytes = 0;
      origins_.push_back(scenario_.add_file(bytes));
    }
    if (random_.chance(25)) origins_.push_back(scenario_.add_memory(random_.spread(512 * kKiB)));
    for (const Origin& origin : origins_) {
      switch (random_.below(3)) {
        case 0:
          checkpoint(origin);
          break;
        case 1:
          scattered(origin, random_.between(1, 20));
          break;
        default:
          checkpoint(origin);
          scattered(origin, random_.between(0, 5));
      }
      if (origin.file != kFromMemory && random_.chance(15)) map(origin);
    }
    scenario_.plan.populate = random_.chance(80);
  }

 private:
  int any_device() {
    return static_cast<int>(random_.below(static_cast<std::uint64_t>(devices_) + 1)) - 1;
  }
  int device() { return only_ ? *only_ : any_device(); }

  std::pair<Dtype, Dtype> dtypes() {
    if (random_.chance(cast_percent_)) {
      const Dtype from = random_float(random_);
      const Dtype to = random_float(random_);
      return {from, to};
    }
    const Dtype same = random_.pick(
        {Dtype::kU8, Dtype::kBf16, Dtype::kF16, Dtype::kF32, Dtype::kI64, Dtype::kC128});
    return {same, same};
  }

  std::uint64_t gap() { return random_.chance(50) ? 0 : random_.spread(600); }

  // Tensors one behind the other from an odd offset on, as files have them.
  void checkpoint(const Origin& origin) {
    const std::uint64_t size = origin.bytes->size();
    std::uint64_t at = std::min(size, random_.below(300));
    const std::uint64_t most = random_.pick<std::uint64_t>({40, 3000, 40'000, 2 * kMiB});
    const std::uint64_t limit = random_.chance(10) ? 2500 : 60;
    const int home = device();
    const bool scattered_targets = random_.chance(50);
    for (std::uint64_t i = 0; i < limit && at < size; ++i) {
      const auto [from, to] = dtypes();
      const std::uint64_t item = dtype_bytes(from);
      const std::uint64_t elements =
          std::min((size - at) / item, random_.chance(3) ? 0 : random_.below(most / item + 2));
      const int where = random_.chance(85) ? home : device();
      scenario_.add(origin, at, elements, from, to, where, scattered_targets ? gap() : 0);
      at += elements * item;
      if (random_.chance(8)) at += random_.spread(20'000);  // a tensor that nobody wants
    }
  }

  // Any ranges in any order: overlapping, twice the same, strided.
  void scattered(const Origin& origin, std::uint64_t count) {
    const std::uint64_t size = origin.bytes->size();
    std::uint64_t again = 0;
    for (std::uint64_t i = 0; i < count; ++i) {
      if (random_.chance(40)) {
        strided(origin);
        continue;
      }
      const auto [from, to] = dtypes();
      const std::uint64_t item = dtype_bytes(from);
      const std::uint64_t offset = random_.chance(15) ? again : random_.below(size + 1);
      if (offset > size) continue;
      again = offset;
      const std::uint64_t elements = std::min((size - offset) / item, random_.spread(256 * kKiB));
      scenario_.add(origin, offset, elements, from, to, device(), gap());
    }
  }

  // A slice of a tensor of up to three dimensions.
  void strided(const Origin& origin) {
    const auto [from, to] = dtypes();
    const std::uint64_t item = dtype_bytes(from);
    const std::uint64_t size = origin.bytes->size();
    const int where = device();
    const std::uint64_t rank = random_.between(1, 3);
    std::vector<Dimension> dimensions(rank);
    auto stride = static_cast<std::int64_t>(item);
    std::uint64_t span = item;
    std::uint64_t elements = 1;
    for (std::uint64_t i = rank; i > 0; --i) {
      Dimension& dimension = dimensions[i - 1];
      const std::uint64_t step = random_.chance(60) ? 1 : random_.between(2, 5);
      const std::uint64_t most =
          std::max<std::uint64_t>(1, 60'000 / std::max<std::uint64_t>(elements, 1));
      dimension.extent =
          random_.chance(2) ? 0 : random_.between(1, random_.pick({most, 70UL, 9UL}));
      dimension.extent = std::min(dimension.extent, most);
      dimension.source_stride = stride * static_cast<std::int64_t>(step);
      if (dimension.extent == 0) {
        elements = 0;
        continue;
      }
      const std::uint64_t reach =
          (dimension.extent - 1) * static_cast<std::uint64_t>(dimension.source_stride);
      if (span + reach > size) dimension.extent = 1;
      span += dimension.extent == 1 ? 0 : reach;
      elements *= dimension.extent;
      // What of this dimension is not wanted lies between the rows of the next outer one.
      stride = static_cast<std::int64_t>(
          (random_.chance(50) ? span + item - 1 : span + random_.spread(9000)) / item * item);
    }
    if (span > size) return;
    targets(dimensions, dtype_bytes(to), where);
    scenario_.add_strided(origin, random_.below(size - span + 1), from, to, dimensions, where,
                          gap());
  }

  // Contiguous in order; on the host also in other orders, backwards, and with room between rows.
  void targets(std::vector<Dimension>& dimensions, std::uint64_t item, int where) {
    std::vector<std::size_t> order(dimensions.size());
    for (std::size_t i = 0; i < order.size(); ++i) order[i] = i;
    const bool host = where == kHostDevice;
    if (host && random_.chance(40)) {
      for (std::size_t i = order.size(); i > 1; --i) {
        std::swap(order[i - 1], order[random_.below(i)]);
      }
    }
    auto stride = static_cast<std::int64_t>(item);
    for (std::size_t i = order.size(); i > 0; --i) {
      Dimension& dimension = dimensions[order[i - 1]];
      dimension.target_stride = host && random_.chance(30) ? -stride : stride;
      stride *= static_cast<std::int64_t>(std::max<std::uint64_t>(dimension.extent, 1));
      if (host && random_.chance(20)) stride += static_cast<std::int64_t>(random_.below(40));
    }
  }

  void map(const Origin& origin) {
    const std::uint64_t size = origin.bytes->size();
    if (size == 0) return;
    for (std::uint64_t i = random_.between(1, 4); i > 0; --i) {
      const std::uint64_t begin = random_.below(size);
      scenario_.add_mapped(origin, begin, random_.below(size - begin + 1));
    }
    if (random_.chance(40)) {  // cold: populating has something to do
      const int fd = ::open(scenario_.files[origin.file].path().c_str(), O_WRONLY | O_CLOEXEC);
      ::fdatasync(fd);
      ::close(fd);
      io::drop_from_page_cache(*scenario_.plan.files[origin.file]);
    }
  }

  Scenario& scenario_;
  Random& random_;
  int devices_;
  std::optional<int> only_;
  unsigned cast_percent_ = 0;
  std::deque<Origin> origins_;
};

// --- Runs --------------------------------------------------------------------------------------

// Waits for the end of a load; one that hangs ends the process, for its threads cannot be.
void wait_for(Load& load, const std::string& what) {
  const auto end = std::chrono::steady_clock::now() + kHung;
  std::uint64_t before = 0;
  while (!load.wait(milliseconds(20))) {
    const Progress progress = load.progress();
    EXPECT_GE(progress.done, before) << what;
    EXPECT_LE(progress.done, progress.total) << what;
    before = progress.done;
    if (std::chrono::steady_clock::now() < end) continue;
    std::fprintf(stderr, "%s: FAILED: the load hangs after %llu of %llu bytes\n", what.c_str(),
                 static_cast<unsigned long long>(progress.done),
                 static_cast<unsigned long long>(progress.total));
    std::abort();
  }
}

// What the process held before a load.
struct Baseline {
  std::size_t files = simulation::open_files();
  std::size_t threads = simulation::threads();

  void expect_same(const std::string& what) const {
    EXPECT_EQ(simulation::open_files(), files) << what << ": descriptors leak";
    EXPECT_EQ(simulation::threads(threads), threads) << what << ": threads leak";
  }
};

// After any load, with its devices still open: what it made is gone or in the pool.
void expect_released(const Scenario& scenario, const Machine& machine, const std::string& what) {
  const SimLedger now = sim().ledger();
  EXPECT_EQ(now.streams, 0U) << what << ": streams leak";
  EXPECT_EQ(now.events, 0U) << what << ": events leak";
  EXPECT_EQ(now.allocations, 0U) << what << ": device memory leaks";
  EXPECT_EQ(now.pushed, 0U) << what << ": contexts left current: leak";
  EXPECT_EQ(now.pinned_bytes,
            device::StagingPool::instance().pinned_bytes() - machine.lost_before())
      << what;
  EXPECT_LE(now.peak_pinned_bytes, scenario.pinned_bound()) << what << ": pinned budget";
}

void expect_machine_clean(Machine& machine, const std::string& what) {
  machine.close();
  EXPECT_EQ(simulation::leaks(sim().ledger()), "") << what;
  EXPECT_EQ(device::StagingPool::instance().pinned_bytes(), machine.lost_before()) << what;
  EXPECT_EQ(sim().sim_violations(), 0U) << what << "\n" << sim().violations();
}

// A load that nothing disturbs.
void run_plainly(Scenario& scenario, const std::string& what) {
  std::string why;
  auto load = scenario.prepare(&why);
  ASSERT_NE(load, nullptr) << what << ": " << why;
  const Status started = load->start();
  ASSERT_TRUE(started.ok()) << what << ": " << started.error().describe();
  wait_for(*load, what);
  const auto report = load->finish();
  ASSERT_TRUE(report.ok()) << what << ": " << report.error().describe();
  EXPECT_LE(report->peak_staging_bytes, scenario.pinned_bound()) << what;
  scenario.expect_everything(*load, *report, what);
}

enum class Disturbance : std::uint8_t { kNone, kCancel, kFault, kAbandoned };

// A load that ends in an error, or not: either way nothing is left of it.
void run_disturbed(Scenario& scenario, Disturbance how, const std::string& what) {
  Random& random = scenario.random;
  if (how == Disturbance::kFault) {
    const int code = random.pick<int>({CUDA_ERROR_OUT_OF_MEMORY, CUDA_ERROR_LAUNCH_FAILED,
                                       kUnknownError, CUDA_ERROR_INVALID_VALUE});
    sim().sim_fail_call(nullptr, random.between(1, 70), code, 0);
  }
  auto load = scenario.prepare();
  if (load == nullptr) {
    EXPECT_EQ(how, Disturbance::kFault) << what;
    return;
  }
  if (!load->start().ok()) {
    EXPECT_EQ(how, Disturbance::kFault) << what;
    load.reset();
    scenario.expect_no_traces(what);
    return;
  }
  if (how == Disturbance::kAbandoned) {
    if (random.chance(50)) std::ignore = load->wait(milliseconds(random.below(2)));
    load.reset();
    scenario.expect_no_traces(what);
    return;
  }
  if (how == Disturbance::kCancel) {
    std::this_thread::sleep_for(std::chrono::microseconds(random.spread(3000)));
    load->cancel();
  }
  wait_for(*load, what);
  const auto report = load->finish();
  if (report.ok()) {
    scenario.expect_everything(*load, *report, what);
    return;
  }
  if (how == Disturbance::kCancel) {
    EXPECT_EQ(report.error().code, ErrorCode::kCancelled) << what;
  } else {
    EXPECT_EQ(error_kind(report.error().code), report.error().code == ErrorCode::kOutOfMemory
                                                   ? ErrorKind::kMemory
                                                   : ErrorKind::kDevice)
        << what << ": " << report.error().describe();
    EXPECT_NE(report.error().message.find("cu"), std::string::npos) << report.error().message;
  }
  load.reset();
  scenario.free_scratch();
  scenario.expect_no_traces(what);
}

void one_seed(std::uint64_t seed) {
  Random random(seed ^ 0x5EED);
  const int devices = random.pick({1, 1, 2, 2, 8});
  const int policy = static_cast<int>(random.below(SIM_POLICIES));
  const std::string what = "seed " + std::to_string(seed) + ", " +
                           simulation::kPolicyNames[policy] + ", " + std::to_string(devices) +
                           " devices";
  SCOPED_TRACE(what);
  Machine machine(devices, seed, policy);
  sim().sim_set_version(random.pick({12000, 12080, 12090, 13000, 13000, 13000}));
  if (random.chance(15)) {
    sim().sim_hide_symbol("cuMemcpyBatchAsync",
                          random.chance(50) ? SIM_HIDE_NULL : SIM_HIDE_NOT_FOUND);
  }
  if (random.chance(8)) {
    const std::uint64_t refused = random.between(1, 3);  // of machine code and PTX
    for (std::uint64_t i = 1; i <= refused; ++i) {
      sim().sim_fail_call("cuModuleLoadData", i, CUDA_ERROR_NO_BINARY_FOR_GPU, 0);
    }
  }
  if (random.chance(10)) {
    const std::uint64_t refused = random.between(1, 3);
    for (std::uint64_t i = 1; i <= refused; ++i) {
      sim().sim_fail_call("cuMemHostRegister", i, CUDA_ERROR_NOT_SUPPORTED, 0);
    }
  }
  {
    Scenario scenario(seed, devices);
    scenario.settings = random_settings(scenario.random);
    PlanMaker(scenario, devices).make();
    ASSERT_TRUE(device::Device::count().ok());
    const Baseline baseline;
    scenario.queue_pending_writes();
    auto how = Disturbance::kNone;
    if (random.chance(25)) {
      how = random.pick({Disturbance::kCancel, Disturbance::kFault, Disturbance::kFault,
                         Disturbance::kAbandoned});
    }
    if (how != Disturbance::kNone) {
      run_disturbed(scenario, how, what + ", disturbed");
      expect_released(scenario, machine, what + ", disturbed");
      // What has not struck must not strike the next load.
      for (std::uint64_t i = 0; sim().sim_faults_left() != 0 && i < 50; ++i) {
        std::ignore = device::Device::count();
      }
    }
    run_plainly(scenario, what);
    scenario.free_scratch();
    expect_released(scenario, machine, what);
    baseline.expect_same(what);
  }
  expect_machine_clean(machine, what);
}

std::uint64_t number_from_environment(const char* name, std::uint64_t otherwise) {
  const char* const text = std::getenv(name);
  return text != nullptr && *text != '\0' ? std::strtoull(text, nullptr, 10) : otherwise;
}

TEST(Engine, RandomPlansArriveWhole) {
  std::uint64_t first = 0;
  std::uint64_t last = number_from_environment("WEIGHTLIFT_SEEDS", 200);
  if (std::getenv("WEIGHTLIFT_SEED") != nullptr) {
    first = number_from_environment("WEIGHTLIFT_SEED", 0);
    last = first + 1;
  }
  for (std::uint64_t seed = first; seed < last; ++seed) {
    one_seed(seed);
    if (HasFailure()) {
      std::printf("WEIGHTLIFT_SEED=%llu runs this one alone\n",
                  static_cast<unsigned long long>(seed));
      return;
    }
  }
}

// --- Every call fails once ---------------------------------------------------------------------

// One of everything: casts on both sides, a kernel's chunk, plain copies, strided and remembered
// sources, the host, and more chunks than slots.
void fill_with_one_of_everything(Scenario& scenario) {
  scenario.settings.threads = 1;
  scenario.settings.io_depth = 1;
  scenario.settings.read_bytes = 64 * kKiB;
  scenario.settings.chunk_bytes = 256 * kKiB;
  scenario.settings.pinned_bytes = 512 * kKiB;
  const Origin file = scenario.add_file(900 * kKiB);
  scenario.add(file, 131, 600 * kKiB, Dtype::kU8, Dtype::kU8, 0, 3);
  const std::uint64_t small = 131 + 600 * kKiB;
  for (std::uint64_t i = 0; i < 20; ++i) {
    scenario.add(file, small + 1000 * i, 250, Dtype::kF32, i % 2 == 0 ? Dtype::kBf16 : Dtype::kF64,
                 0, i % 3);
  }
  const std::uint64_t rest = small + 20'000;
  const auto rows = [](std::int64_t item) {
    return std::vector<Dimension>{{30, 600, 50 * item}, {50, 4, item}};
  };
  scenario.add_strided(file, rest, Dtype::kF32, Dtype::kF16, rows(2), 0, 1);
  scenario.add_strided(file, rest, Dtype::kF32, Dtype::kF32, rows(4), kHostDevice, 1);
  scenario.add(file, rest, 30'000, Dtype::kBf16, Dtype::kF32, kHostDevice, 1);
  const Origin memory = scenario.add_memory(40'000);
  scenario.add(memory, 7, 9000, Dtype::kF32, Dtype::kF32, 0, 0);
}

// The n-th call of `name` (any where null) fails in the n-th round, until there are no more calls.
// Whatever fails: an error that says so or a right result, nothing left, a right load after it.
void sweep(const char* name, int code, bool sticky) {
  for (std::uint64_t n = 1; n < 1000; ++n) {
    const std::string what = std::string(name == nullptr ? "any call" : name) + ", number " +
                             std::to_string(n) + (sticky ? ", sticky" : "");
    SCOPED_TRACE(what);
    const std::string_view call = name == nullptr ? "" : name;
    // A context that cannot be entered keeps what is in it.
    const bool shut = call == "cuCtxPushCurrent";
    const bool lost = sticky || shut || call == "(operation)";
    bool struck = false;
    {
      Machine machine(1, n, static_cast<int>(n % SIM_POLICIES));
      Scenario scenario(n, 1);
      fill_with_one_of_everything(scenario);
      scenario.queue_pending_writes();
      const Baseline baseline;
      sim().sim_fail_call(name, n, code, sticky ? 1 : 0);
      {
        std::optional<Error> error;
        auto load = scenario.prepare();
        if (load != nullptr) {
          if (Status started = load->start(); !started.ok()) {
            error = started.error();
          } else {
            wait_for(*load, what);
            const auto report = load->finish();
            if (report.ok()) {
              scenario.expect_everything(*load, *report, what);
            } else {
              error = report.error();
            }
          }
        }
        struck = sim().sim_faults_left() == 0;
        if (error) {
          EXPECT_TRUE(struck) << error->describe();
          EXPECT_NE(error->message.find("cu"), std::string::npos) << error->message;
        }
      }
      if (!lost) {
        scenario.expect_no_traces(what);
        expect_released(scenario, machine, what);
        baseline.expect_same(what);
        // That the library could not be loaded is remembered; everything else is tried again.
        if (!device::driver().ok()) device::use_driver_for_testing(simulation::kLibrary);
        if (struck) run_plainly(scenario, what + ", the load after it");
      }
      machine.close();
      struck = struck || sim().sim_faults_left() == 0;
      SimLedger left = sim().ledger();
      if (lost) left.pinned_ranges = 0;  // slots that a lost device may still read
      if (shut) left.streams = left.events = left.modules = 0;
      EXPECT_EQ(simulation::leaks(left), "");
      EXPECT_EQ(sim().sim_violations(), 0U) << sim().violations();
    }
    if (!struck || ::testing::Test::HasFailure()) return;
  }
}

TEST(Faults, EveryCallMayFailOnce) {
  sweep(nullptr, kUnknownError, false);
  sweep(nullptr, CUDA_ERROR_OUT_OF_MEMORY, false);
}

TEST(Faults, EveryFunctionMayFailAtAnyTime) {
#define WL_NAME(name, version) #name,
  constexpr std::array kFunctions = {WL_DRIVER_REQUIRED(WL_NAME) "cuMemcpyBatchAsync"};
#undef WL_NAME
  for (const char* const name : kFunctions) sweep(name, CUDA_ERROR_LAUNCH_FAILED, false);
}

TEST(Faults, RefusedPinningIsNamed) {
  Machine machine(1);
  {
    Scenario scenario(1, 1);
    fill_with_one_of_everything(scenario);
    for (std::uint64_t i = 1; i <= 4; ++i) {
      sim().sim_fail_call("cuMemHostRegister", i, CUDA_ERROR_NOT_SUPPORTED, 0);
      sim().sim_fail_call("cuMemHostAlloc", i, CUDA_ERROR_OUT_OF_MEMORY, 0);
    }
    auto load = scenario.prepare();
    ASSERT_NE(load, nullptr);
    ASSERT_TRUE(load->start().ok());
    wait_for(*load, "refused");
    const auto report = load->finish();
    ASSERT_FALSE(report.ok());
    for (const char* const part : {"cuMemHostRegister", "cuMemHostAlloc", "ulimit -l"}) {
      EXPECT_NE(report.error().message.find(part), std::string::npos) << report.error().message;
    }
    load.reset();
    scenario.expect_no_traces("refused");
  }
  expect_machine_clean(machine, "refused");
}

TEST(Faults, OneSlotIsEnough) {
  Machine machine(1);
  {
    Scenario scenario(1, 1);
    fill_with_one_of_everything(scenario);
    for (std::uint64_t i = 1; i <= 3; ++i) {
      sim().sim_fail_call("cuMemHostAlloc", i, CUDA_ERROR_OUT_OF_MEMORY, 0);
      sim().sim_fail_call("cuMemHostRegister", i + 1, CUDA_ERROR_OUT_OF_MEMORY, 0);
    }
    auto load = scenario.prepare();
    ASSERT_NE(load, nullptr);
    ASSERT_TRUE(load->start().ok());
    wait_for(*load, "one slot");
    const auto report = load->finish();
    ASSERT_TRUE(report.ok()) << report.error().describe();
    EXPECT_EQ(report->peak_staging_bytes, scenario.settings.chunk_bytes);
    ASSERT_EQ(report->fallbacks.size(), 1U);
    EXPECT_NE(report->fallbacks[0].find("fewer staging slots"), std::string::npos);
    scenario.expect_everything(*load, *report, "one slot");
  }
  expect_machine_clean(machine, "one slot");
}

// --- Memory runs out ---------------------------------------------------------------------------

// Where the engine is at work; the test's own allocations do not count.
class Watched {
 public:
  Watched() { memory.watched = true; }
  Watched(const Watched&) = delete;
  Watched& operator=(const Watched&) = delete;
  ~Watched() { memory.watched = false; }
};

// The n-th allocation of `round` fails, and with `for_good` all after it, for every n until there
// are no more. Whatever a round leaves behind, it is the same as after the first one, which also
// makes what is made once a process.
template <class Round>
void exhaust(const std::string& name, const Round& round) {
  for (const bool for_good : {false, true}) {
    std::optional<std::int64_t> held;
    for (std::int64_t n = 1;; ++n) {
      const std::string what =
          name + ", allocation " + std::to_string(n) + (for_good ? " and all after it" : "");
      memory.for_good = for_good;
      memory.left = n;
      round(what, static_cast<std::uint64_t>(n));
      const bool struck = memory.left < 1;
      memory.left = 0;
      if (held) {
        EXPECT_EQ(memory.held, *held) << what << ": memory leaks";
      }
      held = memory.held;
      if (::testing::Test::HasFailure()) return;
      if (!struck) {
        EXPECT_GT(n, 5) << name << ": hardly anything was allocated";
        break;
      }
    }
  }
}

// One load during which memory runs out, or does not.
void run_exhausted(Scenario& scenario, const std::string& what) {
  scenario.name_streams();
  std::unique_ptr<Load> load;
  std::optional<Report> report;
  std::optional<ErrorCode> code;
  {
    const Watched watched;
    try {
      auto prepared = Load::prepare(scenario.plan, scenario.settings);
      if (prepared.ok()) {
        load = *std::move(prepared);
        memory.watched = false;
        scenario.give_scratch(*load);
        memory.watched = true;
        if (const Status started = load->start(); started.ok()) {
          for (int i = 0; !load->wait(milliseconds(20)); ++i) {
            if (i == 1500) std::abort();  // it hangs
          }
          auto finished = load->finish();
          if (finished.ok()) {
            report = *std::move(finished);
          } else {
            code = finished.error().code;
          }
        } else {
          code = started.error().code;
        }
      } else {
        code = prepared.error().code;
      }
    } catch (const std::bad_alloc&) {
      code = ErrorCode::kOutOfMemory;
    }
    if (!report) load.reset();  // which needs no memory either
  }
  if (report) {
    scenario.expect_everything(*load, *report, what);
    return;
  }
  EXPECT_EQ(code, ErrorCode::kOutOfMemory) << what;
  EXPECT_LT(memory.left, 1) << what << ": memory had not run out";
  scenario.free_scratch();
  scenario.expect_no_traces(what);
}

void exhaust_loads(const std::string& name, int devices, void (*fill)(Scenario&)) {
  exhaust(name, [&](const std::string& what, std::uint64_t n) {
    SCOPED_TRACE(what);
    Machine machine(devices, n, static_cast<int>(n % SIM_POLICIES));
    {
      Scenario scenario(n, devices);
      fill(scenario);
      const Baseline baseline;
      run_exhausted(scenario, what);
      expect_released(scenario, machine, what);
      baseline.expect_same(what);
      run_plainly(scenario, what + ", the load after it");
    }
    expect_machine_clean(machine, what);
  });
}

TEST(Exhaustion, OfALoadToADevice) {
  exhaust_loads("kernels", 1, fill_with_one_of_everything);
  exhaust_loads("no kernels", 1, [](Scenario& scenario) {
    fill_with_one_of_everything(scenario);
    scenario.settings.kernels = false;
    scenario.settings.threads = 2;
  });
}

TEST(Exhaustion, OfALoadToTheHost) {
  static constexpr auto kFill = [](Scenario& scenario) {
    scenario.settings.threads = 2;
    scenario.settings.read_bytes = 64 * kKiB;
    const Origin file = scenario.add_file(900 * kKiB);
    scenario.add(file, 131, 300 * kKiB, Dtype::kU8, Dtype::kU8, kHostDevice, 3);
    scenario.add(file, 131 + 300 * kKiB, 30'000, Dtype::kF32, Dtype::kBf16, kHostDevice, 1);
    scenario.add_strided(file, 600 * kKiB, Dtype::kF32, Dtype::kF32, {{30, 600, 200}, {50, 4, 4}},
                         kHostDevice, 1);
    const Origin mapped = scenario.add_file(700 * kKiB);
    scenario.add_mapped(mapped, 1000, 100 * kKiB);
    scenario.add_mapped(mapped, 400 * kKiB, 200 * kKiB);
    io::drop_from_page_cache(*scenario.plan.files[mapped.file]);
  };
  exhaust_loads("buffered", 0, kFill);
  exhaust_loads("direct", 0, [](Scenario& scenario) {
    kFill(scenario);
    scenario.settings.io_path = IoPath::kDirect;
  });
  exhaust_loads("on the caller's thread", 0, [](Scenario& scenario) {
    const Origin file = scenario.add_file(100 * kKiB);
    scenario.add(file, 7, 9000, Dtype::kF32, Dtype::kF16, kHostDevice, 1);
    scenario.add_strided(file, 50 * kKiB, Dtype::kF32, Dtype::kF64, {{30, 600, 400}, {50, 4, 8}},
                         kHostDevice, 1);
  });
}

TEST(Exhaustion, OfPinnedMemory) {
  exhaust("pinned", [](const std::string& what, std::uint64_t n) {
    Machine machine(2, n);
    const std::uint64_t of_torch = sim().sim_alloc(1, 100);
    const Baseline baseline;
    try {
      const Watched watched;
      const auto block = HostMemory::allocate(9 * kMiB, 0, 3);
      if (!block.ok()) {
        EXPECT_EQ(block.error().code, ErrorCode::kOutOfMemory) << what;
      }
    } catch (const std::bad_alloc&) {
      EXPECT_LT(memory.left, 1) << what;
    }
    EXPECT_EQ(sim().ledger().pinned_bytes, 0U) << what;
    baseline.expect_same(what);
    EXPECT_TRUE(HostMemory::allocate(9 * kMiB, 0, 3).ok()) << what;
    sim().sim_free(of_torch);
    expect_machine_clean(machine, what);
  });
}

// --- Without this or that ----------------------------------------------------------------------

TEST(Fallbacks, WithoutKernelsTheHostCastsTheSame) {
  for (const char* const call : {"cuModuleLoadData", "cuModuleGetFunction"}) {
    Machine machine(1);
    {
      Scenario scenario(2, 1);
      fill_with_one_of_everything(scenario);
      for (std::uint64_t i = 1; i <= 2; ++i) {  // machine code and PTX
        sim().sim_fail_call(call, i, CUDA_ERROR_NO_BINARY_FOR_GPU, 0);
      }
      auto load = scenario.prepare();
      ASSERT_NE(load, nullptr);
      ASSERT_TRUE(load->start().ok());
      wait_for(*load, call);
      const auto report = load->finish();
      ASSERT_TRUE(report.ok()) << report.error().describe();
      scenario.expect_everything(*load, *report, call);
      ASSERT_EQ(report->fallbacks.size(), 1U);
      EXPECT_NE(report->fallbacks[0].find("casts run on the host"), std::string::npos);
      EXPECT_EQ(sim().sim_calls("cuLaunchKernel"), 0U);
    }
    expect_machine_clean(machine, call);
  }
}

std::optional<ErrorCode> refusal(int device) {
  LoadPlan plan;
  static const std::vector<std::byte> source(64);
  Copy copy{.device = device, .source = address_of(source.data()), .target = 1, .elements = 64};
  plan.add_copy(copy);
  const auto load = Load::prepare(std::move(plan), Settings());
  return load.ok() ? std::nullopt : std::optional(load.error().code);
}

TEST(Fallbacks, WithoutADeviceTheReasonIsTold) {
  {
    Machine machine(2);
    EXPECT_EQ(refusal(2), ErrorCode::kNoSuchDevice);
    EXPECT_EQ(refusal(-5), ErrorCode::kNoSuchDevice);
    EXPECT_EQ(refusal(1), std::nullopt);
  }
  {
    Machine machine(0);
    EXPECT_TRUE(refusal(0).has_value());
  }
  {
    Machine machine(1);
    sim().sim_set_version(11080);
    EXPECT_EQ(refusal(0), ErrorCode::kDriverTooOld);
  }
  {
    Machine machine(1);
    sim().sim_hide_symbol("cuEventRecord", SIM_HIDE_NOT_FOUND);
    EXPECT_EQ(refusal(0), ErrorCode::kDriverTooOld);
  }
  device::use_driver_for_testing("/nowhere/libcuda.so.1");
  EXPECT_EQ(refusal(0), ErrorCode::kNoDriver);
  device::use_driver_for_testing("");
}

TEST(Fallbacks, AForkedChildLoadsToTheHostAlone) {
  Machine machine(1);
  {
    Scenario before(1, 1);
    fill_with_one_of_everything(before);
    run_plainly(before, "the parent");
    const pid_t child = ::fork();
    if (child == 0) {
      if (refusal(0) != ErrorCode::kForkedProcess) ::_exit(1);
      Scenario scenario(2, 0);
      scenario.settings.threads = 2;
      const Origin file = scenario.add_file(kMiB);
      scenario.add(file, 5, 200'000, Dtype::kF32, Dtype::kBf16, kHostDevice, 0);
      run_plainly(scenario, "the child");
      ::_exit(::testing::Test::HasFailure() ? 2 : 0);
    }
    int status = -1;
    ASSERT_EQ(::waitpid(child, &status, 0), child);
    EXPECT_EQ(status, 0);
  }
  {
    Scenario after(3, 1);
    fill_with_one_of_everything(after);
    run_plainly(after, "the parent again");
  }
  expect_machine_clean(machine, "forked");
}

TEST(Fallbacks, PlansThatCannotBeAreRefused) {
  Machine machine(1);
  {
    Scenario scenario(1, 1);
    const Origin file = scenario.add_file(1000);
    const auto code = [&](Copy copy,
                          std::vector<Dimension> dimensions) -> std::optional<ErrorCode> {
      LoadPlan plan;
      copy.file = plan.add_file(scenario.plan.files[file.file]);
      copy.name = plan.add_name("w");
      if (dimensions.empty()) {
        plan.add_copy(copy);
      } else {
        plan.add_strided(copy, dimensions);
      }
      const auto load = Load::prepare(std::move(plan), Settings());
      if (load.ok()) return std::nullopt;
      EXPECT_EQ(load.error().tensor, "w");
      EXPECT_EQ(load.error().path, scenario.files[0].path());
      return load.error().code;
    };
    EXPECT_EQ(code({.source = 900, .target = 1, .elements = 101}, {}), ErrorCode::kInvalidArgument);
    EXPECT_EQ(code({.source = 900, .target = 1, .elements = 100}, {}), std::nullopt);
    EXPECT_EQ(
        code({.target = 1, .elements = 8, .source_dtype = Dtype::kI32, .target_dtype = Dtype::kF32},
             {}),
        ErrorCode::kUnsupportedDtype);
    EXPECT_EQ(code({.device = 0, .target = 1}, {{4, 2, 2}, {2, 100, 8}}),
              ErrorCode::kInvalidArgument);
    EXPECT_EQ(code({.target = 1}, {{10, 100, 10}, {11, 10, 1}}), ErrorCode::kInvalidArgument);
  }
  expect_machine_clean(machine, "refused plans");
}

TEST(Fallbacks, ScratchMemoryIsAskedFor) {
  Machine machine(1);
  {
    Scenario scenario(1, 1);
    fill_with_one_of_everything(scenario);
    auto load = scenario.prepare();
    ASSERT_NE(load, nullptr);
    ASSERT_GT(load->plan().device(0).scratch_bytes, 0U);
    load->plan().device(0).scratch = 0;
    const Status started = load->start();
    ASSERT_FALSE(started.ok());
    EXPECT_NE(started.error().message.find("scratch"), std::string::npos);
  }
  expect_machine_clean(machine, "no scratch");
}

TEST(Fallbacks, ADriverThatIsGoneEndsTheLoad) {
  for (std::uint64_t seed = 0; seed < 6; ++seed) {
    Machine machine(1, seed, static_cast<int>(seed));
    Scenario scenario(seed, 1);
    fill_with_one_of_everything(scenario);
    auto load = scenario.prepare();
    ASSERT_NE(load, nullptr);
    ASSERT_TRUE(load->start().ok());
    std::this_thread::sleep_for(std::chrono::microseconds(100 * seed));
    sim().sim_exit();
    wait_for(*load, "gone");
    const auto report = load->finish();
    if (!report.ok()) {
      EXPECT_EQ(report.error().code, ErrorCode::kDriverCallFailed);
    }
  }
}

// --- Files that change -------------------------------------------------------------------------

TEST(Files, TruncatedOnesAreAnError) {
  for (std::uint64_t seed = 0; seed < 20; ++seed) {
    SCOPED_TRACE(seed);
    Machine machine(1, seed, static_cast<int>(seed % SIM_POLICIES));
    {
      Scenario scenario(seed, 1);
      Random& random = scenario.random;
      scenario.settings = random_settings(random);
      const Origin file = scenario.add_file(3 * kMiB);
      for (std::uint64_t i = 0; i < 12; ++i) {
        scenario.add(file, 100 + i * 256 * kKiB, 60'000, Dtype::kF32,
                     random.chance(30) ? Dtype::kBf16 : Dtype::kF32, random.chance(50) ? 0 : -1, 0);
      }
      auto load = scenario.prepare();
      ASSERT_NE(load, nullptr);
      const auto truncate = [&] {
        ASSERT_EQ(::truncate(scenario.files[0].path().c_str(),
                             static_cast<off_t>(random.below(3 * kMiB - 300'000))),
                  0);
      };
      const bool before = random.chance(50);
      if (before) truncate();
      ASSERT_TRUE(load->start().ok());
      if (!before) {
        std::this_thread::sleep_for(std::chrono::microseconds(random.below(1500)));
        truncate();
      }
      wait_for(*load, "truncated");
      const auto report = load->finish();
      ASSERT_FALSE(report.ok());
      EXPECT_EQ(report.error().code, ErrorCode::kFileShrank) << report.error().describe();
      EXPECT_EQ(report.error().path, scenario.files[0].path());
      load.reset();
      scenario.expect_no_traces("truncated");
    }
    expect_machine_clean(machine, "truncated");
  }
}

TEST(Files, TruncatedMappingsAreAnErrorAndNoSignal) {
  Machine machine(0);
  Scenario scenario(1, 0);
  const Origin file = scenario.add_file(2 * kMiB);
  scenario.add_mapped(file, 1000, 2 * kMiB - 1000);
  const int fd = ::open(scenario.files[0].path().c_str(), O_WRONLY | O_CLOEXEC);
  ASSERT_EQ(::fdatasync(fd), 0);
  io::drop_from_page_cache(*scenario.plan.files[0]);
  auto load = scenario.prepare();
  ASSERT_NE(load, nullptr);
  ASSERT_EQ(::ftruncate(fd, kMiB), 0);
  ::close(fd);
  ASSERT_TRUE(load->start().ok());
  wait_for(*load, "truncated mapping");
  const auto report = load->finish();
  ASSERT_FALSE(report.ok());
  EXPECT_EQ(report.error().code, ErrorCode::kFileShrank) << report.error().describe();
}

TEST(Files, RewrittenOnesAreAnError) {
  Machine machine(1);
  {
    Scenario scenario(1, 1);
    fill_with_one_of_everything(scenario);
    auto load = scenario.prepare();
    ASSERT_NE(load, nullptr);
    const int fd = ::open(scenario.files[0].path().c_str(), O_WRONLY | O_CLOEXEC);
    std::this_thread::sleep_for(milliseconds(10));  // past the clock tick of its creation
    ASSERT_EQ(::pwrite(fd, "x", 1, 500), 1);
    ::close(fd);
    ASSERT_TRUE(load->start().ok());
    wait_for(*load, "rewritten");
    const auto report = load->finish();
    ASSERT_FALSE(report.ok());
    EXPECT_EQ(report.error().code, ErrorCode::kFileChanged) << report.error().describe();
  }
  expect_machine_clean(machine, "rewritten");
}

// What a disk does that has gone bad, or a network that has gone away.
TEST(Files, UnreadableOnesAreAnError) {
  for (const int target : {kHostDevice, 0}) {
    Machine machine(1);
    {
      Scenario scenario(1, 1);
      scenario.settings.io_path = IoPath::kBuffered;
      const Origin file = scenario.add_file(2 * kMiB);
      for (std::uint64_t i = 0; i < 4; ++i) {
        scenario.add(file, i * 400'000, 100'000, Dtype::kF32,
                     i % 2 == 0 ? Dtype::kF32 : Dtype::kF16, target, 0);
      }
      auto load = scenario.prepare();
      ASSERT_NE(load, nullptr);
      const int fd = ::open(scenario.files[0].path().c_str(), O_WRONLY | O_CLOEXEC);
      ASSERT_GE(::dup2(fd, scenario.plan.files[0]->descriptor()), 0);
      ::close(fd);
      ASSERT_TRUE(load->start().ok());
      wait_for(*load, "unreadable");
      const auto report = load->finish();
      ASSERT_FALSE(report.ok());
      EXPECT_EQ(report.error().code, ErrorCode::kReadFailed) << report.error().describe();
      EXPECT_EQ(report.error().path, scenario.files[0].path());
      EXPECT_NE(report.error().tensor, "");
      EXPECT_EQ(report.error().system_errno, EBADF);
      load.reset();
      scenario.expect_no_traces("unreadable");
    }
    expect_machine_clean(machine, "unreadable");
  }
}

TEST(Files, LargeTargetsOnTheHostAreWhole) {
  Machine machine(0);
  Scenario scenario(1, 0);
  scenario.settings.threads = 4;
  const Origin file = scenario.add_file(8 * kMiB);
  for (std::uint64_t i = 0; i < 3; ++i) {
    scenario.add(file, 3 + i, 2 * kMiB - 2, Dtype::kF32, Dtype::kF16, kHostDevice, i);
    scenario.add(file, i, 8 * kMiB - i, Dtype::kU8, Dtype::kU8, kHostDevice, 2 * i);
  }
  run_plainly(scenario, "large");
}

// Small tensors that follow one another in the file do so in the block, unless that would put one
// at an address that its elements must not have.
TEST(Layouts, NeighboursAreReadTogether) {
  const TestFile file(std::vector<std::byte>(4 * kKiB));
  LoadPlan plan;
  const std::uint32_t index = plan.add_file(file.open());
  engine::HostLayout layout(plan);
  const auto add = [&](std::uint64_t offset, std::uint64_t bytes, Dtype dtype, Dtype target) {
    return layout.add({.file = index, .dtype = dtype, .offset = offset, .bytes = bytes}, target);
  };
  EXPECT_EQ(add(100, 12, Dtype::kF32, Dtype::kF32), 12);
  EXPECT_EQ(add(112, 6, Dtype::kBf16, Dtype::kBf16), 6);  // neighbour
  EXPECT_EQ(add(118, 8, Dtype::kF32, Dtype::kF32), 8);    // not at 18
  EXPECT_EQ(add(126, 8, Dtype::kF32, Dtype::kBf16), 4);   // cast
  EXPECT_EQ(add(134, 3, Dtype::kF4, Dtype::kF4), 3);      // behind one that is cast
  EXPECT_EQ(add(137, 0, Dtype::kU8, Dtype::kU8), 0);      // empty
  EXPECT_EQ(add(200, 16, Dtype::kF64, Dtype::kF64), 16);  // elsewhere in the file
  constexpr std::array<std::uint64_t, 7> kOffsets = {0, 12, 64, 128, 192, 195, 256};
  for (std::size_t i = 0; i < kOffsets.size(); ++i) EXPECT_EQ(layout.offset(i), kOffsets.at(i));
  EXPECT_EQ(layout.bytes(), 272);

  std::vector<std::byte> block(layout.bytes());
  layout.place_at(block.data());
  ASSERT_EQ(plan.copies.size(), 6);  // without the empty one
  EXPECT_EQ(plan.copies[1].target, address_of(block.data()) + 12);
  EXPECT_EQ(plan.copies[3].target, address_of(block.data()) + 128);
  EXPECT_EQ(plan.copies[3].elements, 2);
  EXPECT_EQ(plan.copies[3].source_dtype, Dtype::kF32);
  EXPECT_EQ(plan.copies[3].target_dtype, Dtype::kBf16);
  EXPECT_EQ(plan.copies[4].elements, 3);
}

// A load as small as this one has no threads: the caller of wait() is the one that works. The
// targets lie on a huge page each, for a cancel is noticed between two of them.
TEST(Files, ALoadOnTheCallersThreadCanBeCancelled) {
  constexpr std::size_t kCopies = 1024;
  constexpr std::size_t kRegion = kCopies * io::kHugePageBytes;
  const TestFile file(std::vector<std::byte>(kCopies * 8 * kKiB));
  void* const region = ::mmap(nullptr, kRegion, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  ASSERT_NE(region, MAP_FAILED);
  ::madvise(region, kRegion, MADV_NOHUGEPAGE);
  LoadPlan plan;
  const std::uint32_t index = plan.add_file(file.open());
  for (std::size_t i = 0; i < kCopies; ++i) {
    plan.add_copy({.file = index,
                   .source = i * 8 * kKiB,
                   .target = reinterpret_cast<std::uintptr_t>(region) + i * io::kHugePageBytes,
                   .elements = 16});
  }
  bool cancelled = false;
  for (int tries = 0; tries < 100 && !cancelled; ++tries) {
    auto load = Load::prepare(plan, {});
    ASSERT_TRUE(load.ok()) << load.error().describe();
    ASSERT_TRUE((*load)->start().ok());
    std::thread other([&load] {
      while ((*load)->progress().done == 0) std::this_thread::yield();
      (*load)->cancel();
    });
    EXPECT_TRUE((*load)->wait(milliseconds(0)));
    other.join();
    const auto report = (*load)->finish();
    if (report.ok()) continue;  // the other thread was late
    EXPECT_EQ(report.error().code, ErrorCode::kCancelled);
    EXPECT_LT((*load)->progress().done, (*load)->progress().total);
    cancelled = true;
  }
  EXPECT_TRUE(cancelled);
  ::munmap(region, kRegion);
}

// --- Several loads -----------------------------------------------------------------------------

TEST(Together, LoadsOnTheSameDevices) {
  const std::uint64_t rounds = number_from_environment("WEIGHTLIFT_SEEDS", 200) / 6 + 1;
  for (std::uint64_t seed = 0; seed < rounds; ++seed) {
    SCOPED_TRACE(seed);
    const int devices = seed % 3 == 0 ? 1 : 2;
    Machine machine(devices, seed, static_cast<int>(seed % SIM_POLICIES));
    {
      const std::uint64_t count = 2 + seed % 3;
      std::vector<std::unique_ptr<Scenario>> scenarios;
      std::vector<std::unique_ptr<Load>> loads;
      for (std::uint64_t i = 0; i < count; ++i) {
        auto& scenario =
            *scenarios.emplace_back(std::make_unique<Scenario>(10 * seed + i, devices));
        scenario.settings = random_settings(scenario.random);
        PlanMaker(scenario, devices).make();
        scenario.queue_pending_writes();
        loads.push_back(scenario.prepare());
        ASSERT_NE(loads.back(), nullptr);
        ASSERT_TRUE(loads.back()->start().ok());
      }
      std::vector<std::thread> callers;
      for (std::uint64_t i = 0; i < count; ++i) {
        callers.emplace_back([&, i] { wait_for(*loads[i], "together"); });
      }
      for (std::thread& caller : callers) caller.join();
      for (std::uint64_t i = 0; i < count; ++i) {
        const auto report = loads[i]->finish();
        ASSERT_TRUE(report.ok()) << report.error().describe();
        scenarios[i]->expect_everything(*loads[i], *report, "load " + std::to_string(i));
      }
    }
    expect_machine_clean(machine, "together");
    if (HasFailure()) return;
  }
}

// What other loads hold of the pinned budget.
class Hoard {
 public:
  Hoard(int devices, std::size_t left) {
    constexpr std::size_t kSlot = 32 * kMiB;
    auto& pool = device::StagingPool::instance();
    const std::size_t budget = 64 * kMiB * static_cast<std::size_t>(devices);
    std::size_t bytes = budget - left - pool.pinned_bytes();
    while (bytes > 0) {
      const std::size_t slot = std::min(kSlot, bytes);
      auto taken = pool.take(**device::Device::get(0), slot, budget);
      if (!taken.ok() || !taken->has_value()) std::abort();
      held_.push_back(**std::move(taken));
      bytes -= slot;
    }
  }
  Hoard(const Hoard&) = delete;
  Hoard& operator=(const Hoard&) = delete;
  ~Hoard() { give_back(); }
  void give_back() { held_.clear(); }

 private:
  std::vector<device::StagingSlot> held_;
};

void fill_for_two_devices(Scenario& scenario) {
  fill_with_one_of_everything(scenario);
  const Origin file = scenario.add_file(kMiB);
  scenario.add(file, 0, 600'000, Dtype::kU8, Dtype::kU8, 1, 0);
  scenario.add(file, 600'000, 50'000, Dtype::kF32, Dtype::kF16, 1, 0);
}

TEST(Together, ALoadWaitsForPinnedMemoryThatOthersHold) {
  Machine machine(1);
  {
    Scenario scenario(1, 1);
    fill_with_one_of_everything(scenario);
    Hoard hoard(1, 100 * kKiB);
    auto load = scenario.prepare();
    ASSERT_NE(load, nullptr);
    ASSERT_TRUE(load->start().ok());
    EXPECT_FALSE(load->wait(milliseconds(50)));
    hoard.give_back();
    wait_for(*load, "waiting for the pool");
    const auto report = load->finish();
    ASSERT_TRUE(report.ok()) << report.error().describe();
    scenario.expect_everything(*load, *report, "after the wait");
  }
  expect_machine_clean(machine, "waiting for the pool");
}

TEST(Together, AWaitForPinnedMemoryCanBeCancelled) {
  Machine machine(1);
  {
    Scenario scenario(1, 1);
    fill_with_one_of_everything(scenario);
    const Hoard hoard(1, 100 * kKiB);
    auto load = scenario.prepare();
    ASSERT_NE(load, nullptr);
    ASSERT_TRUE(load->start().ok());
    EXPECT_FALSE(load->wait(milliseconds(10)));
    load->cancel();
    wait_for(*load, "cancelled");
    EXPECT_EQ(load->finish().error().code, ErrorCode::kCancelled);
  }
  expect_machine_clean(machine, "cancelled");
}

TEST(Together, LanesShareTheLastSlot) {
  Machine machine(2);
  {
    Scenario scenario(1, 2);
    fill_for_two_devices(scenario);
    const Hoard hoard(2, scenario.settings.chunk_bytes);
    run_plainly(scenario, "the last slot");
  }
  expect_machine_clean(machine, "the last slot");
}

TEST(Together, LoadsThatEachHoldASlotDoNotWaitForEachOther) {
  for (std::uint64_t seed = 0; seed < 6; ++seed) {
    Machine machine(2, seed, static_cast<int>(seed % SIM_POLICIES));
    {
      std::array<Scenario, 3> scenarios = {Scenario(seed, 2), Scenario(seed + 100, 2),
                                           Scenario(seed + 200, 2)};
      std::vector<std::unique_ptr<Load>> loads;
      const Hoard hoard(2, 2 * 256 * kKiB);
      for (Scenario& scenario : scenarios) {
        fill_for_two_devices(scenario);
        loads.push_back(scenario.prepare());
        ASSERT_NE(loads.back(), nullptr);
        ASSERT_TRUE(loads.back()->start().ok());
      }
      // In the order of their start, whichever ends first: nobody asks for another's report.
      for (std::size_t i = 0; i < loads.size(); ++i) {
        wait_for(*loads[i], "crossed slots");
        const auto report = loads[i]->finish();
        ASSERT_TRUE(report.ok()) << report.error().describe();
        scenarios[i].expect_everything(*loads[i], *report, "crossed slots");
      }
    }
    expect_machine_clean(machine, "crossed slots");
  }
}

// --- Links -------------------------------------------------------------------------------------

// Bytes a second over all links, from the first copy's start to the last one's end.
double link_rate(int devices) {
  double first = 1e30;
  double last = 0;
  std::uint64_t bytes = 0;
  for (int i = 0; i < devices; ++i) {
    SimLink link;
    sim().sim_link(i, &link);
    if (link.bytes_to_device == 0) continue;
    first = std::min(first, link.first_start);
    last = std::max(last, link.last_finish);
    bytes += link.bytes_to_device;
  }
  return static_cast<double>(bytes) / (last - first);
}

// A model cut into one part a device, as device maps do; the first part `first_share` times as
// large as the others. Share of the best possible rate.
double link_share(int devices, double link, double host_memory, std::uint64_t first_share) {
  Machine machine(devices);
  double rate = 0;
  {
    Scenario scenario(1, devices);
    scenario.settings.threads = 2;
    scenario.settings.chunk_bytes = 512 * kKiB;
    scenario.settings.pinned_bytes = 4 * kMiB;
    const Origin file = scenario.add_file(8 * kMiB);
    constexpr std::uint64_t kTensor = 1'000'003;
    for (int device = 0; device < devices; ++device) {
      for (std::uint64_t i = 0; i < 6 * (device == 0 ? first_share : 1); ++i) {
        scenario.add(file, i % 7 * kTensor, kTensor, Dtype::kU8, Dtype::kU8, device, 0);
      }
    }
    sim().sim_set_hashing(0);
    sim().sim_set_time(SIM_TIME_REAL);
    for (int device = 0; device < devices; ++device) sim().sim_set_link(device, link);
    sim().sim_set_host_memory(host_memory);
    run_plainly(scenario, "links");
    rate = link_rate(devices);
  }
  expect_machine_clean(machine, "links");
  const double parts = static_cast<double>(devices) - 1 + static_cast<double>(first_share);
  double best = link * parts / static_cast<double>(first_share);
  if (host_memory > 0) best = std::min(best, host_memory);
  return rate / best;
}

// Other processes may hold the processors for a moment: the best of three.
void expect_full_links(int devices, double link, double host_memory, std::uint64_t first_share) {
  double best = 0;
  for (int i = 0; i < 3 && best < 0.9; ++i) {
    best = std::max(best, link_share(devices, link, host_memory, first_share));
  }
  EXPECT_GE(best, 0.9) << devices << " links of " << link << " bytes/s, host " << host_memory;
}

TEST(Links, AllAreDrivenAtOnce) {
  expect_full_links(8, 30e6, 0, 1);
}
TEST(Links, TheHostsMemoryIsSharedWell) {
  expect_full_links(8, 100e6, 200e6, 1);
}
TEST(Links, TheLargestPartIsNeverBehind) {
  expect_full_links(4, 40e6, 0, 3);
}
TEST(Links, OneIsDrivenWithoutPauses) {
  expect_full_links(1, 60e6, 0, 1);
}

TEST(Links, ACancelWaitsForWhatIsInFlight) {
  Machine machine(2);
  {
    Scenario scenario(1, 2);
    fill_for_two_devices(scenario);
    scenario.settings.threads = 2;
    sim().sim_set_time(SIM_TIME_REAL);
    for (int device = 0; device < 2; ++device) sim().sim_set_link(device, 4e6);
    auto load = scenario.prepare();
    ASSERT_NE(load, nullptr);
    ASSERT_TRUE(load->start().ok());
    EXPECT_FALSE(load->wait(milliseconds(30)));
    load->cancel();
    wait_for(*load, "cancelled");
    EXPECT_EQ(load->finish().error().code, ErrorCode::kCancelled);
    load.reset();
    scenario.free_blocks();
  }
  expect_machine_clean(machine, "cancelled");
}

// --- Pinned tensors ----------------------------------------------------------------------------

// torch copies from a pinned tensor and drops it: nothing tells the owner of the memory.
TEST(PinnedTensors, AreUnpinnedAfterTheDevicesAreDone) {
  for (std::uint64_t seed = 0; seed < 12; ++seed) {
    Machine machine(2, seed, static_cast<int>(seed % SIM_POLICIES));
    const std::uint64_t target = sim().sim_alloc(1, kMiB);
    {
      auto memory = HostMemory::allocate(kMiB, 0, 2);
      ASSERT_TRUE(memory.ok()) << memory.error().describe();
      EXPECT_TRUE((*memory)->pinned());
      EXPECT_EQ(sim().ledger().pinned_bytes, kMiB);
      auto device = device::Device::get(1);
      ASSERT_TRUE(device.ok());
      const device::CurrentContext current(**device);
      EXPECT_EQ((*device)->driver().cuMemcpyHtoDAsync(target, (*memory)->data(), kMiB, nullptr),
                CUDA_SUCCESS);
    }
    EXPECT_EQ(sim().ledger().pinned_bytes, 0U);
    sim().sim_free(target);
    expect_machine_clean(machine, "pinned");
  }
}

TEST(PinnedTensors, RefusalIsAnErrorAndLeaksNothing) {
  Machine machine(1);
  sim().sim_fail_call("cuMemHostRegister", 1, CUDA_ERROR_OUT_OF_MEMORY, 0);
  const auto memory = HostMemory::allocate(kMiB, 0, 2);
  ASSERT_FALSE(memory.ok());
  EXPECT_NE(memory.error().message.find("cuMemHostRegister"), std::string::npos);
  expect_machine_clean(machine, "pinned");
}

// --- Lost devices, last: what they may still read stays pinned for good ------------------------

TEST(LostDevices, EveryCallMayLoseOne) {
  sweep(nullptr, CUDA_ERROR_ILLEGAL_ADDRESS, true);
}

TEST(LostDevices, EveryOperationMayLoseOne) {
  sweep("(operation)", CUDA_ERROR_ILLEGAL_ADDRESS, false);
}

}  // namespace
}  // namespace weightlift::engine
