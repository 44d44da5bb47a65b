#include <pybind11/pybind11.h>

#include <array>
#include <cstdint>
#include <optional>

#include "bind/bindings.h"
#include "bind/errors.h"
#include "bind/tensor_export.h"
#include "bind/values.h"
#include "convert/cast.h"
#include "convert/scatter.h"
#include "device/context.h"
#include "device/driver.h"
#include "device/staging.h"
#include "engine/host_memory.h"
#include "engine/memory_pool.h"
#include "io/machine.h"

namespace py = pybind11;

namespace weightlift::bind {
namespace {

// What `weightlift doctor` needs to know about the machine. Does not start CUDA.
py::dict machine() {
  py::dict result;
  result["cpus"] = io::usable_cpus();
  result["memory_headroom"] = io::memory_headroom();
  result["isa"] = text(convert::isa_name(convert::best_isa()));
  py::list images;
  for (const convert::KernelImage& image : convert::scatter_images()) {
    images.append(
        py::make_tuple(image.architecture, image.is_ptx, image.maker, image.bytes.size()));
  }
  result["kernels"] = images;
  result["kernel_toolkit"] = text(convert::kernel_toolkit());
  return result;
}

// The driver's CUDA version, library and devices. Starts CUDA.
py::dict driver_report() {
  const device::Driver* const table = value_or_raise(device::driver());
  py::dict result;
  result["version"] = table->version;
  result["library"] = table->library;
  const char* const batch = table->batch_form();
  result["batch_copies"] = batch != nullptr ? py::object(text(batch)) : py::object(py::none());
  py::list devices;
  const int count = value_or_raise(device::Device::count());
  for (int ordinal = 0; ordinal < count; ++ordinal) {
    device::Device* const device = value_or_raise(device::Device::get(ordinal));
    const auto kernel = device->scatter_kernel();
    devices.append(py::make_tuple(
        device->name(), device->kernel_form(),
        kernel.ok() ? py::object(py::none()) : py::object(py::str(kernel.error().message))));
  }
  result["devices"] = devices;
  return result;
}

// Memory as a capsule for `from_dlpack`; on huge pages if it fills one.
py::object host_memory(std::uint64_t bytes) {
  const auto memory = value_or_raise(engine::HostMemory::allocate(bytes, std::nullopt, {}));
  const std::array<std::uint64_t, 1> shape = {bytes};
  return export_tensor({.shape = shape, .data = memory->data(), .bytes = bytes, .owner = memory});
}

// (bytes in the memory pool, bytes taken from it since the process began).
py::tuple memory_pool() {
  const engine::MemoryPool::Stats stats = engine::MemoryPool::instance().stats();
  return py::make_tuple(stats.kept_bytes, stats.reused_bytes);
}

}  // namespace

void bind_machine(py::module_& module) {
  module.def("machine", &machine);
  module.def("host_memory", &host_memory, py::arg("bytes"));
  module.def("driver_report", &driver_report);
  module.def("pinned_bytes", [] { return device::StagingPool::instance().pinned_bytes(); });
  module.def("memory_pool", &memory_pool);
#ifdef WEIGHTLIFT_TESTING
  module.def("use_driver_for_testing", &device::use_driver_for_testing, py::arg("path"));
#endif
}

}  // namespace weightlift::bind
