#include "engine/slots_ahead.h"

#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <thread>

#include "device/context.h"
#include "device/staging.h"
#include "engine/device_lane.h"
#include "engine/settings.h"

namespace weightlift::engine {

SlotsAhead::SlotsAhead(int device, std::uint64_t bytes, const Settings& settings)
    : process_(::getpid()) {
  const Settings resolved = settings.resolved();
  const std::size_t wanted =
      std::min<std::uint64_t>(resolved.pinned_bytes, bytes) / resolved.chunk_bytes;
  // Checked first, because in a child the pool's lock may stay locked for ever.
  if (wanted == 0 || !device::Device::is_in_use(device)) return;
  if (wanted <= device::StagingPool::instance().free_slots(resolved.chunk_bytes)) return;
  try {
    thread_ = std::thread([this, device, wanted, resolved] {
      try {
        pin(device, wanted, resolved);
      } catch (const std::exception&) {  // no memory: the load will report it
        stopped_ = true;
      }
    });
  } catch (const std::exception&) {  // no thread can be started
    stopped_ = true;
  }
}

SlotsAhead::~SlotsAhead() {
  stopped_ = true;
  if (!thread_.joinable()) return;
  if (process_ == ::getpid()) {
    thread_.join();
  } else {
    thread_.detach();  // in a child, which does not have this thread
  }
}

void SlotsAhead::pin(int device, std::size_t wanted, const Settings& settings) {
  const auto found = device::Device::get(device);
  if (!found.ok() || (*found)->uses_host_page_tables()) return;
  const auto budget = pinned_budget(settings);
  if (!budget.ok()) return;
  auto& pool = device::StagingPool::instance();
  while (!stopped_) {
    const auto added = pool.add_free(**found, settings.chunk_bytes, *budget, wanted);
    if (!added.ok() || !*added) return;
  }
}

}  // namespace weightlift::engine
