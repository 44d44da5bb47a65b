#include "bind/plan_builder.h"

#include <algorithm>
#include <chrono>

#include "bind/errors.h"
#include "bind/gil.h"
#include "bind/tensor_export.h"

namespace py = pybind11;

namespace weightlift::bind {
namespace {

// What torch and the vector units like; torch's own CPU allocator aligns to it too.
constexpr std::uint64_t kTensorAlignment = 64;

std::uint64_t round_up(std::uint64_t value, std::uint64_t unit) {
  return (value + unit - 1) / unit * unit;
}

std::uint64_t elements(const format::TensorInfo& tensor) {
  std::uint64_t count = 1;
  for (const std::uint64_t extent : tensor.shape) count *= extent;
  return count;
}

// Before anything is read: a tensor that torch cannot hold is an error of its own.
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

// A copy of a whole tensor; bytes for dtypes of fractions of a byte.
engine::Copy whole(const format::TensorInfo& tensor, std::uint32_t file, std::uint32_t name,
                   Dtype target) {
  engine::Copy copy{.file = file,
                    .source = tensor.begin,
                    .elements = elements(tensor),
                    .source_dtype = tensor.dtype,
                    .target_dtype = target,
                    .name = name};
  if (target == tensor.dtype) {
    copy.source_dtype = copy.target_dtype = Dtype::kU8;
    copy.elements = tensor.bytes;
  }
  return copy;
}

}  // namespace

void PlanBuilder::map(const std::shared_ptr<IndexedFile>& source, const Which& which, bool shared) {
  const std::uint32_t file = plan_.add_file(source->file);
  plan_.keep_alive.push_back(source->index);
  // Tensors that nobody shares are writable, and their pages go when they die: another load of the
  // same index gets another mapping.
  std::shared_ptr<io::Mapping>& mapping = plan_.mappings[file];
  if (!mapping) mapping = value_or_raise(shared ? source->map() : io::Mapping::map(source->file));
  for_each_tensor(*source, which, [&](const format::TensorInfo& tensor) {
    require_exportable(*source, tensor);
    const std::uint32_t name = plan_.add_name(tensor.name);
    plan_.mapped.push_back(
        {.file = file, .offset = tensor.begin, .bytes = tensor.bytes, .name = name});
    outputs_.push_back({.name = name,
                        .dtype = tensor.dtype,
                        .shape = tensor.shape,
                        .data = mapping->data() + tensor.begin,
                        .bytes = tensor.bytes,
                        .owner = mapping,
                        .release_pages = !shared});
  });
}

std::shared_ptr<engine::HostMemory> PlanBuilder::allocate(std::size_t bytes,
                                                          std::optional<int> pin_for) {
  auto memory = engine::HostMemory::allocate(bytes, pin_for, settings_.resolved().threads);
  if (!memory.ok() && !plan_.files.empty()) memory.error().path = plan_.files.back()->path();
  auto block = value_or_raise(std::move(memory));
  plan_.keep_alive.push_back(block);
  return block;
}

void PlanBuilder::read(const std::shared_ptr<IndexedFile>& source, const Which& which,
                       std::optional<Dtype> dtype, std::optional<int> pin_for) {
  const std::uint32_t file = plan_.add_file(source->file);
  plan_.keep_alive.push_back(source->index);
  const std::size_t first_output = outputs_.size();
  const std::size_t first_copy = plan_.copies.size();
  std::vector<std::uint64_t> places;
  std::uint64_t cursor = 0;
  std::uint64_t file_end = ~std::uint64_t{0};
  for_each_tensor(*source, which, [&](const format::TensorInfo& tensor) {
    require_exportable(*source, tensor);
    const Dtype target = target_dtype(tensor, dtype);
    const bool casts = target != tensor.dtype;
    const std::uint64_t bytes = casts ? elements(tensor) * dtype_bytes(target) : tensor.bytes;
    const std::uint64_t item = std::max<std::uint64_t>(dtype_bits(target) / 8, 1);
    // Neighbours in the file stay neighbours, so that one read fills many small tensors.
    const bool neighbour = !casts && tensor.begin == file_end && cursor % item == 0;
    if (!neighbour) cursor = round_up(cursor, kTensorAlignment);
    file_end = casts ? ~std::uint64_t{0} : tensor.begin + tensor.bytes;
    const std::uint32_t name = plan_.add_name(tensor.name);
    outputs_.push_back({.name = name,
                        .dtype = target,
                        .shape = tensor.shape,
                        .data = nullptr,
                        .bytes = bytes,
                        .owner = {},
                        .release_pages = !pin_for});
    places.push_back(cursor);
    engine::Copy copy = whole(tensor, file, name, target);
    copy.target = cursor;
    plan_.add_copy(copy);
    cursor += bytes;
  });
  const auto memory = allocate(cursor, pin_for);
  for (std::size_t i = first_output; i < outputs_.size(); ++i) {
    outputs_[i].data = memory->data() + places[i - first_output];
    outputs_[i].owner = memory;
  }
  const auto base = reinterpret_cast<std::uintptr_t>(memory->data());
  for (std::size_t i = first_copy; i < plan_.copies.size(); ++i) plan_.copies[i].target += base;
}

void PlanBuilder::copy_to(const std::shared_ptr<IndexedFile>& source, const Which& which,
                          int device, const std::vector<std::uint64_t>& addresses,
                          const std::vector<Dtype>& dtypes) {
  const std::uint32_t file = plan_.add_file(source->file);
  plan_.keep_alive.push_back(source->index);
  std::size_t i = 0;
  const std::size_t count = which ? which->size() : source->index->tensors().size();
  if (addresses.size() != count || dtypes.size() != count) {
    throw py::value_error("one address and one dtype are needed for each tensor");
  }
  for_each_tensor(*source, which, [&](const format::TensorInfo& tensor) {
    engine::Copy copy = whole(tensor, file, plan_.add_name(tensor.name), dtypes[i]);
    copy.device = device;
    copy.target = addresses[i++];
    plan_.add_copy(copy);
  });
}

void PlanBuilder::copy_memory(const std::vector<std::string>& names,
                              const std::vector<std::uint64_t>& sources,
                              const std::vector<std::uint64_t>& elements,
                              const std::vector<Dtype>& source_dtypes, int device,
                              const std::vector<std::uint64_t>& addresses,
                              const std::vector<Dtype>& dtypes) {
  const std::size_t count = names.size();
  for (const std::size_t size :
       {sources.size(), elements.size(), source_dtypes.size(), addresses.size(), dtypes.size()}) {
    if (size != count) throw py::value_error("one of each is needed for each tensor");
  }
  const auto kept = std::make_shared<const std::vector<std::string>>(names);
  plan_.keep_alive.push_back(kept);
  for (std::size_t i = 0; i < count; ++i) {
    engine::Copy copy{.device = device,
                      .source = sources[i],
                      .target = addresses[i],
                      .elements = elements[i],
                      .source_dtype = source_dtypes[i],
                      .target_dtype = dtypes[i],
                      .name = plan_.add_name((*kept)[i])};
    if (dtypes[i] == source_dtypes[i]) {  // bytes, for dtypes of fractions of a byte
      copy.elements = elements[i] * dtype_bits(dtypes[i]) / 8;
      copy.source_dtype = copy.target_dtype = Dtype::kU8;
    }
    plan_.add_copy(copy);
  }
}

void PlanBuilder::slice(
    const std::shared_ptr<IndexedFile>& source, std::uint32_t which,
    const std::vector<std::tuple<std::uint64_t, std::int64_t, std::uint64_t>>& parts,
    std::optional<Dtype> dtype, int device, std::uint64_t address) {
  const auto tensors = source->index->tensors();
  if (which >= tensors.size()) throw py::index_error("no such tensor in the index");
  const format::TensorInfo& tensor = tensors[which];
  if (parts.size() != tensor.shape.size()) {
    throw py::value_error("one (start, step, count) is needed for each dimension");
  }
  if (dtype_bits(tensor.dtype) % 8 != 0) {
    raise({.code = ErrorCode::kUnsupportedDtype,
           .message = "elements of " + std::string(dtype_name(tensor.dtype)) +
                      " share bytes, so the tensor can only be loaded whole",
           .path = source->file->path(),
           .tensor = std::string(tensor.name)});
  }
  const std::uint32_t file = plan_.add_file(source->file);
  plan_.keep_alive.push_back(source->index);
  const Dtype target = target_dtype(tensor, dtype);
  engine::Copy copy{.file = file,
                    .device = device,
                    .source = tensor.begin,
                    .target = address,
                    .source_dtype = tensor.dtype,
                    .target_dtype = target,
                    .name = plan_.add_name(tensor.name)};
  std::vector<engine::Dimension> dimensions(parts.size());
  auto shape = std::make_shared<std::vector<std::uint64_t>>();
  auto source_stride = static_cast<std::int64_t>(copy.source_item());
  auto target_stride = static_cast<std::int64_t>(copy.target_item());
  std::int64_t target_shift = 0;
  for (std::size_t i = parts.size(); i > 0; --i) {
    const auto [start, step, count] = parts[i - 1];
    const auto last =
        static_cast<std::int64_t>(start) + step * (static_cast<std::int64_t>(count) - 1);
    if (count != 0 && (step == 0 || start >= tensor.shape[i - 1] || last < 0 ||
                       static_cast<std::uint64_t>(last) >= tensor.shape[i - 1])) {
      throw py::index_error("a slice reaches outside its tensor");
    }
    // Sources are walked forwards: a negative step fills the target from its end.
    const std::int64_t from = step < 0 ? last : static_cast<std::int64_t>(start);
    engine::Dimension& dimension = dimensions[i - 1];
    dimension.extent = count;
    dimension.source_stride = source_stride * (step < 0 ? -step : step);
    dimension.target_stride = step < 0 ? -target_stride : target_stride;
    if (count != 0) {
      copy.source += static_cast<std::uint64_t>(from * source_stride);
      if (step < 0) target_shift += target_stride * (static_cast<std::int64_t>(count) - 1);
    }
    source_stride *= static_cast<std::int64_t>(tensor.shape[i - 1]);
    target_stride *= static_cast<std::int64_t>(count);
  }
  for (const auto& part : parts) shape->push_back(std::get<2>(part));
  const auto bytes = static_cast<std::uint64_t>(target_stride);
  if (address == 0) {
    const auto memory = allocate(bytes, std::nullopt);
    copy.target = reinterpret_cast<std::uintptr_t>(memory->data());
    shapes_.push_back(shape);
    outputs_.push_back({.name = copy.name,
                        .dtype = target,
                        .shape = *shape,
                        .data = memory->data(),
                        .bytes = bytes,
                        .owner = memory,
                        .release_pages = false});
  }
  copy.target += static_cast<std::uint64_t>(target_shift);
  plan_.add_strided(copy, dimensions);
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

void PlanBuilder::start(const std::vector<std::pair<int, std::uint64_t>>& scratch) {
  if (!load_) throw py::value_error("prepare() comes first");
  for (const auto& [device, address] : scratch) load_->plan().device(device).scratch = address;
  auto started = [this] {
    const UnlockedGil unlocked;
    return load_->start();
  }();
  raise_if_error(std::move(started));
}

bool PlanBuilder::wait(double seconds) {
  if (!load_) throw py::value_error("prepare() comes first");
  const UnlockedGil unlocked;
  return load_->wait(std::chrono::milliseconds(static_cast<std::int64_t>(seconds * 1000)));
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
  if (!load_) throw py::value_error("prepare() comes first");
  auto report = [this] {
    const UnlockedGil unlocked;
    return load_->finish();
  }();
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
                                              .release_pages = output.release_pages});
    PyObject* const tensor = PyObject_CallOneArg(from_dlpack.ptr(), capsule.ptr());
    if (tensor == nullptr) throw py::error_already_set();
    PyList_SET_ITEM(result.ptr(), static_cast<Py_ssize_t>(i), tensor);
  }
  outputs_.clear();
  return result;
}

}  // namespace weightlift::bind
