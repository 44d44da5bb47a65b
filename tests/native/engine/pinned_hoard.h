#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdlib>
#include <utility>
#include <vector>

#include "device/context.h"
#include "device/staging.h"
#include "engine/random.h"

namespace weightlift::engine::test {

// What other loads hold of the pinned budget.
class Hoard {
 public:
  Hoard(int devices, std::size_t left) {
    constexpr std::size_t kSlot = 32 * kMiB;
    auto& pool = device::StagingPool::instance();
    const std::size_t budget = 64 * kMiB * static_cast<std::size_t>(devices);
    std::size_t bytes = budget + pool.abandoned_bytes() - left - pool.pinned_bytes();
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

}  // namespace weightlift::engine::test
