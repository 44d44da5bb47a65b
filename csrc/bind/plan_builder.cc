#include "bind/plan_builder.h"

#include <abstract.h>
#include <listobject.h>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "bind/errors.h"
#include "bind/gil.h"
#include "bind/indexed_file.h"
#include "bind/tensor_export.h"
#include "dtype.h"
#include "engine/host_layout.h"
#include "engine/host_memory.h"
#include "engine/load.h"
#include "engine/plan.h"
#include "engine/report.h"
#include "engine/slots_ahead.h"
#include "format/index.h"
#include "io/mapping.h"
#include "result.h"

namespace py = pybind11;

namespace weightlift::bind {
namespace {

// Before anything is read: raises an error for a tensor that torch cannot represent.
void require_exportable(const IndexedFile& source, const format::TensorInfo& tensor) {
  Status status = check_exportable(tensor.dtype, tensor.shape);
  if (status.ok()) return;
  status.error().path = source.file->path();
  status.error().tensor = tensor.name;
  raise(status.error());
}

Dtype target_dtype(const format::TensorInfo& tensor, std::optional<Dtype> wanted) {
  return wanted && dtype_is_floating(tensor.dtype) ? *wanted : tensor.dtype;
}

void require_targets(const Targets& targets, std::size_t count) {
  if (targets.addresses.size() != count) {
    throw py::value_error("one address and one dtype are needed for each tensor");
  }
}

[[noreturn]] void raise_shared_bytes(const IndexedFile& source, const format::TensorInfo& tensor) {
  raise({.code = ErrorCode::kUnsupportedDtype,
         .message = "elements of " + std::string(dtype_name(tensor.dtype)) +
                    " share bytes, so a part of the tensor cannot be loaded: load it whole",
         .path = source.file->path(),
         .tensor = std::string(tensor.name)});
}

std::chrono::milliseconds milliseconds_of(double seconds) {
  return std::chrono::milliseconds(static_cast<std::int64_t>(seconds * 1000));
}

engine::StoredTensor stored(const format::TensorInfo& tensor, std::uint32_t file,
                            std::uint32_t name) {
  return {.file = file,
          .name = name,
          .dtype = tensor.dtype,
          .offset = tensor.begin,
          .bytes = tensor.bytes};
}

}  // namespace

void PlanBuilder::map(const std::shared_ptr<IndexedFile>& source, const Which& which, bool shared,
                      const std::optional<Windows>& windows) {
  const std::uint32_t file = plan_.add_file(source->file);
  plan_.keep_alive.push_back(source->index);
  // Tensors that are not shared are writable, and their pages are released with them, so another
  // load of the same index gets its own mapping.
  std::shared_ptr<io::Mapping>& mapping = plan_.mappings[file];
  if (!mapping) mapping = value_or_raise(shared ? source->map() : io::Mapping::map(source->file));
  for_each_tensor(*source, which, [&](const format::TensorInfo& tensor) {
    require_exportable(*source, tensor);
    const std::uint32_t name = plan_.add_name(tensor.name);
    const Windows::value_type whole(0, tensor.bytes);
    const auto wanted = windows ? std::span(*windows) : std::span(&whole, 1);
    for (const auto& [begin, end] : wanted) {
      if (begin > end || end > tensor.bytes)
        throw py::index_error("a window leaves its tensor: " + std::string(tensor.name));
      plan_.mapped.push_back(
          {.file = file, .offset = tensor.begin + begin, .bytes = end - begin, .name = name});
    }
    outputs_.push_back({.name = name,
                        .dtype = tensor.dtype,
                        .shape = tensor.shape,
                        .data = mapping->data() + tensor.begin,
                        .bytes = tensor.bytes,
                        .owner = mapping,
                        .pages = shared ? DeadPages::kKept : DeadPages::kReleased});
  });
}

std::shared_ptr<engine::HostMemory> PlanBuilder::allocate(std::size_t bytes,
                                                          std::optional<int> pin_for) {
  auto memory = [&] {
    const UnlockedGil unlocked;  // pinning takes long: it touches every page
    return engine::HostMemory::allocate(bytes, pin_for, settings_);
  }();
  if (!memory.ok() && !plan_.files.empty()) memory.error().path = plan_.files.back()->path();
  auto block = value_or_raise(std::move(memory));
  plan_.host_memory.push_back(block);
  blocks_.push_back(block);
  return block;
}

void PlanBuilder::read(const std::shared_ptr<IndexedFile>& source, const Which& which,
                       std::optional<Dtype> dtype, std::optional<int> pin_for) {
  const std::uint32_t file = plan_.add_file(source->file);
  plan_.keep_alive.push_back(source->index);
  const std::size_t first = outputs_.size();
  engine::HostLayout layout(plan_);
  const DeadPages pages = pin_for                       ? DeadPages::kKept
                          : settings_.kept_bytes() != 0 ? DeadPages::kReleasedUnderPressure
                                                        : DeadPages::kReleased;
  for_each_tensor(*source, which, [&](const format::TensorInfo& tensor) {
    require_exportable(*source, tensor);
    const Dtype target = target_dtype(tensor, dtype);
    const std::uint32_t name = plan_.add_name(tensor.name);
    const std::uint64_t bytes = layout.add(stored(tensor, file, name), target);
    outputs_.push_back({.name = name,
                        .dtype = target,
                        .shape = tensor.shape,
                        .data = nullptr,
                        .bytes = bytes,
                        .owner = {},
                        .pages = pages});
  });
  const auto memory = allocate(layout.bytes(), pin_for);
  layout.place_at(memory->data());
  for (std::size_t i = first; i < outputs_.size(); ++i) {
    outputs_[i].data = memory->data() + layout.offset(i - first);
    outputs_[i].owner = memory;
  }
}

void PlanBuilder::copy_to(const std::shared_ptr<IndexedFile>& source, const Which& which,
                          const Targets& targets) {
  const std::uint32_t file = plan_.add_file(source->file);
  plan_.keep_alive.push_back(source->index);
  std::size_t i = 0;
  require_targets(targets, which ? which->size() : source->index->tensors().size());
  for_each_tensor(*source, which, [&](const format::TensorInfo& tensor) {
    engine::Copy copy =
        engine::copy_of(stored(tensor, file, plan_.add_name(tensor.name)), targets.dtypes[i]);
    copy.device = targets.device;
    copy.target = targets.addresses[i++];
    plan_.add_copy(copy);
  });
}

void PlanBuilder::copy_memory(const std::shared_ptr<HostTensors>& tensors, const Targets& targets) {
  const std::size_t count = tensors->names.size();
  require_targets(targets, count);
  plan_.keep_alive.push_back(tensors);
  for (std::size_t i = 0; i < count; ++i) {
    const Dtype dtype = tensors->dtypes[i];
    engine::Copy copy = engine::copy_of({.name = plan_.add_name(tensors->names[i]),
                                         .dtype = dtype,
                                         .offset = tensors->addresses[i],
                                         .bytes = tensors->elements[i] * dtype_bits(dtype) / 8},
                                        targets.dtypes[i]);
    copy.device = targets.device;
    copy.target = targets.addresses[i];
    plan_.add_copy(copy);
  }
}

PlanBuilder::Part PlanBuilder::add_part(const std::shared_ptr<IndexedFile>& source,
                                        const format::TensorInfo& tensor, const Stretches& parts) {
  if (parts.size() != tensor.shape.size()) {
    throw py::value_error("one (start, step, count) is needed for each dimension");
  }
  if (dtype_bits(tensor.dtype) % 8 != 0) raise_shared_bytes(*source, tensor);
  std::vector<engine::Stretch> stretches;
  stretches.reserve(parts.size());
  for (const auto& [start, step, count] : parts) {
    stretches.push_back({.start = start, .step = step, .count = count});
  }
  if (!engine::within(stretches, tensor.shape)) {
    throw py::index_error("a slice leaves its tensor: " + std::string(tensor.name));
  }
  const std::uint32_t file = plan_.add_file(source->file);
  plan_.keep_alive.push_back(source->index);
  return {.tensor = stored(tensor, file, plan_.add_name(tensor.name)),
          .shape = tensor.shape,
          .stretches = std::move(stretches)};
}

void PlanBuilder::slice(const std::shared_ptr<IndexedFile>& source, std::uint32_t which,
                        const Stretches& parts, std::optional<Dtype> dtype) {
  const format::TensorInfo& tensor = tensor_at(*source, which);
  const Part part = add_part(source, tensor, parts);
  const Dtype target = target_dtype(tensor, dtype);
  const auto shape = std::make_shared<std::vector<std::uint64_t>>();
  std::uint64_t bytes = dtype_bytes(target);
  for (const engine::Stretch& stretch : part.stretches) {
    shape->push_back(stretch.count);
    bytes *= stretch.count;
  }
  const auto memory = allocate(bytes, std::nullopt);
  shapes_.push_back(shape);
  outputs_.push_back({.name = part.tensor.name,
                      .dtype = target,
                      .shape = *shape,
                      .data = memory->data(),
                      .bytes = bytes,
                      .owner = memory,
                      .pages = DeadPages::kKept});
  plan_.add_slice(part.tensor, part.shape, part.stretches, target, engine::kHostDevice,
                  reinterpret_cast<std::uintptr_t>(memory->data()));
}

void PlanBuilder::slice_to(const std::shared_ptr<IndexedFile>& source, std::uint32_t which,
                           const Stretches& parts, const Targets& target) {
  require_targets(target, 1);
  const Part part = add_part(source, tensor_at(*source, which), parts);
  plan_.add_slice(part.tensor, part.shape, part.stretches, target.dtypes.front(), target.device,
                  target.addresses.front());
}

void PlanBuilder::copy_strided(
    const std::shared_ptr<IndexedFile>& source, std::uint32_t which, std::uint64_t offset,
    const std::vector<std::tuple<std::uint64_t, std::int64_t, std::int64_t>>& dimensions,
    const Targets& target) {
  require_targets(target, 1);
  const format::TensorInfo& tensor = tensor_at(*source, which);
  if (dtype_bits(tensor.dtype) % 8 != 0) raise_shared_bytes(*source, tensor);
  const std::uint64_t item = dtype_bytes(tensor.dtype);
  const std::uint64_t count = tensor.bytes / item;
  std::vector<engine::Dimension> parts;
  std::uint64_t last = offset;
  for (const auto& [extent, source_stride, target_stride] : dimensions) {
    if (extent == 0) return;
    parts.push_back({.extent = extent,
                     .source_stride = source_stride * static_cast<std::int64_t>(item),
                     .target_stride = target_stride * static_cast<std::int64_t>(
                                                          dtype_bytes(target.dtypes.front()))});
    if (extent == 1) continue;
    if (source_stride <= 0) throw py::value_error("the strides in the tensor must be positive");
    // No overflow: both are less than the number of elements before they are multiplied.
    const auto stride = static_cast<std::uint64_t>(source_stride);
    if (last >= count || stride >= count || extent - 1 > (count - 1 - last) / stride) {
      throw py::index_error("a strided copy leaves its tensor: " + std::string(tensor.name));
    }
    last += (extent - 1) * stride;
  }
  if (last >= count)
    throw py::index_error("a strided copy leaves its tensor: " + std::string(tensor.name));
  const std::uint32_t file = plan_.add_file(source->file);
  plan_.keep_alive.push_back(source->index);
  plan_.add_strided({.file = file,
                     .device = target.device,
                     .source = tensor.begin + offset * item,
                     .target = target.addresses.front(),
                     .source_dtype = tensor.dtype,
                     .target_dtype = target.dtypes.front(),
                     .name = plan_.add_name(tensor.name)},
                    parts);
}

void PlanBuilder::prepare_ahead(int device, const engine::Expected& expected) {
  const UnlockedGil unlocked;
  ahead_.emplace_back(device, expected, settings_);
}

std::vector<std::pair<int, std::uint64_t>> PlanBuilder::prepare() {
  auto prepared = [this] {
    const UnlockedGil unlocked;
    return engine::Load::prepare(std::move(plan_), settings_);
  }();
  load_ = value_or_raise(std::move(prepared));
  std::vector<std::pair<int, std::uint64_t>> wanted;
  for (const engine::DeviceNeeds& needs : load_->plan().devices) {
    if (needs.scratch_bytes != 0) wanted.emplace_back(needs.device, needs.scratch_bytes);
  }
  return wanted;
}

void PlanBuilder::start(const std::vector<std::tuple<int, std::uint64_t, py::object>>& scratch) {
  if (!load_) throw py::value_error("call prepare() first");
  for (const auto& [device, address, owner] : scratch) {
    load_->plan().device(device).scratch = address;
    scratch_.push_back(owner);
  }
  auto started = [this] {
    const UnlockedGil unlocked;
    ahead_.clear();
    return load_->start();
  }();
  raise_if_error(std::move(started));
}

bool PlanBuilder::wait(double seconds) {
  if (!load_) throw py::value_error("call prepare() first");
  const UnlockedGil unlocked;
  return load_->wait(milliseconds_of(seconds));
}

void PlanBuilder::order(std::vector<std::uint32_t> ranks) {
  if (ranks.size() != plan_.names.size()) {
    throw py::value_error("one place in the order is needed for each tensor of the plan");
  }
  plan_.ranks = std::move(ranks);
}

engine::Load& PlanBuilder::load_of(const std::vector<std::uint32_t>& which) {
  if (!load_ || load_->plan().ranks.empty()) {
    throw py::value_error("call order() and prepare() first");
  }
  for (const std::uint32_t number : which) {
    if (number >= load_->plan().ranks.size()) throw py::index_error("the plan has no such tensor");
  }
  return *load_;
}

bool PlanBuilder::wait_for(const std::vector<std::uint32_t>& which, double seconds) {
  engine::Load& load = load_of(which);
  auto arrived = [&] {
    const UnlockedGil unlocked;
    return load.wait_for(which, milliseconds_of(seconds));
  }();
  return value_or_raise(std::move(arrived));
}

bool PlanBuilder::wait_for_on_stream(const std::vector<std::uint32_t>& which, int device,
                                     std::uint64_t stream, double seconds) {
  engine::Load& load = load_of(which);
  auto* const handle = reinterpret_cast<CUstream>(static_cast<std::uintptr_t>(stream));
  auto queued = [&] {
    const UnlockedGil unlocked;
    return load.wait_for(which, device, handle, milliseconds_of(seconds));
  }();
  return value_or_raise(std::move(queued));
}

void PlanBuilder::cancel() {
  if (load_) load_->cancel();
}

std::pair<std::uint64_t, std::uint64_t> PlanBuilder::progress() const {
  if (!load_) return {0, 0};
  const engine::Progress progress = load_->progress();
  return {progress.done, progress.total};
}

engine::Report PlanBuilder::finish() {
  if (!load_) throw py::value_error("call prepare() first");
  auto report = [this] {
    const UnlockedGil unlocked;
    return load_->finish();
  }();
  scratch_.clear();
  if (report.ok()) {
    for (const auto& block : blocks_) {
      const auto memory = block.lock();
      std::string pages = memory ? memory->pages() : std::string();
      if (!pages.empty()) report->memory.push_back(std::move(pages));
    }
  }
  return value_or_raise(std::move(report));
}

py::list PlanBuilder::tensors(const py::object& from_dlpack) {
  py::list result(outputs_.size());
  for (std::size_t i = 0; i < outputs_.size(); ++i) {
    Output& output = outputs_[i];
    const py::object capsule = export_tensor({.dtype = output.dtype,
                                              .shape = output.shape,
                                              .data = output.data,
                                              .bytes = output.bytes,
                                              .owner = std::move(output.owner),
                                              .pages = output.pages});
    PyObject* const tensor = PyObject_CallOneArg(from_dlpack.ptr(), capsule.ptr());
    if (tensor == nullptr) throw py::error_already_set();
    PyList_SET_ITEM(result.ptr(), static_cast<Py_ssize_t>(i), tensor);
  }
  outputs_.clear();
  return result;
}

}  // namespace weightlift::bind
