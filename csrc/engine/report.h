// The report of a load.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>
#include <vector>

#include "engine/plan.h"
#include "engine/schedule.h"
#include "engine/sources.h"

namespace weightlift::engine {

struct FileReport {
  std::string path;
  std::uint64_t bytes = 0;  // of tensors
  std::string route;        // "mapped", "page cache", "buffered", "direct"
  std::string reason;
};

struct DeviceReport {
  int device = kHostDevice;
  std::uint64_t bytes = 0;  // of tensors, as they lie in the checkpoint
};

struct Report {
  std::uint64_t bytes = 0;         // of tensors, as they lie in the checkpoint
  std::uint64_t mapped_bytes = 0;  // of these, mapped without a copy
  std::uint64_t read_bytes = 0;    // read from files
  double seconds = 0;
  std::vector<FileReport> files;
  std::vector<DeviceReport> devices;
  std::uint64_t pinned_bytes = 0;        // of the staging pool, when the load ended
  std::uint64_t peak_staging_bytes = 0;  // slots this load held at once
  unsigned threads = 0;
  std::vector<std::string> memory;  // the kind of pages of new memory, and why
  std::vector<std::string> copies;  // for each device, how chunks were copied
  std::vector<std::string> fallbacks;
  // Files whose modification time changed before or during the load, without another sign of a
  // change. Only reading them again can show whether their bytes changed.
  std::vector<std::string> touched;
};

// Counted by all threads while a load runs.
struct Counters {
  std::atomic<std::uint64_t> delivered_bytes = 0;  // of tensors
  std::atomic<std::uint64_t> read_bytes = 0;
};

[[nodiscard]] std::uint64_t mapped_bytes(const LoadPlan& plan) noexcept;
// Bytes of all tensors of a load.
[[nodiscard]] std::uint64_t total_bytes(const LoadPlan& plan, const Schedule& schedule) noexcept;

// Bytes, files, devices and fallbacks of a load that has ended, from its plan, schedule and
// sources.
[[nodiscard]] Report report_of(const LoadPlan& plan, const Schedule& schedule,
                               const Sources& sources);

}  // namespace weightlift::engine
