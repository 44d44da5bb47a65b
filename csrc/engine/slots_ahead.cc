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
#include "engine/schedule.h"
#include "engine/settings.h"

namespace weightlift::engine {

namespace {

// Whether a chunk of the plan certainly goes through the kernel. Twice the chunks that the bytes
// fill, because padding and tables take room too; with more separate tensors than these chunks can
// have without the kernel, one of them has too many.
bool needs_kernel(const Expected& expected, const Settings& settings) {
  if (!settings.kernels) return false;
  const std::uint64_t chunks = 1 + expected.bytes / settings.chunk_bytes;
  return expected.casts || expected.separate > 2 * kDirectRuns * chunks;
}

}  // namespace

SlotsAhead::SlotsAhead(int device, const Expected& expected, const Settings& settings)
    : process_(::getpid()) {
  const Settings resolved = settings.resolved();
  const std::size_t wanted =
      std::min<std::uint64_t>(resolved.pinned_bytes, expected.bytes) / resolved.chunk_bytes;
  // Once it was requested, a thread that finds this out costs more than it saves.
  const bool kernel =
      needs_kernel(expected, resolved) && !device::Device::kernel_is_requested(device);
  // Checked first, because in a child the pool's lock may stay locked for ever.
  if ((wanted == 0 && !kernel) || !device::Device::is_in_use(device)) return;
  if (!kernel && wanted <= device::StagingPool::instance().free_slots(resolved.chunk_bytes)) return;
  try {
    thread_ = std::thread([this, device, kernel, wanted, resolved] {
      try {
        prepare(device, kernel, wanted, resolved);
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

void SlotsAhead::prepare(int device, bool kernel, std::size_t wanted, const Settings& settings) {
  const auto found = device::Device::get(device);
  if (!found.ok()) return;
  // First, because the plan waits for it; the slots are needed later.
  if (kernel) static_cast<void>((*found)->scatter_kernel());
  if ((*found)->uses_host_page_tables()) return;
  const auto budget = pinned_budget(settings);
  if (!budget.ok()) return;
  auto& pool = device::StagingPool::instance();
  while (!stopped_) {
    const auto added = pool.add_free(**found, settings.chunk_bytes, *budget, wanted);
    if (!added.ok() || !*added) return;
  }
}

}  // namespace weightlift::engine
