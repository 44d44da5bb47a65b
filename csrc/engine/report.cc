#include "engine/report.h"

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "engine/io_path.h"
#include "engine/plan.h"
#include "engine/schedule.h"
#include "engine/sources.h"

namespace weightlift::engine {
namespace {

std::vector<FileReport> file_reports(const LoadPlan& plan, const Sources& sources) {
  std::vector<FileReport> files;
  files.reserve(plan.files.size());
  for (std::size_t i = 0; i < plan.files.size(); ++i) {
    files.push_back({.path = plan.files[i]->path(),
                     .route = io_route_name(sources.route(i)),
                     .reason = sources.reason(i)});
  }
  for (const Mapped& part : plan.mapped) files[part.file].bytes += part.bytes;
  for (const Copy& copy : plan.copies) {
    if (copy.file != kFromMemory) files[copy.file].bytes += plan.source_bytes(copy);
  }
  return files;
}

// The host first, if it got any tensors.
std::vector<DeviceReport> device_reports(const LoadPlan& plan, const Schedule& schedule) {
  std::vector<DeviceReport> devices;
  std::uint64_t host = mapped_bytes(plan);
  for (const Lane& lane : schedule.lanes) {
    if (lane.device == kHostDevice) {
      host += lane.payload;
    } else {
      devices.push_back({.device = lane.device, .bytes = lane.payload});
    }
  }
  if (host != 0) devices.insert(devices.begin(), {.bytes = host});
  return devices;
}

}  // namespace

std::uint64_t mapped_bytes(const LoadPlan& plan) noexcept {
  std::uint64_t bytes = 0;
  for (const Mapped& part : plan.mapped) bytes += part.bytes;
  return bytes;
}

std::uint64_t total_bytes(const LoadPlan& plan, const Schedule& schedule) noexcept {
  std::uint64_t bytes = mapped_bytes(plan);
  for (const Lane& lane : schedule.lanes) bytes += lane.payload;
  return bytes;
}

Report report_of(const LoadPlan& plan, const Schedule& schedule, const Sources& sources) {
  Report report;
  report.mapped_bytes = mapped_bytes(plan);
  report.bytes = total_bytes(plan, schedule);
  report.files = file_reports(plan, sources);
  report.devices = device_reports(plan, schedule);
  for (const Lane& lane : schedule.lanes) {
    if (!lane.copies.empty()) report.copies.push_back(lane.copies);
    report.fallbacks.insert(report.fallbacks.end(), lane.fallbacks.begin(), lane.fallbacks.end());
  }
  for (std::string& refused : sources.fallbacks()) report.fallbacks.push_back(std::move(refused));
  return report;
}

}  // namespace weightlift::engine
