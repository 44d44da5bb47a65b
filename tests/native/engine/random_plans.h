// Random plans and settings.
#pragma once

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <deque>
#include <optional>
#include <utility>
#include <vector>

#include "engine/random.h"
#include "engine/scenario.h"
#include "engine/settings.h"
#include "io/residency.h"

namespace weightlift::engine::test {

constexpr std::array kFloats = {Dtype::kF64, Dtype::kF32,    Dtype::kBf16,
                                Dtype::kF16, Dtype::kF8E4M3, Dtype::kF8E5M2};

inline Dtype random_float(Random& random) {
  return kFloats[random.below(kFloats.size())];
}

inline Settings random_settings(Random& random) {
  Settings settings;
  settings.threads = static_cast<unsigned>(random.between(1, 4));
  settings.io_depth = static_cast<unsigned>(random.between(1, 4));
  settings.read_bytes = random.pick<std::size_t>({64 * kKiB, 64 * kKiB, 128 * kKiB});
  settings.hole_bytes = random.pick<std::size_t>({0, 0, 1, 64 * kKiB});
  settings.chunk_bytes = random.pick<std::size_t>({256 * kKiB, 256 * kKiB, 512 * kKiB, kMiB});
  settings.pinned_bytes = settings.chunk_bytes * random.between(1, 4);
  settings.streams = static_cast<unsigned>(random.between(1, 4));
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

  // Tensors one after the other from an odd offset on, as in real files.
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
      if (random_.chance(8)) at += random_.spread(20'000);  // a tensor that is not loaded
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
      // The unwanted elements of this dimension lie between the rows of the next outer one.
      stride = static_cast<std::int64_t>(
          (random_.chance(50) ? span + item - 1 : span + random_.spread(9000)) / item * item);
    }
    if (span > size) return;
    targets(dimensions, dtype_bytes(to), where);
    scenario_.add_strided(origin, random_.below(size - span + 1), from, to, dimensions, where,
                          gap());
  }

  // Contiguous in order; on the host also in other orders, backwards, and with gaps between rows.
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

}  // namespace weightlift::engine::test
