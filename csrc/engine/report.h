// What a load has done, for those who ask.
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
  std::uint64_t mapped_bytes = 0;  // of these, handed out without a copy
  std::uint64_t read_bytes = 0;    // moved out of files
  double seconds = 0;
  std::vector<FileReport> files;
  std::vector<DeviceReport> devices;
  std::uint64_t pinned_bytes = 0;        // of the staging pool, when the load ended
  std::uint64_t peak_staging_bytes = 0;  // slots this load held at once
  unsigned threads = 0;
  std::vector<std::string> memory;  // on which pages new memory lies, and why
  std::vector<std::string> copies;  // by device, how chunks were copied
  std::vector<std::string> fallbacks;
  // Files that were read while, or before which, their modification time changed, and no more that
  // can be seen: whether the bytes did, only reading them again can tell.
  std::vector<std::string> touched;
};

// Counted by all threads while a load runs.
struct Counters {
  std::atomic<std::uint64_t> delivered_bytes = 0;  // of tensors
  std::atomic<std::uint64_t> read_bytes = 0;
};

[[nodiscard]] std::uint64_t mapped_bytes(const LoadPlan& plan) noexcept;
// Of all tensors of a load.
[[nodiscard]] std::uint64_t total_bytes(const LoadPlan& plan, const Schedule& schedule) noexcept;

// What plan, schedule and sources say of a load that has ended: bytes, files, devices, fallbacks.
[[nodiscard]] Report report_of(const LoadPlan& plan, const Schedule& schedule,
                               const Sources& sources);

}  // namespace weightlift::engine
