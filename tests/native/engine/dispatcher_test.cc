// Which thread gets which task, and which threads are woken.
#include "engine/dispatcher.h"

#include <gtest/gtest.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <fstream>
#include <optional>
#include <string>
#include <thread>
#include <variant>
#include <vector>

#include "dtype.h"
#include "engine/bounded_queue.h"
#include "engine/plan.h"
#include "engine/schedule.h"
#include "engine/settings.h"
#include "io/anonymous_memory.h"
#include "mutex.h"
#include "result.h"

namespace weightlift::engine::test {
namespace {

using std::chrono::milliseconds;

TEST(BoundedQueue, GivesBackInOrderAroundItsEnd) {
  BoundedQueue<int> queue(3);
  EXPECT_TRUE(queue.empty());
  int next = 0;
  int expected = 0;
  for (int round = 0; round < 5; ++round) {
    queue.push(next++);
    queue.push(next++);
    EXPECT_EQ(queue.front(), expected);
    EXPECT_EQ(queue.pop(), expected++);
    EXPECT_EQ(queue.pop(), expected++);
    EXPECT_TRUE(queue.empty());
  }
}

int no_node() {
  return -1;
}

// Chunks of `units` units each, for one device and one slot.
Schedule chunks_of(std::uint32_t units, std::uint32_t chunks) {
  Schedule schedule;
  Lane& lane = schedule.lanes.emplace_back();
  lane.device = 0;
  lane.slots = 1;
  for (std::uint32_t i = 0; i < chunks; ++i) {
    lane.chunks.push_back({.first_unit = i * units, .unit_count = units});
  }
  for (std::uint32_t i = 0; i < units * chunks; ++i) lane.units.push_back({.payload = 1});
  lane.payload = units * chunks;
  return schedule;
}

// The number of times that a thread was woken from sleep (proc(5)).
std::uint64_t sleeps_of(pid_t thread) {
  std::ifstream status("/proc/self/task/" + std::to_string(thread) + "/status");
  const std::string field = "voluntary_ctxt_switches:";
  for (std::string line; std::getline(status, line);) {
    if (line.starts_with(field)) return std::stoull(line.substr(field.size()));
  }
  return 0;
}

// A reader thread that takes tasks and does nothing.
struct Reader {
  std::atomic<pid_t> id = 0;
  std::atomic<std::uint32_t> units = 0;
  std::thread thread;

  void run(Dispatcher& dispatcher) {
    thread = std::thread([this, &dispatcher] {
      id = static_cast<pid_t>(::syscall(SYS_gettid));
      const MutexLock lock(dispatcher.mutex());
      while (const std::optional<Task> task = dispatcher.next(no_node)) {
        const auto* const unit = std::get_if<UnitTask>(&*task);
        ASSERT_NE(unit, nullptr);
        ++units;
        if (dispatcher.finish(*unit, {})) dispatcher.submitted(*unit, {});
      }
    });
  }
};

std::uint64_t sleeps_of(const std::vector<Reader>& readers) {
  std::uint64_t all = 0;
  for (const Reader& reader : readers) all += sleeps_of(reader.id);
  return all;
}

// Waits until no thread has been woken for a while.
std::uint64_t settled_sleeps(const std::vector<Reader>& readers) {
  std::uint64_t before = sleeps_of(readers);
  for (int quiet = 0; quiet < 20;) {
    std::this_thread::sleep_for(milliseconds(5));
    const std::uint64_t now = sleeps_of(readers);
    quiet = now == before ? quiet + 1 : 0;
    before = now;
  }
  return before;
}

TEST(DispatcherNext, WakesOneThreadAUnit) {
  constexpr std::uint32_t kUnits = 2;
  constexpr std::uint32_t kChunks = 6;
  const Schedule schedule = chunks_of(kUnits, kChunks);
  Dispatcher dispatcher(schedule, 0);
  AddSlotTask slot;
  {
    const MutexLock lock(dispatcher.mutex());
    const auto task = dispatcher.next(no_node);
    ASSERT_TRUE(task && std::holds_alternative<AddSlotTask>(*task));
    slot = std::get<AddSlotTask>(*task);
  }
  std::vector<Reader> readers(16);
  for (Reader& reader : readers) reader.run(dispatcher);
  for (const Reader& reader : readers) {
    while (reader.id == 0) std::this_thread::yield();
  }
  std::uint64_t before = settled_sleeps(readers);
  for (std::uint32_t chunk = 0; chunk < kChunks; ++chunk) {
    {
      const MutexLock lock(dispatcher.mutex());
      if (chunk == 0) {
        dispatcher.finish(slot, SlotOutcome::kAdded);
      } else {
        ASSERT_TRUE(dispatcher.oldest_submitted(0).has_value());
        dispatcher.arrived(0, {});
      }
    }
    if (chunk + 1 == kChunks) break;  // then all end
    const std::uint64_t now = settled_sleeps(readers);
    // A woken thread may sleep once more, for the lock.
    EXPECT_LE(now - before, 4 * kUnits) << "chunk " << chunk;
    before = now;
  }
  std::uint32_t units = 0;
  for (Reader& reader : readers) {
    reader.thread.join();
    units += reader.units;
  }
  EXPECT_EQ(units, kUnits * kChunks);
}

template <int kNode>
int on_node() {
  return kNode;
}

// Two devices on two nodes: threads fill the slots of their own, until the other lane falls behind.
TEST(DispatcherNext, PrefersTheThreadsOwnNode) {
  constexpr std::uint32_t kUnits = 400;
  Schedule schedule = chunks_of(kUnits, 1);
  schedule.lanes.push_back(schedule.lanes[0]);
  for (const int device : {0, 1}) {
    Lane& lane = schedule.lanes[static_cast<std::size_t>(device)];
    lane.device = lane.node = device;
  }
  Dispatcher dispatcher(schedule, 0);
  const MutexLock lock(dispatcher.mutex());
  std::vector<AddSlotTask> slots;
  for (int i = 0; i < 2; ++i) {
    const auto task = dispatcher.next(no_node);
    ASSERT_TRUE(task && std::holds_alternative<AddSlotTask>(*task));
    slots.push_back(std::get<AddSlotTask>(*task));
  }
  for (const AddSlotTask& slot : slots) dispatcher.finish(slot, SlotOutcome::kAdded);
  const auto lane_of_next = [&](int (*node)()) {
    const auto task = dispatcher.next(node);
    return task ? static_cast<int>(std::get<UnitTask>(*task).lane) : -1;
  };
  for (int i = 0; i < 15; ++i) {
    EXPECT_EQ(lane_of_next(on_node<1>), 1);
    EXPECT_EQ(lane_of_next(on_node<0>), 0);
  }
  // No thread runs on node 0 any more: its lane falls behind by 5 %, and no further.
  int of_other_node = 0;
  for (int i = 0; i < 100; ++i) of_other_node += lane_of_next(on_node<1>) == 0 ? 1 : 0;
  EXPECT_GE(of_other_node, 35);
  EXPECT_LE(of_other_node, 45);
  // A thread on a node without a lane takes the lane that is behind.
  for (int i = 0; i < 20; ++i) EXPECT_EQ(lane_of_next(on_node<7>), 0);
}

// The bytes of the target that each task for a host copy of `count` elements covers.
std::vector<std::uint64_t> bytes_of_tasks(Dtype source, Dtype target, std::uint64_t count) {
  LoadPlan plan;
  // Nothing is read or written here.
  plan.copies.push_back({.source = 4 * io::kHugePageBytes,
                         .target = 10 * io::kHugePageBytes,
                         .elements = count,
                         .source_dtype = source,
                         .target_dtype = target});
  Result<Schedule> schedule = Schedule::make(plan, Settings{}.resolved());
  EXPECT_TRUE(schedule.ok());
  const Lane& lane = schedule->lanes.at(0);
  Dispatcher dispatcher(*schedule, 0);
  const MutexLock lock(dispatcher.mutex());
  std::vector<std::uint64_t> found;
  while (const std::optional<Task> task = dispatcher.next(no_node)) {
    const auto& units = std::get<UnitTask>(*task);
    std::uint64_t& bytes = found.emplace_back(0);
    for (std::uint32_t i = 0; i < units.unit_count; ++i) {
      const Unit& unit = lane.units[units.first_unit + i];
      for (std::uint32_t j = 0; j < unit.piece_count; ++j) {
        bytes += lane.pieces[unit.first_piece + j].count * plan.copies[0].target_item();
      }
    }
    EXPECT_FALSE(dispatcher.finish(units, {}));
  }
  return found;
}

TEST(DispatcherNext, AThreadTakesWholeHugePagesAndSourcePageTables) {
  constexpr std::uint64_t kHuge = io::kHugePageBytes;
  constexpr std::uint64_t kCount = 4 * kHuge;
  using Bytes = std::vector<std::uint64_t>;
  EXPECT_EQ(bytes_of_tasks(Dtype::kF32, Dtype::kF16, kCount), Bytes(8, kHuge));
  EXPECT_EQ(bytes_of_tasks(Dtype::kF16, Dtype::kBf16, kCount), Bytes(8, kHuge));
  EXPECT_EQ(bytes_of_tasks(Dtype::kF16, Dtype::kF32, kCount), Bytes(8, 2 * kHuge));
  EXPECT_EQ(bytes_of_tasks(Dtype::kU8, Dtype::kU8, kCount), Bytes(4, kHuge));
}

}  // namespace
}  // namespace weightlift::engine::test
