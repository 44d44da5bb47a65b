// Pins the first staging slots of a load while it is being planned.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <thread>

#include "engine/settings.h"

namespace weightlift::engine {

// While torch allocates the tensors of a large load (several milliseconds), a thread pins slots for
// it (0.4 ms each) and leaves them in the pool. It does so only on a device that already has a
// context: torch makes the first one, which takes a hundred times as long. Errors are ignored,
// because the load will meet them.
class SlotsAhead {
 public:
  // `bytes` will go through the slots. Pins no more slots than they fill.
  SlotsAhead(int device, std::uint64_t bytes, const Settings& settings);
  SlotsAhead(const SlotsAhead&) = delete;
  SlotsAhead& operator=(const SlotsAhead&) = delete;
  // Waits only for the slot that is being pinned: the load's own threads pin the rest.
  ~SlotsAhead();

 private:
  void pin(int device, std::size_t wanted, const Settings& settings);

  std::atomic<bool> stopped_ = false;
  pid_t process_;
  std::thread thread_;
};

}  // namespace weightlift::engine
