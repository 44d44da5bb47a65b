// A plan, its expected result, and the checks.
#pragma once

#include <fcntl.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <span>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "convert/cast.h"
#include "engine/load.h"
#include "engine/plan.h"
#include "engine/random.h"
#include "io/file.h"
#include "io/mapping.h"
#include "simulated.h"

namespace weightlift::engine::test {

using simulation::Machine;
using simulation::sim;
using std::chrono::milliseconds;

// Removed when the process ends; each test removes its files before that.
inline const std::string& folder() {
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

inline std::uint64_t address_of(const std::byte* data) {
  return reinterpret_cast<std::uintptr_t>(data);
}

// Copies element by element, by the definition of a copy; whole rows if both sides are contiguous.
inline void expect_copy(const std::byte* source, std::byte* target, std::uint8_t* written,
                        Dtype from, Dtype to, std::span<const Dimension> dimensions,
                        const convert::Fp8Rules& fp8) {
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

// Memory that contains targets, with its expected bytes. Between the targets these are the bytes
// from before.
struct Block {
  int device = kHostDevice;
  std::uint64_t address = 0;
  std::vector<std::byte> memory;  // the host's
  std::vector<std::byte> expected;
  std::vector<std::uint8_t> written;  // 1 where a target lies
  std::uint64_t used = 0;
};

// The sources of copies.
struct Origin {
  std::uint32_t file = kFromMemory;
  const std::vector<std::byte>* bytes = nullptr;
};

// A plan, its expected result and its devices. Needs a Machine.
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

  // Queued writes of the targets' previous owner: only copies that are ordered after them are safe.
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

  // After any load: the bytes outside the targets are unchanged, and no copy is in flight.
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

  // Bytes of files that must have been read at least once.
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

  // The host reads targets without waiting: the load must have made sure that the copies have
  // arrived.
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

  // Bytes outside the targets, after all queued work has run.
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

}  // namespace weightlift::engine::test
