// Prepares a device for a load whose files are being opened, or which is being planned.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <thread>

#include "engine/settings.h"

namespace weightlift::engine {

// What is known of a load to a device before its plan is complete.
struct Expected {
  std::uint64_t bytes = 0;     // that go through the slots, at least
  bool casts = false;          // whether the device casts
  std::uint64_t separate = 0;  // tensors whose ends adjoin no other tensor on the device, at least
};

// While the files are opened and torch allocates the tensors of a large load (several
// milliseconds), a thread loads the kernel, if the plan will certainly need it and no plan has
// requested it yet, pins slots (0.4 ms each) and leaves them in the pool. It does so only on a
// device that already has a context: torch makes the first one, which takes a hundred times as
// long. Errors are ignored, because the load will meet them.
class SlotsAhead {
 public:
  // Pins no more slots than the bytes fill.
  SlotsAhead(int device, const Expected& expected, const Settings& settings);
  SlotsAhead(const SlotsAhead&) = delete;
  SlotsAhead& operator=(const SlotsAhead&) = delete;
  // Waits only for the slot that is being pinned: the load's own threads pin the rest.
  ~SlotsAhead();

  // The thread begins no further slot. Does not wait for it.
  void stop() noexcept { stopped_ = true; }

 private:
  void prepare(int device, bool kernel, std::size_t wanted, const Settings& settings);

  std::atomic<bool> stopped_ = false;
  pid_t process_;
  std::thread thread_;
};

}  // namespace weightlift::engine
