#include "engine/plan.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string_view>
#include <utility>
#include <vector>

#include "dtype.h"
#include "io/file.h"

namespace weightlift::engine {
namespace {

std::int64_t last_of(const Stretch& stretch) {
  return static_cast<std::int64_t>(stretch.start) +
         stretch.step * (static_cast<std::int64_t>(stretch.count) - 1);
}

}  // namespace

Copy copy_of(const StoredTensor& tensor, Dtype target) noexcept {
  const bool casts = target != tensor.dtype;
  return {.file = tensor.file,
          .source = tensor.offset,
          .elements = casts ? tensor.bytes / dtype_bytes(tensor.dtype) : tensor.bytes,
          .source_dtype = casts ? tensor.dtype : Dtype::kU8,
          .target_dtype = casts ? target : Dtype::kU8,
          .name = tensor.name};
}

bool within(std::span<const Stretch> stretches, std::span<const std::uint64_t> shape) noexcept {
  for (std::size_t i = 0; i < shape.size(); ++i) {
    const Stretch& stretch = stretches[i];
    if (stretch.count == 0) continue;
    const std::int64_t last = last_of(stretch);
    if (stretch.step == 0 || stretch.start >= shape[i] || last < 0 ||
        static_cast<std::uint64_t>(last) >= shape[i]) {
      return false;
    }
  }
  return true;
}

std::uint32_t LoadPlan::add_file(std::shared_ptr<io::File> file) {
  for (std::size_t i = 0; i < files.size(); ++i) {
    if (files[i] == file) return static_cast<std::uint32_t>(i);
  }
  files.push_back(std::move(file));
  mappings.emplace_back();
  return static_cast<std::uint32_t>(files.size() - 1);
}

std::uint32_t LoadPlan::add_name(std::string_view name) {
  names.push_back(name);
  return static_cast<std::uint32_t>(names.size() - 1);
}

DeviceNeeds& LoadPlan::device(int ordinal) {
  for (DeviceNeeds& needs : devices) {
    if (needs.device == ordinal) return needs;
  }
  return devices.emplace_back(DeviceNeeds{.device = ordinal});
}

const DeviceNeeds& LoadPlan::needs_of(int ordinal) const {
  return *std::find_if(devices.begin(), devices.end(),
                       [ordinal](const DeviceNeeds& needs) { return needs.device == ordinal; });
}

void LoadPlan::add_copy(Copy copy) {
  if (copy.elements == 0) return;
  if (!copy.casts()) {  // counted in bytes, so that a piece may end at any byte
    copy.elements *= copy.source_item();
    copy.source_dtype = copy.target_dtype = Dtype::kU8;
  }
  copy.dimension_count = 0;
  if (copy.device != kHostDevice) (void)device(copy.device);
  copies.push_back(copy);
}

void LoadPlan::add_strided(Copy copy, std::span<const Dimension> given) {
  std::vector<Dimension> order;
  copy.elements = 1;
  for (const Dimension& dimension : given) {
    copy.elements *= dimension.extent;
    if (dimension.extent != 1) order.push_back(dimension);
  }
  if (copy.elements == 0) return;
  std::stable_sort(order.begin(), order.end(), [](const Dimension& a, const Dimension& b) {
    return a.source_stride > b.source_stride;
  });
  std::vector<Dimension> merged;
  for (const Dimension& inner : order) {
    const auto extent = static_cast<std::int64_t>(inner.extent);
    if (!merged.empty() && merged.back().source_stride == inner.source_stride * extent &&
        merged.back().target_stride == inner.target_stride * extent) {
      merged.back() = {.extent = merged.back().extent * inner.extent,
                       .source_stride = inner.source_stride,
                       .target_stride = inner.target_stride};
    } else {
      merged.push_back(inner);
    }
  }
  const bool contiguous =
      merged.empty() || (merged.size() == 1 &&
                         merged[0].source_stride == static_cast<std::int64_t>(copy.source_item()) &&
                         merged[0].target_stride == static_cast<std::int64_t>(copy.target_item()));
  if (contiguous) {
    add_copy(copy);
    return;
  }
  copy.dimensions = static_cast<std::uint32_t>(dimensions.size());
  copy.dimension_count = static_cast<std::uint32_t>(merged.size());
  dimensions.insert(dimensions.end(), merged.begin(), merged.end());
  if (copy.device != kHostDevice) (void)device(copy.device);
  copies.push_back(copy);
}

void LoadPlan::add_slice(const StoredTensor& tensor, std::span<const std::uint64_t> shape,
                         std::span<const Stretch> stretches, Dtype target_dtype, int target_device,
                         std::uint64_t target) {
  Copy copy{.file = tensor.file,
            .device = target_device,
            .source = tensor.offset,
            .target = target,
            .source_dtype = tensor.dtype,
            .target_dtype = target_dtype,
            .name = tensor.name};
  std::vector<Dimension> parts(shape.size());
  auto source_stride = static_cast<std::int64_t>(copy.source_item());
  auto target_stride = static_cast<std::int64_t>(copy.target_item());
  for (std::size_t i = shape.size(); i > 0; --i) {
    const Stretch& stretch = stretches[i - 1];
    const auto count = static_cast<std::int64_t>(stretch.count);
    // Sources are read forwards, so a negative step fills the target from its end.
    const bool backwards = stretch.step < 0;
    parts[i - 1] = {.extent = stretch.count,
                    .source_stride = source_stride * (backwards ? -stretch.step : stretch.step),
                    .target_stride = backwards ? -target_stride : target_stride};
    if (count != 0) {
      const std::int64_t first =
          backwards ? last_of(stretch) : static_cast<std::int64_t>(stretch.start);
      copy.source += static_cast<std::uint64_t>(first * source_stride);
      if (backwards) copy.target += static_cast<std::uint64_t>(target_stride * (count - 1));
    }
    source_stride *= static_cast<std::int64_t>(shape[i - 1]);
    target_stride *= count;
  }
  add_strided(copy, parts);
}

std::uint64_t LoadPlan::source_bytes(const Copy& copy) const noexcept {
  return copy.elements * copy.source_item();
}

std::pair<std::uint64_t, std::uint64_t> LoadPlan::source_range(const Copy& copy) const noexcept {
  if (copy.dimension_count == 0) return {copy.source, copy.source + source_bytes(copy)};
  std::uint64_t span = copy.source_item();
  for (std::uint32_t i = 0; i < copy.dimension_count; ++i) {
    const Dimension& dimension = dimensions[copy.dimensions + i];
    span += (dimension.extent - 1) * static_cast<std::uint64_t>(dimension.source_stride);
  }
  return {copy.source, copy.source + span};
}

}  // namespace weightlift::engine
