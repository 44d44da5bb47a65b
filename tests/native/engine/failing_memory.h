// Memory that runs out when a test says so.
#pragma once

#include <gtest/gtest.h>

#include <atomic>
#include <cstdint>
#include <optional>
#include <string>

namespace weightlift::engine::test {

// Whether an allocation of the C++ library must fail, as if memory had run out.
struct Heap {
  std::atomic<bool> watched = false;
  std::atomic<std::int64_t> left = 0;  // until the one that fails
  std::atomic<bool> for_good = false;  // and with it all after it
  std::atomic<std::int64_t> held = 0;  // blocks

  bool refuses() noexcept {
    if (!watched.load(std::memory_order_relaxed)) return false;
    const std::int64_t now = left.fetch_sub(1);
    return now == 1 || (now < 1 && for_good);
  }
};
extern Heap heap;

// Only the engine's allocations count, not the test's own.
class Watched {
 public:
  Watched() { heap.watched = true; }
  Watched(const Watched&) = delete;
  Watched& operator=(const Watched&) = delete;
  ~Watched() { heap.watched = false; }
};

// The n-th allocation of `round` fails, and with `for_good` all after it, for each n until there
// are no more. Each round must leave behind the same as the first one, which also makes the objects
// that exist once in a process.
template <class Round>
void exhaust(const std::string& name, const Round& round) {
  for (const bool for_good : {false, true}) {
    std::optional<std::int64_t> held;
    for (std::int64_t n = 1;; ++n) {
      const std::string what =
          name + ", allocation " + std::to_string(n) + (for_good ? " and all after it" : "");
      heap.for_good = for_good;
      heap.left = n;
      round(what, static_cast<std::uint64_t>(n));
      const bool struck = heap.left < 1;
      heap.left = 0;
      if (held) {
        EXPECT_EQ(heap.held, *held) << what << ": memory leaks";
      }
      held = heap.held;
      if (::testing::Test::HasFailure()) return;
      if (!struck) {
        EXPECT_GT(n, 5) << name << ": hardly anything was allocated";
        break;
      }
    }
  }
}

}  // namespace weightlift::engine::test
