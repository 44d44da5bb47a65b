// The first staging slots of a load, pinned while it is still being planned.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <thread>

#include "engine/settings.h"

namespace weightlift::engine {

// While torch allocates the tensors of a large load (several milliseconds), a thread pins slots for
// it (0.4 ms each) and leaves them in the pool. Only on a device whose context there is already: a
// first use of CUDA is torch's, and takes a hundred times as long. What fails is left to the load.
class SlotsAhead {
 public:
  // `bytes` will go through the slots: no more of them are pinned than that fills.
  SlotsAhead(int device, std::uint64_t bytes, const Settings& settings);
  SlotsAhead(const SlotsAhead&) = delete;
  SlotsAhead& operator=(const SlotsAhead&) = delete;
  // Waits for the slot that is being pinned, and no more: the load's own threads go on.
  ~SlotsAhead();

 private:
  void pin(int device, std::size_t wanted, const Settings& settings);

  std::atomic<bool> stopped_ = false;
  pid_t process_;
  std::thread thread_;
};

}  // namespace weightlift::engine
